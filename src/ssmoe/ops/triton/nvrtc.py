"""CUDA C++ compiled at run time: NVRTC, which torch ships with, and the driver's launch, through ctypes."""

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

Macros = tuple[tuple[str, str], ...]
"""Names and values of the macros that a source is compiled with."""


@cache
def _nvrtc() -> ctypes.CDLL | None:
    """The library of torch's own CUDA version, from the loader's path or from the packages beside torch."""
    if torch.version.cuda is None:
        return None
    name = f"libnvrtc.so.{torch.version.cuda.split('.')[0]}"
    spec = find_spec("nvidia")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    found = [str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))]
    for candidate in (name, *found):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    return None


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether sources can be compiled here: NVRTC is present and the GPU has bfloat16 (capability 8.0)."""
    return _available()


@cache
def _available() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0) and _nvrtc() is not None


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int, doing: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"{doing} failed: {(text.value or b'unknown error').decode()}")


@cache
def compile_source(source: Path, macros: Macros, architecture: str) -> bytes:
    """The binary of one source for an architecture such as "sm_90". Raises RuntimeError with NVRTC's log."""
    library = _nvrtc()
    assert library is not None, "available() was asked first"
    options = [f"--gpu-architecture={architecture}", "-std=c++17", *(f"-D{k}={v}" for k, v in macros)]
    encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    program = ctypes.c_void_p()
    text = source.read_bytes()
    if library.nvrtcCreateProgram(ctypes.byref(program), text, source.name.encode(), 0, None, None):
        raise RuntimeError(f"NVRTC does not take {source}")
    try:
        if library.nvrtcCompileProgram(program, len(options), encoded):
            raise RuntimeError(
                f"{source.name} with {dict(macros)} does not compile:\n{_log(library, program)}"
            )
        size = ctypes.c_size_t()
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        binary = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, binary)
        return binary.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace")


def _ensure_context(device: int) -> None:
    """A thread that torch has not used yet, such as one of autograd's, may have no context."""
    driver, current = _driver(), ctypes.c_void_p()
    _check(driver.cuCtxGetCurrent(ctypes.byref(current)), "asking for the context")
    if not current.value:
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(current), device), "taking the context")
        _check(driver.cuCtxSetCurrent(current), "setting the context")


_DYNAMIC_SHARED_SIZE = 8
"""The driver's number for how much shared memory a launch of a function may ask for."""


@cache
def _function(source: Path, kernel: str, macros: Macros, shared: int, device: int) -> ctypes.c_void_p:
    major, minor = torch.cuda.get_device_capability(device)
    binary = compile_source(source, macros, f"sm_{major}{minor}")
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), binary), f"loading {source.name}")
    _check(
        _driver().cuModuleGetFunction(ctypes.byref(function), module, kernel.encode()), f"finding {kernel}"
    )
    if shared > 48 * 1024:
        _check(
            _driver().cuFuncSetAttribute(function, _DYNAMIC_SHARED_SIZE, shared),
            f"asking for {shared} bytes of shared memory for {kernel}",
        )
    return function


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: the number of an attribute and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint32 * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


_COOPERATIVE = 2
"""The driver's number of the attribute of a launch whose blocks are all on the GPU at once."""


def double_bits(value: float) -> int:
    """The 64 bits of a double, as a word of a launch."""
    return ctypes.c_int64.from_buffer_copy(ctypes.c_double(value)).value


def launch(
    source: Path,
    kernel: str,
    macros: Macros,
    blocks: int,
    threads: int,
    words: Sequence[int],
    shared: int = 0,
    *,
    together: bool = False,
) -> None:
    """Start `kernel`, whose one parameter is a struct of 64-bit words, on the current device and stream.

    shared: bytes of memory that each block is given. together: all blocks are on the GPU at once, so that they can
    wait for one another. A source and its macros are compiled when first launched on a device, and kept.
    """
    if blocks > 2**31 - 1:
        raise ValueError(f"{kernel} would need {blocks} blocks: a launch has at most {2**31 - 1}")
    device = torch.cuda.current_device()
    _ensure_context(device)
    function = _function(source, kernel, macros, shared, device)
    values = (ctypes.c_int64 * len(words))(*words)
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(values))
    attribute = _Attribute(id=_COOPERATIVE)
    attribute.value[0] = 1
    config = _Config(
        (blocks, 1, 1), (threads, 1, 1), shared, torch.cuda.current_stream(device).cuda_stream,
        ctypes.addressof(attribute), int(together),
    )  # fmt: skip
    result = _driver().cuLaunchKernelEx(ctypes.byref(config), function, parameters, None)
    _check(result, f"launching {kernel}")
