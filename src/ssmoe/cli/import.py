"""`ssmoe import`: weights of other libraries into a checkpoint folder."""

import argparse
from pathlib import Path

HELP = "read a Mamba checkpoint of mamba-ssm or transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH OUT [--tokenizer FILE] [--end-token TOKEN]"""
    parser.add_argument("path", help="a folder with config.json and .safetensors or pytorch_model.bin files")
    parser.add_argument("out", help="the checkpoint folder to write")
    parser.add_argument("--tokenizer", help="a tokenizer.json or its folder (default: the one in PATH)")
    parser.add_argument("--end-token", help="the token that separates documents (default: its eos_token)")


def run(arguments: argparse.Namespace) -> int:
    """Import; prints what was written."""
    if arguments.tokenizer is None and not (Path(arguments.path) / "tokenizer.json").is_file():
        if not Path(arguments.path).is_dir():
            raise FileNotFoundError(f"no such folder: {arguments.path}; give that of a downloaded checkpoint")
        raise FileNotFoundError(f"{arguments.path} has no tokenizer.json: name one with --tokenizer")

    from ssmoe.config.count import count_parameters
    from ssmoe.data.tokenizer import load_tokenizer
    from ssmoe.interop.checkpoint import import_checkpoint

    tokenizer = load_tokenizer(arguments.tokenizer or arguments.path, arguments.end_token)
    model = import_checkpoint(arguments.path, arguments.out, tokenizer)
    total = count_parameters(model.config).total
    print(f"{arguments.out}: {total:,} parameters in {len(model.config.layers)} layers; try")
    print(f'ssmoe generate {arguments.out} --prompt "Once upon a time"')
    return 0
