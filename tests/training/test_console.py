import io

from rich.console import Console
from rich.progress import Progress

from ssmoe.training.console import BarReporter, PlainReporter, Silent, open_reporter

STEP = {"step": 1, "mode": "train", "lm_loss": 2.5, "tokens_per_second": 1000.0, "seconds": 3.0}
EVALUATION = {"step": 1, "mode": "eval", "held_out_loss": 2.25, "held_out_bits_per_byte": 3.125}


def test_plain_lines_where_nobody_watches():
    out = io.StringIO()
    with open_reporter(Console(file=out, width=40), steps=4) as reporter:
        assert isinstance(reporter, PlainReporter)
        reporter.message("a path[bold] stays")
        for step in (1, 2, 3, 4):
            reporter.record({**STEP, "step": step})
        reporter.record(EVALUATION)
    lines = out.getvalue().splitlines()
    assert lines[0] == "a path[bold] stays"
    assert lines[1] == "step      1/4  loss 2.5000  1,000 tokens/s  9 s left"
    # the second and third came too soon after the first; the last is always shown
    assert [line.split("/")[0] for line in lines[1:3]] == ["step      1", "step      4"]
    assert lines[3] == "step      1  held-out loss 2.2500  3.125 bits/byte"
    assert len(lines) == 4


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    with open_reporter(Console(file=out, force_terminal=True, width=120), steps=2) as reporter:
        assert isinstance(reporter, BarReporter)
        reporter.record({**STEP, "step": 2})
        reporter.record(EVALUATION)
    shown = out.getvalue()
    assert "loss 2.5000" in shown
    assert "1,000 tokens/s" in shown
    assert "held-out loss 2.2500" in shown


def test_the_steps_before_a_resumed_one_are_no_speed():
    console = Console(file=io.StringIO(), force_terminal=True)
    with Progress(console=console) as progress:
        reporter = BarReporter(console, progress, progress.add_task("train", total=40))
        reporter.record({**STEP, "step": 21})
        assert (progress.tasks[0].completed, progress.tasks[0].speed) == (21, None)
        reporter.record({**STEP, "step": 22})
        assert progress.tasks[0].completed == 22


def test_a_quiet_console_gets_nothing_and_takes_over_nothing(capsys):
    with open_reporter(Console(quiet=True, force_terminal=True), steps=2) as reporter:
        assert isinstance(reporter, Silent)
        print("the caller's own line")
    assert capsys.readouterr().out == "the caller's own line\n"
