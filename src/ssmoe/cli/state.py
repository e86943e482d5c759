"""`ssmoe state`: recurrent states as files."""

import argparse
from pathlib import Path
from typing import Any

from ssmoe.cli.arguments import add_device, add_json, load_model, print_json

HELP = "save and inspect recurrent states as files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """save RUN FILE (--text TEXT | --file PATH) | inspect FILE ..."""
    parser.add_argument("action", choices=("save", "inspect"))
    parser.add_argument("paths", nargs="+", metavar="PATH", help="save: RUN FILE; inspect: state files")
    parser.add_argument("--text", help="save: the text to read")
    parser.add_argument("--file", help="save: read the text of this file")
    add_device(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Do one of them."""
    match arguments.action:
        case "save":
            return _save(arguments)
        case _:
            return _inspect(arguments)


def _save(arguments: argparse.Namespace) -> int:
    if len(arguments.paths) != 2:
        raise ValueError("ssmoe state save takes a run and a file: ssmoe state save RUN FILE --text TEXT")
    if (arguments.text is None) == (arguments.file is None):
        raise ValueError("give the text to read: either --text or --file")
    text = arguments.text if arguments.file is None else Path(arguments.file).read_text(encoding="utf-8")
    if not text:
        raise ValueError("the text is empty: give some to read")
    arguments.run, out = arguments.paths
    if not Path(out).absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: its folder does not exist; make it first")
    model, tokenizer = load_model(arguments)

    from ssmoe.generation import continuation
    from ssmoe.generation.engine import read

    found = read(model, [[tokenizer.end_id, *tokenizer.encode(text)]])
    continuation.save(found, out, model=model, tokenizer=tokenizer)
    print(f"{out}: the state after {found.tokens[0] + 1} tokens; go on with")
    print(f"ssmoe generate {arguments.run} --state-in {out}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from ssmoe.model import state_file

    found: list[dict[str, Any]] = []
    for path in arguments.paths:
        header, tensors = state_file.read(path)
        norms = {name: tensor.double().square().sum().sqrt().item() for name, tensor in tensors.items()}
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        found.append({"path": path, **header._asdict(), "norms": norms, "shapes": shapes})
    if arguments.json:
        print_json(found)
        return 0
    for one in found:
        print(f"{one['path']}: {len(one['tokens'])} row(s) after {', '.join(map(str, one['tokens']))} tokens")
        print(f"  model {one['model']}  tokenizer {one['tokenizer'] or 'not recorded'}  {one['dtype']}")
        if one["note"]:
            print(f"  {one['note']}")
        for name, norm in one["norms"].items():
            print(f"  {name:<28}{'x'.join(map(str, one['shapes'][name])):>20}   norm {norm:.4g}")
    return 0
