"""What the README, the Makefile and CI promise exists."""

import re
import shlex
from pathlib import Path

import ssmoe
from ssmoe.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_every_command_of_the_readme_is_one() -> None:
    named = {line.split()[1] for line in README.splitlines() if line.startswith("ssmoe ")}
    assert named
    assert named <= set(COMMANDS)


def test_every_preset_and_field_of_the_readme_is_one() -> None:
    for line in README.splitlines():
        if not line.startswith(("ssmoe train", "ssmoe compare")):
            continue
        words = [word for word in shlex.split(line, comments=True)[2:] if not word.startswith("-")]
        overrides = [word for word in words if "=" in word]
        for name in words:
            if "=" not in name and not name.startswith("runs/"):
                ssmoe.preset(name, overrides)


def test_the_makefile_has_the_targets() -> None:
    targets = set(re.findall(r"^(\w+):", MAKEFILE, flags=re.MULTILINE))
    assert {"demo", "test", "check", "compare", "clean"} <= targets


def test_ci_runs_the_readmes_test_command() -> None:
    assert "\nmake test\n" in README
    assert (ROOT / ".ci" / "run").read_text().endswith("\nmake test\n")


def test_every_public_name_of_the_readme_is_one() -> None:
    names = set(re.findall(r"\bssmoe\.(\w+)", README))
    assert names <= set(ssmoe.__all__)


def test_every_link_of_the_documents_leads_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_map_names_files_that_exist() -> None:
    """`a/b.py` in docs/map.md is a file under src/ssmoe; a bare name follows the folder named before it."""
    text = (ROOT / "docs" / "map.md").read_text()
    paths = re.findall(r"`([a-z_]+/[\w/]*\.py)`", text)
    assert len(paths) > 15
    missing = [
        path for path in paths if not (ROOT / "src" / "ssmoe" / path).is_file() and "tests/" not in path
    ]
    assert missing == []
