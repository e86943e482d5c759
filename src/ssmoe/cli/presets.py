"""`ssmoe presets`: what is shipped, and what each model costs."""

import argparse
from typing import Any

from ssmoe.cli.arguments import add_json, print_json
from ssmoe.config.count import count_parameters, state_bytes, training_flops
from ssmoe.config.load import preset, preset_names

HELP = "list the presets with parameters, FLOPs and state size"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json"""
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    rows = [_row(name) for name in preset_names()]
    if arguments.json:
        print_json(rows)
    else:
        _print(rows)
    return 0


def _row(name: str) -> dict[str, Any]:
    config = preset(name)
    count = count_parameters(config.model)
    return {
        "name": name,
        "total": count.total,
        "non_embedding": count.non_embedding,
        "active": count.active,
        "training_flops_per_token": training_flops(config.model, config.data.context),
        "state_bytes": state_bytes(config.model, config.data.context),
        "context": config.data.context,
        "description": config.description,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    titles = ("preset", "total", "non-embedding", "active", "FLOPs/token", "state KiB")
    print(f"{titles[0]:<30}{''.join(f'{title:>15}' for title in titles[1:])}  description")
    for row in rows:
        cells = (
            f"{row['total'] / 1e6:.1f}M",
            f"{row['non_embedding'] / 1e6:.1f}M",
            f"{row['active'] / 1e6:.1f}M",
            f"{row['training_flops_per_token']:.3g}",
            f"{row['state_bytes'] / 1024:,.0f}",
        )
        print(f"{row['name']:<30}{''.join(f'{cell:>15}' for cell in cells)}  {row['description']}")
    print()
    print(
        "total: every parameter; non-embedding: without embedding and head; active: of those, for one token."
    )
    print(
        "FLOPs: training, forward and backward, head included; state: one sequence at the preset's context."
    )
