import subprocess
import sys

import pytest

import ssmoe
from ssmoe.cli import main as module
from ssmoe.cli.main import COMMANDS, main

PROGRAM = "import sys; from ssmoe.cli.main import main; sys.exit(main(sys.argv[1:]))"


def test_the_overview_lists_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in COMMANDS)
    assert main([]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_without_torch(command):
    code = (
        "import sys; from ssmoe.cli.main import main\n"
        f"try: main([{command!r}, '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: ssmoe {command}")


def test_the_overview_and_the_presets_load_no_torch():
    for command in ("--help", "--version", "presets"):
        code = (
            "import sys; from ssmoe.cli.main import main\n"
            f"main([{command!r}]); sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


TORCH_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 2048 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (RuntimeError(TORCH_SAYS), " (asked for 2048 bytes)"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
            " (asked for 20.00 GiB)",
        ),
        (MemoryError(), ""),
    ],
)
def test_too_little_memory_is_told_with_remedies(error, asked, monkeypatch, fails):
    def broken():
        raise error

    monkeypatch.setattr("ssmoe.cli.presets.preset_names", broken)
    fails("presets", says=(f"not enough memory{asked}: take fewer rows", "train.micro_batch_size"))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == ssmoe.__version__


def test_python_dash_m_is_the_command_line():
    command = [sys.executable, "-m", "ssmoe", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ssmoe.__version__


def test_wrong_usage_is_one_line_and_2(fails):
    fails("tarin", says=("unknown command 'tarin'; did you mean train?", "train, compare"), code=2)
    fails("train", says=("preset", "ssmoe train --help"), code=2)
    fails("train", "demo", "--frobnicate", says=("--frobnicate", "ssmoe train --help"), code=2)
    fails("generate", "runs/x", says=("--prompt",), code=2)
    fails("generate", "x", "--prompt", "a", "--seed", "many", says=("invalid int value: 'many'",), code=2)
    fails("generate", "x", "--prompt", "a", "--precision", "half", says=("invalid choice",), code=2)


def test_mistakes_are_one_line_and_bugs_are_not_hidden(monkeypatch, fails):
    class Command:
        HELP = "x"
        error: BaseException = ValueError("two\n  lines")

        @staticmethod
        def add_arguments(parser):
            pass

        @staticmethod
        def run(arguments):
            raise Command.error

    monkeypatch.setattr(module, "_module", lambda name: Command)
    fails("train", says=("ssmoe: two lines",))
    Command.error = KeyboardInterrupt()
    fails("train", says=("ssmoe: interrupted",))
    Command.error = RuntimeError()
    fails("train", says=("ssmoe: RuntimeError",))
    Command.error = AssertionError("ours")
    with pytest.raises(AssertionError, match="ours"):
        main(["train"])


def test_a_reader_that_has_gone_is_no_complaint():
    done = subprocess.run(
        f"{sys.executable} -c '{PROGRAM}' presets --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
