"""`ssmoe doctor`: versions, devices, backends, and a numerical self-check."""

import argparse
from math import isfinite
from typing import TYPE_CHECKING

from ssmoe.cli.arguments import add_json, print_json

if TYPE_CHECKING:
    from ssmoe.check.numerics import Check

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
    for backend in dict.fromkeys(check.backend for check in found.checks):
        _print_checks(backend, [check for check in found.checks if check.backend == backend])
    print("healthy" if found.healthy else "NOT healthy: use another backend= and report the failed check")
    return 0 if found.healthy else 1


def _print_checks(backend: str, checks: "list[Check]") -> None:
    """What failed, a line each; then how many passed and which of them came nearest to its limit."""
    for check in checks:
        if not check.passed:
            print(f"check     {backend} {check.op}: FAILED ({_measured(check)})")
    if passed := [check for check in checks if check.passed]:
        worst = max(passed, key=lambda check: check.error / check.tolerance)
        nearest = f"nearest its limit: {worst.op}, {_measured(worst)}"
        print(f"check     {backend}: {len(passed)} of {len(checks)} ops ok ({nearest})")


def _measured(check: "Check") -> str:
    return f"largest relative error {check.error:.1e}, allowed {check.tolerance:.0e}"
