"""Builds the CPU kernels of csrc/ where a compiler and torch are at hand; without them the package installs
as pure Python and runs on the reference backend. What went wrong is kept beside where they would be, since
pip shows nothing of a build that went on; `ssmoe doctor` reads it. SSMOE_REQUIRE_KERNELS=1 makes it an error,
SSMOE_TORCH names the folder of the torch to build for.

The kernels are one shared library, loaded by `torch.ops.load_library`: it names neither Python nor a torch
version (libtorch's stable ABI, torch >= 2.11), so one build serves every Python.
"""

import importlib.util
import os
import platform
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
REQUIRED = bool(os.environ.get("SSMOE_REQUIRE_KERNELS"))
REPORT = "_not_built.txt"  # src/ssmoe/ops/extension.py reads it
WARNINGS = ["-Wall", "-Wno-attributes", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"]
COMMON = [
    "-std=c++17",
    "-O3",
    "-g0",  # Python's own flags ask for debugging data, ten times the size of the code
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-fPIC",
    *WARNINGS,
]
LEVELS = {"Portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    COMMON.append("-DSSMOE_X86")
    LEVELS["Avx2"] = ["-mavx2", "-mfma"]
    # -mtune: by Zen's model of the units the scan's inner loop takes 6 % fewer cycles than by the generic one
    LEVELS["Avx512"] = [
        "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512",
        "-mtune=znver3",
    ]  # fmt: skip
    LEVELS["Avx512Bf16"] = [*LEVELS["Avx512"], "-mavx512bf16"]


def torch_folder() -> Path | None:
    """torch's folder; in pip's isolated build environment that of the environment being installed into."""
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    roots += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    if folder := os.environ.get("SSMOE_TORCH"):
        roots = [Path(folder)]
    return next((root for root in roots if (root / "include/torch/csrc/stable/library.h").exists()), None)


def run(command: list[str], **_: object) -> None:
    """Run a compiler; raise RuntimeError with the first error it names, and pass on all that it says."""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not there: install g++ or clang, or name one in CXX") from None
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = done.stderr.splitlines()
        told = [line for line in lines if "error" in line.lower() or "undefined" in line] or lines[-1:]
        raise RuntimeError(
            f"{command[0]} failed: {''.join(told[:1]).strip() or f'exit code {done.returncode}'}"
        )


class BuildKernels(build_ext):
    """Compiles level.cpp once a level and links everything into ssmoe/ops/cpu/_kernels.so."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        folder, reason = torch_folder(), ""
        self.compiler.call = self.compiler.spawn = run  # newer and older setuptools
        try:
            if self.compiler.compiler_type != "unix":
                raise RuntimeError(
                    f"the {self.compiler.compiler_type} compiler is not supported, g++ and clang are"
                )
            if folder is None:
                raise RuntimeError(
                    "torch 2.11 or newer was not installed: install it first, or set SSMOE_TORCH"
                )
            self.link(ext, folder)
        except Exception as error:  # a package without kernels is complete; say so and go on
            if REQUIRED:
                raise
            reason = str(error)
            sys.stderr.write(f"ssmoe: CPU kernels not built ({reason}); running on the reference backend\n")
        self.report(Path(self.get_ext_fullpath(ext.name)), reason)

    def report(self, target: Path, reason: str) -> None:
        """Keep why a library is missing beside its place, and no older library there: it would lack ops."""
        note = target.with_name(REPORT)
        if reason:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            note.write_text(reason + "\n")
        else:
            note.unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        """For --inplace and editable installs: setuptools knows of the library, not of the report."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            name = self.get_ext_filename(ext.name)
            built = (Path(self.build_lib) / name).with_name(REPORT)
            self.report(HERE / "src" / name, built.read_text().strip() if built.exists() else "")

    def link(self, ext: Extension, torch: Path) -> None:
        out, include = self.build_temp, [str(HERE / "csrc"), str(torch / "include")]
        # the stable ABI of 2.11
        macros = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
        # the C++ library's ABI is that of libtorch; ours stays inside
        sources = [
            str(source) for source in sorted((HERE / "csrc").glob("*.cpp")) if source.name != "level.cpp"
        ]
        jobs = [([source], out, macros, include, COMMON) for source in sources]
        source = str(HERE / "csrc/level.cpp")
        jobs += [
            ([source], f"{out}/{level}", [("SSMOE_LEVEL", level)], [], [*COMMON, *flags])
            for level, flags in LEVELS.items()
        ]
        objects: list[str] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # the levels take longest, so they begin first
            for made in pool.map(self.compile, reversed(jobs)):
                objects += made
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # libtorch is in the process already when the library is loaded
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        # torch's own C++ library, also where a compiler is set up to link statically: two in one process
        # break streams, so that an error's message is cut or ends the process
        runtime = [":libstdc++.so.6"] if sys.platform == "linux" else []
        self.compiler.link_shared_object(
            objects, str(target), libraries=["torch_cpu", "torch", "c10", *runtime],
            library_dirs=[str(torch / "lib")], extra_postargs=undefined, target_lang="c++",
        )  # fmt: skip

    def compile(self, job: tuple[list[str], str, list[tuple[str, str]], list[str], list[str]]) -> list[str]:
        sources, out, macros, include, flags = job
        return self.compiler.compile(sources, out, macros, include, extra_postargs=flags)


setup(
    ext_modules=[Extension("ssmoe.ops.cpu._kernels", sources=[], optional=not REQUIRED)],
    cmdclass={"build_ext": BuildKernels},
)
