"""`ssmoe train`: a preset or file into a run folder."""

import argparse
from textwrap import fill, indent

from ssmoe.cli.arguments import add_preset, add_run_folder_rules, read_run_config
from ssmoe.config.keys import Key, all_keys

HELP = "train a preset or a file into a run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PRESET|FILE [key=value ...] [--out FOLDER] [--resume | --overwrite]"""
    add_preset(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(["keys and their defaults, which presets change:", *map(_describe, all_keys())])
    parser.add_argument("--out", help="the run folder (default: runs/NAME)")
    add_run_folder_rules(parser)


def _describe(key: Key) -> str:
    shown = f"  {key.name}" if key.default is None else f"  {key.name}={key.default}"
    return f"{shown}\n{indent(fill(key.description, 100), ' ' * 6)}" if key.description else shown


def run(arguments: argparse.Namespace) -> int:
    """Train; 0 when finished, 1 after Ctrl-C."""
    config, folder = read_run_config(arguments.preset, arguments.overrides)

    from rich.console import Console

    from ssmoe.api import train

    train(
        config,
        arguments.out or folder,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        console=Console(),
    )
    return 0
