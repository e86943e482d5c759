"""The shared library itself: lower instruction levels, a wrong level, and the package without it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssmoe import ops
from ssmoe.ops.extension import PATH

ROOT = Path(__file__).parents[2]
built = pytest.mark.skipif(ops.missing("cpu") is not None, reason=str(ops.missing("cpu")))

IN_2_11 = """
STABLE_TORCH_LIBRARY STABLE_TORCH_LIBRARY_FRAGMENT STABLE_TORCH_LIBRARY_IMPL STD_TORCH_CHECK
TORCH_ABI_VERSION TORCH_BOX TORCH_ERROR_CODE_CHECK torch_call_dispatcher headeronly::DeviceType::CPU
headeronly::IntHeaderOnlyArrayRef headeronly::ScalarType stable::Device stable::Tensor stable::clone
stable::contiguous stable::copy_ stable::detail::from stable::detail::to stable::empty stable::from_blob
stable::get_num_threads stable::narrow stable::new_zeros stable::parallel_for stable::select stable::sum
stable::to
"""
"""What csrc/ names of torch, every one looked up in the headers of torch 2.11, the oldest it is built for."""

PARITY = """
import torch
from ssmoe import ops
from ssmoe.ops import cpu, reference
from tests.ops.test_cpu_causal_conv1d import drawn as conv
from tests.ops.test_cpu_expert_mlp import drawn as experts
from tests.ops.test_cpu_mamba_step import random_step as step
from tests.ops.test_cpu_selective_scan import drawn as scan
from tests.ops.parity import documents, judge
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    some = documents(2, 50)
    judge(lambda: scan(2, 50, 35, 18, dtype, True, some), reference.selective_scan, cpu.selective_scan, dtype)
    judge(lambda: scan(2, 1, 35, 16, dtype, True, None), reference.selective_scan, cpu.selective_scan, dtype)
    judge(lambda: conv(2, 50, 35, 4, dtype, True, some), reference.causal_conv1d, cpu.causal_conv1d, dtype)
    judge(lambda: conv(2, 50, 67, 4, dtype, True, None), reference.causal_conv1d, cpu.causal_conv1d, dtype)
    judge(lambda: experts(60, 24, 40, 5, 2, dtype, "silu", True), reference.expert_mlp, cpu.expert_mlp, dtype)
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    wide = torch.promote_types(dtype, torch.float32)
    for b in (1, 8):
        shape = (b, 33, 49, 16, 4, 3)
        judge(lambda: step(shape, dtype, wide, bias=True), reference.mamba_step, cpu.mamba_step, dtype)
print(cpu.describe()["level"])
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@built
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_a_lower_level_computes_the_same(level: str) -> None:
    found = python(PARITY, SSMOE_CPU_LEVEL=level)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip().lower() in {level, "avx2", "portable"}


@built
def test_an_unknown_level_is_refused() -> None:
    found = python("from ssmoe.ops import cpu; cpu.describe()", SSMOE_CPU_LEVEL="sse9")
    assert "SSMOE_CPU_LEVEL=sse9 is not one of: auto, portable, avx2, avx512, avx512bf16" in found.stderr


