"""Arguments that several sub-commands share."""

import argparse
import json
from pathlib import Path
from typing import Any

from ssmoe.config.load import RunConfig, load_run, preset_names

OVERRIDES = "fields to change, such as train.steps=500 model.pattern.moe.num_experts=16"


def add_preset(parser: argparse.ArgumentParser) -> None:
    """PRESET|FILE [key=value ...]"""
    parser.add_argument(
        "preset", help="a preset (see `ssmoe presets`), a .toml or .json file, or a run folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)


def add_run_folder_rules(parser: argparse.ArgumentParser) -> None:
    """--resume and --overwrite"""
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing run")


def add_model(parser: argparse.ArgumentParser) -> None:
    """RUN, --device, --backend, --precision"""
    parser.add_argument("run", help="a run folder or a checkpoint folder")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, --backend, --precision"""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--backend", default="auto", help="kernels: auto or a name of `ssmoe doctor`")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="compute dtype"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json"""
    parser.add_argument("--json", action="store_true", help="print JSON")


def split_presets(words: list[str]) -> tuple[list[str], list[str]]:
    """Presets and overrides, told apart by the equals sign."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def read_run_config(name: str, overrides: list[str]) -> tuple[RunConfig, Path | None]:
    """The configuration, and the folder if `name` is a run folder; a preset's name is always the preset."""
    folder = Path(name)
    if name not in preset_names() and (folder / "config.json").is_file():
        return load_run(str(folder / "config.json"), overrides), folder
    if name not in preset_names() and folder.suffix not in {".toml", ".json"} and "/" in name:
        what = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{name} is not a run folder: {what}; `ssmoe presets` lists presets")
    return load_run(name, overrides), None


def load_model(arguments: argparse.Namespace) -> Any:
    """The model and tokenizer that `add_model`'s arguments name."""
    import torch

    from ssmoe.training.checkpoint import load

    return load(
        arguments.run,
        backend=arguments.backend,
        device=arguments.device,
        dtype=torch.bfloat16 if arguments.precision == "bfloat16" else None,
    )


def check_output(path: str, option: str = "") -> None:
    """Raise, before any work, for a file that cannot be written: `option` is what named it, with a space."""
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{option}{path}: its folder does not exist; make it first")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{option}{path} is a folder: name a file in it")


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))
