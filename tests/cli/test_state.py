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


def test_saved_texts_are_mixed_and_found_if_asked_for(fails, trained, tmp_path, capsys):
    folder = tmp_path / "library"
    folder.mkdir()
    paths = [str(folder / f"{text}.safetensors") for text in ("state", "other")]
    for path, text in zip(paths, ("state", "other"), strict=True):
        assert main(["state", "save", str(trained), path, "--text", text, "--mixable"]) == 0
    assert "in 6 tokens, to be mixed or found" in capsys.readouterr().out
    out = str(tmp_path / "mixed")
    assert main(["state", "mix", str(trained), out, *paths]) == 0
    assert "mean of 2 states, 12 tokens in all" in capsys.readouterr().out
    generate(trained, capsys, "--state-in", out, "--prompt", "a", "--max-new-tokens", 2)
    assert main(["state", "retrieve", str(trained), str(folder), "--text", "other", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {"name": "other", "similarity": pytest.approx(1)}
    main(["state", "save", str(trained), paths[0], "--text", "state"])
    fails("state", "mix", trained, out, *paths, says=("without steps", "--mixable or --task"))


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


def test_inspect_draws_the_states_of_one_model(fails, trained, tmp_path, capsys):
    paths = [tmp_path / f"{text}.safetensors" for text in ("state", "other")]
    for path in paths:
        main(["state", "save", str(trained), str(path), "--text", path.stem])
    picture = tmp_path / "states.png"
    assert main(["state", "inspect", *map(str, paths), "--plot", str(picture)]) == 0
    assert f"picture: {picture}" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    fails("state", "inspect", paths[0], "--plot", tmp_path / "a.svg", says=("ends in .png",))
    fails("state", "inspect", paths[0], "--plot", tmp_path / "no" / "a.png", says=("folder does not exist",))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("save", "RUN"), "takes a run and a file"),
        (("save", "RUN", "OUT"), "one of --text, --file or --task"),
        (("save", "RUN", "OUT", "--text", ""), "the text is empty"),
        (("save", "RUN", "nowhere/a", "--text", "a"), "its folder does not exist"),
        (("save", "RUN", "OUT", "--task", "nowhere"), "no such task file"),
        (("mix", "RUN", "OUT", "OUT"), "at least two states"),
        (("retrieve", "RUN", "nowhere", "--text", "a"), "no such library folder"),
        (("mix", "RUN", "OUT", "OUT", "OUT", "--text", "a"), "--text is for save and retrieve"),
        (("save", "RUN", "OUT", "--text", "a", "--method", "decay"), "--method is for mix: leave it away"),
        (("save", "RUN", "OUT", "--text", "a", "--shots", "3"), "--shots chooses examples of --task"),
        (("save", "RUN", "OUT", "--text", "a", "--json"), "--json is for inspect and retrieve"),
        (("save", "RUN", ".", "--text", "a"), ". is a folder: name a file in it"),
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


def test_a_library_of_tasks_is_searched_and_mixed(fails, trained, tmp_path, capsys):
    library = tmp_path / "library"
    library.mkdir()
    for name, answer in (("up", "UP"), ("down", "down")):
        pairs = [{"input": f"{name}{i}", "output": answer * (i % 3 + 1)} for i in range(9)]
        (tmp_path / f"{name}.json").write_text(json.dumps(pairs))
        out, task = library / f"{name}.safetensors", tmp_path / f"{name}.json"
        assert main(["state", "save", str(trained), str(out), "--task", str(task), "--shots", "5"]) == 0
    fails("state", "save", trained, out, "--task", task, says=("--shots 32: the task has 1 to 7",))
    query = ["state", "retrieve", str(trained), str(library), "--task", str(task), "--shots", "5", "--json"]
    assert main(query) == 0
    [first, second] = json.loads(capsys.readouterr().out)
    assert first["name"] == "down"
    assert first["similarity"] == pytest.approx(1)
    assert second["similarity"] < 1
    assert main([*query, "--centre", "--layers", "0"]) == 0
    [first, second] = json.loads(capsys.readouterr().out)
    assert (first["name"], first["similarity"]) == ("down", pytest.approx(1))
    assert second["similarity"] == pytest.approx(-1)  # two states lie on opposite sides of their mean
    sources = [str(library / f"{name}.safetensors") for name in ("up", "down")]
    for method in ("mean", "decay"):
        out = tmp_path / method
        assert main(["state", "mix", str(trained), str(out), *sources, "--method", method]) == 0
        assert "186 tokens in all" in capsys.readouterr().out
        generate(trained, capsys, "--state-in", out, "--prompt", "Q: up9", "--max-new-tokens", 2)
    fails("state", "mix", trained, out, *sources, "--method", "stir", says=("'stir' is not one of",))
