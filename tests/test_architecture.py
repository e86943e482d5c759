"""The import rule, the size of files, and the mirror of tests, read from the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ssmoe"
TESTS = ROOT / "tests"

# what a folder may import besides itself
ALLOWED = {
    "config": set(),
    "data": {"config"},
    "ops": set(),
    "model": {"config", "ops"},
    "training": {"config", "data", "model", "ops"},
    "generation": {"config", "data.tokenizer", "model", "ops"},
    "eval": {"config", "data", "model", "generation", "ops"},
    "scaling": {"config"},
    "interop": {"config", "data", "model"},
    "soup": {"config", "data.tokenizer", "model", "generation", "ops"},
    "check": {"config", "data", "ops", "model", "generation"},
}
ROOTS = {"cli", "api", "__init__", "__main__"}
"""The composition roots, which may import anything."""

ONLY_IN = {"triton": "ops/triton", "fastapi": "serve", "transformers": "interop", "lm_eval": "eval"}
NO_TORCH = ("config", "data", "scaling")
DEFERRED_IN = {"cli", "ops/__init__.py", "__init__.py", "training/report.py", "scaling/plots.py"}
"""Where an import inside a function is allowed: roots, the backend loader, the optional matplotlib."""

MAX_LINES = 400


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imports(tree: ast.AST) -> list[str]:
    """Full dotted names of everything imported anywhere in a file, type-only imports included."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def violations(name: str, text: str) -> list[str]:
    """What breaks the rules in a file of this name with this text."""
    tree, folder = ast.parse(text), name.split("/")[0].removesuffix(".py")
    found: list[str] = []
    for imported in imports(tree):
        top, *rest = imported.split(".")
        if top == "ssmoe" and folder not in ROOTS and rest:
            inside = rest[0] == folder
            allowed = any(".".join(rest).startswith(f"{a}.") or ".".join(rest) == a for a in ALLOWED[folder])
            if not inside and not allowed:
                found.append(f"{name} imports {imported}")
        if top == "torch" and folder in NO_TORCH:
            found.append(f"{name} imports torch")
        if top in ONLY_IN and not name.startswith(ONLY_IN[top]):
            found.append(f"{name} imports {top}")
    if len(text.splitlines()) > MAX_LINES and not name.startswith("ops/triton"):
        found.append(f"{name} has more than {MAX_LINES} lines")
    if not any(name.startswith(place) for place in DEFERRED_IN):
        found += [
            f"{name} imports inside {function.name}"
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef)
            and any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(function))
        ]
    return found


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_rules_hold(path: Path) -> None:
    assert violations(name_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config/x.py", "import torch"),
        ("config/x.py", "from torch.nn import Linear"),
        ("data/x.py", "from ssmoe.model.lm import LM"),
        ("ops/x.py", "from ssmoe.config.model import ModelConfig"),
        ("model/x.py", "def f():\n    from ssmoe.training.loop import train"),
        (
            "model/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ssmoe.data import loader",
        ),
        ("training/x.py", "from ssmoe.eval.perplexity import evaluate"),
        ("generation/x.py", "from ssmoe.data.loader import batches"),
        ("ops/reference/x.py", "import triton"),
        ("training/x.py", "import transformers"),
        ("eval/x.py", "\n" * 401),
        ("model/x.py", "def f():\n    import json"),
    ],
)
def test_planted_faults_are_caught(name: str, text: str) -> None:
    assert len(violations(name, text)) >= 1


def test_every_folder_is_in_the_rule() -> None:
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(ALLOWED) | ROOTS


def test_every_test_stands_for_a_source() -> None:
    names = {(name_of(p).split("/")[0], p.stem) for p in sources()} | {
        ("", p.stem) for p in SOURCE.glob("*.py")
    }
    names |= {(folder, folder) for folder, _ in names}
    # tests about a whole: of ops' loader, of the import rule, of the package's root, of the tools around it
    names |= {("ops", "backend"), ("", "architecture"), ("", "package"), ("", "setup")}
    names |= {("", "headline"), ("", "headline_speed")}
    orphans: list[str] = []
    for path in TESTS.rglob("test_*.py"):
        place = path.relative_to(TESTS)
        folder = place.parts[0] if len(place.parts) > 1 else ""
        stem = path.stem.removeprefix("test_")
        backend = folder == "ops" and stem.split("_")[0] in {"cpu", "triton"}
        if (folder, stem) not in names and not backend:
            orphans.append(str(place))
    assert orphans == []


def test_no_empty_rooms() -> None:
    empty = [
        path.parent
        for path in SOURCE.rglob("__init__.py")
        if not path.read_text().strip() and len(list(path.parent.iterdir())) == 1
    ]
    assert empty == []