WITHOUT = """
from pathlib import Path
from ssmoe import ops
from ssmoe.ops import extension
extension.PATH = Path("absent.so")
assert ops.resolve("auto", "cpu") == "reference"
assert "were not built" in ops.missing("cpu")
assert ops.load("auto", "cpu").name == "reference"
try:
    ops.load("cpu")
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_the_library_auto_is_the_reference_and_says_why() -> None:
    found = python(WITHOUT)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("the CPU kernels were not built")


def test_a_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    code = "from pathlib import Path; from ssmoe.ops import extension as e; "
    code += "e.PATH = Path({!r}); print(e.missing())"
    assert python(code.format(str(broken))).stdout.startswith("the CPU kernels do not load")


def test_the_library_lies_in_the_package() -> None:
    assert PATH.parent.name == "cpu"


def test_the_sources_name_nothing_newer_than_torch_2_11() -> None:
    """CI has a newer torch. A name that fails here: look it up in the headers of 2.11, then list it."""
    text = "".join(re.sub(r"//.*", "", path.read_text()) for path in (ROOT / "csrc").iterdir())
    named = set(re.findall(r"\btorch::((?:stable|headeronly)(?:::\w+)+)", text))
    named |= set(re.findall(r"\b(?:(?:aoti_)?torch_\w+(?=\()|(?:[A-Z]+_)*TORCH_[A-Z_]+\b)", text))
    assert named == set(IN_2_11.split())


def build(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    command = ["setup.py", "-q", "build_ext", "--build-lib", str(out), "--build-temp", str(out / "temp")]
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def compiler(folder: Path, text: str) -> str:
    """A stand-in for a compiler: says `text` and fails, or with none writes its command."""
    path = folder / "compiler"
    made = 'all="$*"; while [ "$1" != -o ]; do shift; done; echo "$all" > "$2"'
    path.write_text(f"#!/bin/sh\necho '{text}' >&2\nexit 1\n" if text else f"#!/bin/sh\n{made}\n")
    path.chmod(0o755)
    return str(path)


def note(out: Path) -> str:
    """What doctor will say was the reason, where the library was to be."""
    path = out / "ssmoe/ops/cpu/_not_built.txt"
    return path.read_text() if path.exists() else ""


def test_a_build_without_a_compiler_succeeds_and_says_so(tmp_path: Path) -> None:
    done = build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "CPU kernels not built (no-such-compiler is not there: install g++" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
    assert note(tmp_path).startswith("no-such-compiler is not there")


def test_a_compilers_first_error_is_kept(tmp_path: Path) -> None:
    broken = compiler(tmp_path, "a.cpp: warning: odd\na.cpp:7: error: no such name\na.cpp:9: error: more")
    done = build(tmp_path, CC=broken, CXX=broken)
    assert done.returncode == 0, done.stderr
    assert note(tmp_path) == f"{broken} failed: a.cpp:7: error: no such name\n"


def test_a_build_that_works_clears_the_reason(tmp_path: Path) -> None:
    build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler")
    works = compiler(tmp_path, "")
    done = build(tmp_path, CC=works, CXX=works)
    assert done.returncode == 0, done.stderr
    assert note(tmp_path) == ""
    assert (tmp_path / "ssmoe/ops/cpu/_kernels.so").exists()
    build(
        tmp_path, CC="no-such-compiler", CXX="no-such-compiler"
    )  # and one that then fails leaves no old library
    assert not (tmp_path / "ssmoe/ops/cpu/_kernels.so").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the name is Linux's")
def test_the_library_shares_torchs_cpp_library(tmp_path: Path) -> None:
    works = compiler(tmp_path, "")
    build(tmp_path, CC=works, CXX=works)
    linked = (tmp_path / "ssmoe/ops/cpu/_kernels.so").read_text().split()
    assert linked.index("-ltorch_cpu") < linked.index("-l:libstdc++.so.6")


@built
def test_a_kernels_error_has_all_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"a product of \(2, 3\) and \(4, 5\)"):
        torch.ops.ssmoe.product(torch.zeros(2, 3), torch.zeros(4, 5), False)


def test_a_build_for_no_torch_says_what_to_install(tmp_path: Path) -> None:
    build(tmp_path, SSMOE_TORCH=str(tmp_path))
    assert note(tmp_path).startswith("torch 2.11 or newer was not installed")


def test_kernels_that_are_required_stop_the_build(tmp_path: Path) -> None:
    done = build(tmp_path, CC="no-such-compiler", CXX="no-such-compiler", SSMOE_REQUIRE_KERNELS="1")
    assert done.returncode != 0
    assert "no-such-compiler is not there" in done.stderr


def test_the_reason_of_a_missing_library_reaches_the_user(tmp_path: Path) -> None:
    (tmp_path / "_not_built.txt").write_text("g++ failed: error: odd\n")
    code = "from pathlib import Path; from ssmoe.ops import extension as e; "
    code += f"e.PATH = Path({str(tmp_path / '_kernels.so')!r}); print(e.missing())"
    told = python(code).stdout
    assert told.startswith("the CPU kernels were not built (g++ failed: error: odd); mend that")
    assert "pip install --force-reinstall --no-deps --no-cache-dir ssmoe" in told
