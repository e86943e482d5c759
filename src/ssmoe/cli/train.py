"""`ssmoe train`: a preset or file into a run folder."""

import argparse

from ssmoe.cli.arguments import add_preset, add_run_folder_rules, read_run_config

HELP = "train a preset or a file into a run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PRESET|FILE [key=value ...] [--out FOLDER] [--resume | --overwrite]"""
    add_preset(parser)
    parser.add_argument("--out", help="the run folder (default: runs/NAME)")
    add_run_folder_rules(parser)


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
