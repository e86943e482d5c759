"""A trained run, and commands that must fail well."""

from pathlib import Path

import pytest

from ssmoe.api import train
from ssmoe.cli.main import main
from ssmoe.config.load import RunConfig, load_run
from tests.conftest import MODEL


@pytest.fixture(scope="session")
def trained(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test may change."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "tiny.toml"
    data = f'sources = "{text_folder}"\ntokenizer = "bytes"\ncontext = 32\nheld_out = 0.2\n'
    path.write_text(f'{MODEL}\n[data]\n{data}cache_dir = "{folder / "cache"}"\n')
    run: RunConfig = load_run(str(path))
    return train(run, folder / "run")


@pytest.fixture
def fails(capsys):
    """Runs a command that must exit with `code` and one line on stderr that holds all of `says`."""

    def check(*argv: object, says: tuple[str, ...], code: int = 1) -> None:
        capsys.readouterr()
        try:
            found = main([str(word) for word in argv])
        except SystemExit as stop:
            found = stop.code
        out, err = capsys.readouterr()
        assert found == code
        assert err.startswith("ssmoe")
        assert len(err.splitlines()) == 1, err
        for words in says:
            assert words in err
        assert "Traceback" not in out + err

    return check
