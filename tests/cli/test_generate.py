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
