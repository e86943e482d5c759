import json
import shutil

import pytest
import safetensors.torch

from ssmoe.cli.main import main
from ssmoe.training.checkpoint import find_weights


def test_the_text_is_the_prompt_and_its_continuation(trained, capsys):
    argv = ["generate", str(trained), "--prompt", "state", "--max-new-tokens", "12", "--seed", "3"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reason"] == "length"
    assert len(found["tokens"]) == 12
    assert main(argv) == 0
    assert capsys.readouterr().out == f"state{found['text']}\n"


def test_every_folder_of_a_run_will_do_and_so_will_the_weights_alone(trained, tmp_path, capsys):
    shutil.copytree(find_weights(trained), tmp_path / "alone")
    shown = set()
    for folder in (trained, find_weights(trained).parent, find_weights(trained), tmp_path / "alone"):
        assert main(["generate", str(folder), "--prompt", "a", "--max-new-tokens", "5"]) == 0
        shown.add(capsys.readouterr().out)
    assert len(shown) == 1


def generated(capsys, *argv: object):
    assert main(["generate", *(str(word) for word in argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_several_continuations_are_those_of_following_seeds(trained, capsys):
    common = (trained, "--prompt", "state", "--max-new-tokens", 8)
    together = generated(capsys, *common, "-n", 3, "--seed", 5)
    assert together == [generated(capsys, *common, "--seed", 5 + i) for i in range(3)]
    assert main(["generate", *map(str, common), "-n", "2", "--seed", "5"]) == 0
    shown = capsys.readouterr().out
    assert shown == "".join(f"-- {i + 1}\nstate{together[i]['text']}\n" for i in range(2))


def test_beams_find_a_likelier_text_than_greed(trained, capsys):
    common = (trained, "--prompt", "state", "--max-new-tokens", 6)
    [greedy] = generated(capsys, *common, "--beams", 1)
    assert greedy["tokens"] == generated(capsys, *common, "--temperature", 0)["tokens"]
    found = generated(capsys, *common, "--beams", 6, "-n", 3)
    assert len(found) == 3
    assert found[0]["score"] >= max(greedy["score"], found[1]["score"])
    assert main(["generate", *map(str, common), "--beams", "6"]) == 0
    assert capsys.readouterr().out == f"state{found[0]['text']}\n"


def test_a_store_changes_nothing_but_the_work(trained, tmp_path, capsys):
    common = (trained, "--prompt", "import this as a long prompt", "--max-new-tokens", 8)
    plain = generated(capsys, *common)
    store = ("--store", tmp_path / "store", "--store-every", 8)
    assert [generated(capsys, *common, *store) for _ in range(2)] == [plain, plain]
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 3


def test_bfloat16(trained, capsys):
    argv = ["generate", str(trained), "--prompt", "a", "--max-new-tokens", "5", "--precision", "bfloat16"]
    assert main([*argv, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompt", ""), "the prompt is empty: give some text"),
        (("--prompt", "a", "--temperature", "-1"), "temperature=-1.0"),
        (("--prompt", "a", "--top-k", "0"), "top_k=0"),
        (("--prompt", "a", "--top-p", "1.5"), "top_p=1.5"),
        (("--prompt", "a", "--max-new-tokens", "0"), "max_new_tokens=0"),
        (("--prompt", "a", "-n", "0"), "n=0: ask for at least 1"),
        (("--prompt", "a", "-n", "2", "--state-out", "b"), "leave --state-out away"),
        (("--prompt", "a", "--beams", "2", "-n", "3"), "beams=2, n=3"),
        (("--prompt", "a", "--beams", "2", "--top-k", "3"), "leave --top-k away"),
        (("--prompt", "a", "--beams", "2", "--temperature", "0.5"), "leave --temperature away"),
        (("--prompt", "a", "--beams", "2", "--seed", "3"), "leave --seed away"),
        (("--prompt", "a", "--store-every", "8"), "--store-every belongs to --store FOLDER"),
        (("--prompt", "a", "--store", "no", "--store-mb", "0"), "--store-mb 0: give at least 1"),
        (("--prompt", "a", "--state-out", "."), "--state-out . is a folder: name a file"),
        (("--prompt", "a", "--store", "no", "--state-in", "b"), "leave --state-in away"),
        (("--prompt", "a", "--stop", ""), "stop string is empty"),
        (("--prompt", "a", "--backend", "abacus"), "backend='abacus'"),
        (("--prompt", "a", "--device", "abacus"), "device='abacus'"),
    ],
)
def test_bad_requests(fails, trained, options, says, capsys):
    fails("generate", trained, *options, says=(says,))


def test_a_bad_request_shows_no_prompt(trained, capsys):
    main(["generate", str(trained), "--prompt", "abc", "--top-k", "0"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["missing", "shape", "cut", "config", "no-config", "no-tokenizer"])
def test_a_checkpoint_that_does_not_fit(fails, trained, tmp_path, damage):
    shutil.copytree(find_weights(trained), tmp_path / "w")
    path, config = tmp_path / "w" / "model.safetensors", tmp_path / "w" / "config.json"
    tensors = safetensors.torch.load_file(path)
    match damage:
        case "missing":
            del tensors["layers.0.layer.ssm.D"]
            says = "layers.0.layer.ssm.D is missing"
        case "shape":
            config.write_text(config.read_text().replace('"num_experts": 4', '"num_experts": 5'))
            says = "has shape (4, 16, 16) instead of (5, 16, 16)"
        case "cut":
            says = "is damaged"
        case "config":
            config.write_text(config.read_text()[:-20])
            says = "is not a model configuration"
        case "no-config":
            config.unlink()
            says = "has no config.json"
        case _:
            (tmp_path / "w" / "tokenizer.json").unlink()
            says = "tokenizer.json cannot be read"
    safetensors.torch.save_file(tensors, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    fails("generate", tmp_path / "w", "--prompt", "a", says=(says,))
    fails("eval", tmp_path / "w", "--data", tmp_path, says=(says,))


def test_not_a_run(fails, tmp_path):
    fails("generate", tmp_path / "nowhere", "--prompt", "a", says=("no such folder", "give a run folder"))
    fails("generate", tmp_path, "--prompt", "a", says=("holds no checkpoint",))
