import json

import pytest

from ssmoe.cli.main import main


def generate(trained, capsys, *argv: object) -> dict:
    options = ["--json", "--seed", "4", *(str(word) for word in argv)]
    assert main(["generate", str(trained), *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_state_out_then_state_in_is_one_uninterrupted_call(trained, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    whole = generate(trained, capsys, "--prompt", "state", "--max-new-tokens", 20)
    first = generate(trained, capsys, "--prompt", "state", "--max-new-tokens", 8, "--state-out", path)
    rest = generate(trained, capsys, "--max-new-tokens", 12, "--state-in", path)
    assert first["tokens"] + rest["tokens"] == whole["tokens"]


def test_a_saved_text_is_continued(trained, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    assert main(["state", "save", str(trained), str(path), "--text", "state"]) == 0
    assert "after 6 tokens" in capsys.readouterr().out
    whole = generate(trained, capsys, "--prompt", "state", "--max-new-tokens", 9, "--temperature", 0)
    found = generate(trained, capsys, "--state-in", path, "--max-new-tokens", 9, "--temperature", 0)
    assert found["tokens"] == whole["tokens"]
    (tmp_path / "text").write_text("state")
    assert main(["state", "save", str(trained), str(tmp_path / "b"), "--file", str(tmp_path / "text")]) == 0
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_inspect(trained, tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    main(["state", "save", str(trained), str(path), "--text", "state"])
    capsys.readouterr()
    assert main(["state", "inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "1 row(s) after 5 tokens" in shown
    assert "layers.0.ssm" in shown
    assert main(["state", "inspect", str(path), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["tokens"] == [5]
    assert found["shapes"]["layers.0.ssm"] == [1, 32, 4]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("save", "RUN"), "takes a run and a file"),
        (("save", "RUN", "OUT"), "either --text or --file"),
        (("save", "RUN", "OUT", "--text", ""), "the text is empty"),
        (("save", "RUN", "nowhere/a", "--text", "a"), "its folder does not exist"),
        (("inspect", "nowhere"), "no such state file: nowhere"),
        (("inspect", "OUT"), "damaged or no state file"),
    ],
)
def test_bad_requests(fails, trained, tmp_path, argv, says):
    out = tmp_path / "out"
    out.write_text("nothing")
    fails("state", *({"RUN": trained, "OUT": out}.get(word, word) for word in argv), says=(says,))


def test_generate_refuses_what_is_no_state(fails, trained, tmp_path):
    fails("generate", trained, "--state-in", tmp_path / "no", says=("no such state file",))
    out = tmp_path / "no" / "a"
    fails("generate", trained, "--prompt", "a", "--state-out", out, says=("folder does not exist",))
