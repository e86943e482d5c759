"""`ssmoe doctor`: versions, devices, backends, and a numerical self-check."""

import argparse
from math import isfinite

from ssmoe.cli.arguments import add_json, print_json

HELP = "versions, devices and kernels of this machine, with a numerical self-check"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json"""
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis; 1 when a check fails."""
    from ssmoe.check.doctor import diagnose

    found = diagnose()
    if arguments.json:
        checks = [
            {
                **check._asdict(),
                "error": check.error if isfinite(check.error) else None,
                "passed": check.passed,
            }
            for check in found.checks
        ]
        print_json({**found._asdict(), "checks": checks, "healthy": found.healthy})
        return 0 if found.healthy else 1
    print("versions  " + "  ".join(f"{name} {number}" for name, number in found.versions.items()))
    for device in found.devices:
        print(f"device    {device}")
    print(f"threads   {found.threads}")
    for device, backend in found.backends.items():
        print(f"backend   {device}: auto is {backend}")
    for check in found.checks:
        verdict = "ok" if check.passed else "FAILED"
        print(f"check     {check.backend} {check.op}: {verdict} (largest relative error {check.error:.1e})")
    print("healthy" if found.healthy else "NOT healthy: use another backend= and report the failed check")
    return 0 if found.healthy else 1
