"""The `ssmoe` command: a sub-command is a module of this folder, imported when asked for.

Each module has HELP, add_arguments(parser) and run(arguments) -> exit code: 0 done, 1 failed with one clear
line, 2 wrong usage.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import NoReturn

COMMANDS = (
    "train",
    "compare",
    "generate",
    "eval",
    "state",
    "router",
    "import",
    "plan",
    "fit",
    "presets",
    "bench",
    "doctor",
    "verify",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(_version())
        return 0
    if arguments[0] not in COMMANDS:
        near = get_close_matches(arguments[0], COMMANDS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        print(
            f"ssmoe: unknown command {arguments[0]!r}{meant}; one of: {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    command = _module(arguments[0])
    parser = _Parser(prog=f"ssmoe {arguments[0]}", description=command.HELP)
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_intermixed_args(arguments[1:]))
    except BrokenPipeError:
        # the reader has gone; keep the interpreter from complaining about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("ssmoe: interrupted", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError, MemoryError) as error:
        print(f"ssmoe: {_one_line(error)}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line here; argparse would print the whole synopsis before it."""

    def error(self, message: str) -> NoReturn:
        # parse_intermixed_args counts what may be left away among the missing
        optional = [action.metavar for action in self._actions if action.nargs == "*"]
        for name in optional:
            message = message.removesuffix(f", {name}")
        print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)


def _overview() -> str:
    lines = [f"  {name:<10} {_module(name).HELP}" for name in COMMANDS]
    return "\n".join(
        (
            "usage: ssmoe COMMAND ...",
            "",
            "Language models that join selective state spaces (Mamba) with mixtures of experts.",
            "",
            *lines,
            "",
            "`ssmoe COMMAND --help` explains one.",
        )
    )


def _module(name: str) -> ModuleType:
    return import_module(f"ssmoe.cli.{name}")


def _version() -> str:
    return import_module("ssmoe").__version__


_NO_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)
"""What torch says on a CPU and on a GPU."""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, MemoryError) and not _NO_MEMORY.search(text):
        return text
    asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
    return (
        f"not enough memory{f' (asked for {asked[1]})' if asked else ''}: take fewer rows at a time "
        "(train.micro_batch_size, --batch-size), shorter ones (data.context, --context) or a smaller model; "
        "train.recompute=true trains with less"
    )
