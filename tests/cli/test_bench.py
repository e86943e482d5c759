import json

import pytest

from ssmoe.cli.main import main


def test_a_line_for_each_timing(tiny_file, capsys):
    argv = ["bench", str(tiny_file), "--repeats", "1", "--decode-tokens", "2"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["context"]) == (2, 32)
    assert len(found["timings"]) == 5
    assert all(timing["seconds"] > 0 for timing in found["timings"])
    assert main([*argv, "--batch", "1", "--context", "4", "train.precision=bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("tiny: 1 rows of 4 tokens, bfloat16;")
    assert len(lines) == 6


@pytest.mark.parametrize("option", ["--batch", "--context", "--repeats", "--decode-tokens"])
def test_nothing_cannot_be_timed(fails, tiny_file, option):
    fails("bench", tiny_file, option, "0", says=("must be at least 1",))
