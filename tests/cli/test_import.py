import shutil

from ssmoe.cli.main import main
from ssmoe.training.checkpoint import find_weights
from tests.interop.test_checkpoint import official


def test_import_needs_a_tokenizer(fails, tmp_path, trained):
    official(tmp_path / "a")
    fails("import", tmp_path / "a", tmp_path / "out", says=("name one with --tokenizer",))
    fails("import", tmp_path / "nowhere", tmp_path / "out", says=("no such folder",))
    bytes_ = find_weights(trained)
    says = ("257 tokens and the model 64",)
    fails("import", tmp_path / "a", tmp_path / "out", "--tokenizer", bytes_, says=says)
    assert not (tmp_path / "out").exists()


def test_an_imported_model_generates(tmp_path, trained, capsys):
    official(tmp_path / "a", vocab_size=257, rows=264)
    shutil.copy(find_weights(trained) / "tokenizer.json", tmp_path / "a")
    assert main(["import", str(tmp_path / "a"), str(tmp_path / "out")]) == 0
    assert "parameters in 2 layers" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "out"), "--prompt", "a", "--max-new-tokens", "3"]) == 0
