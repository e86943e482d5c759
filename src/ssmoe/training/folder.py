"""The run folder: what may be written where, and the files that make a run repeatable."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from pydantic import ValidationError

from ssmoe.config.load import RunConfig
from ssmoe.config.load import describe as problem_of
from ssmoe.ops import describe
from ssmoe.ops.device import resolve_device
from ssmoe.training.checkpoint import list_checkpoints

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
LOCK = ".lock"

_MAY_CHANGE = "data.cache_dir"
"""Where a copy of the data lies does not change the run."""


def check_folder(folder: Path, run: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Raise ValueError unless `run` may write `folder` this way; nothing is changed."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: choose one")
    exists = folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir()))
    if exists and not (resume or overwrite):
        raise ValueError(
            f"{folder} exists: give --resume to go on, --overwrite to replace it, or --out another"
        )
    missing = [name for name in (CONFIG, ENVIRONMENT) if not (folder / name).is_file()]
    if exists and missing:
        raise ValueError(
            f"{folder} exists and is not a run folder (it has no {missing[0]}): give --out another"
        )
    if resume:
        if not exists:
            raise ValueError(f"{folder} does not exist, so there is nothing to resume: leave --resume away")
        _check_same(run, folder)
        if not list_checkpoints(folder):
            raise ValueError(f"{folder} has no checkpoint yet: start it again with --overwrite")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{parent} is not a folder that can be written: give --out another")


def check_data(folder: Path, data: Mapping[str, str | int]) -> None:
    """Raise ValueError unless `data` is what `create_folder` was given when the run began."""
    stored = read_environment(folder)["data"]
    for key, what in (("content", "text"), ("tokenizer", "tokenizer")):
        if stored[key] != data[key]:
            raise ValueError(
                f"the {what} of {folder} has changed since the run began: put the old {what} back, "
                "or train anew with --overwrite or another --out"
            )


def create_folder(folder: Path, run: RunConfig, backend: str, *, data: Mapping[str, str | int]) -> None:
    """Make a fresh run folder (replacing the old run, if any) with its config.json and environment.json."""
    found = json.dumps({**environment(run, backend), "data": data}, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    (folder / ENVIRONMENT).write_text(found)
    (folder / CONFIG).write_text(run.model_dump_json(indent=2) + "\n")


@contextmanager
def lock_folder(folder: Path) -> Generator[None]:
    """Hold `folder`, made where it is missing, against every other process that trains into it.

    The lock ends with the process, however that ends. Raises ValueError where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"another process is training into {folder}: wait for it, stop it, or give --out another"
        ) from error
    try:
        yield
    finally:
        lock.release()


def environment(run: RunConfig, backend: str) -> dict[str, Any]:
    """Versions, device, backend, seed and git commit."""
    packages = ("ssmoe", "torch", "numpy", "safetensors", "tokenizers", "pydantic")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "platform": platform.platform(),
        "device": device_name(run.train.device),
        "threads": run.train.threads or torch.get_num_threads(),
        "backend": backend,
        "kernels": describe(backend),
        "seed": run.train.seed,
        "git": _git_commit(),
    }


def device_name(device: str) -> str:
    """The device in words."""
    if resolve_device(device).type == "cuda":
        return torch.cuda.get_device_name(resolve_device(device))
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def find_run(path: Path) -> Path | None:
    """The run that a run folder, checkpoint or weights folder belongs to."""
    for folder in (path, *path.absolute().parents[:3]):
        if (folder / "metrics.jsonl").is_file():
            return folder
    return None


def read_run(folder: Path) -> RunConfig:
    """The configuration that a run folder was made with."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no {CONFIG}")
    try:
        return RunConfig.model_validate_json(path.read_text())
    except ValidationError as error:
        raise ValueError(f"{path} is not the configuration of a run ({problem_of(error)})") from error


def read_environment(folder: Path) -> dict[str, Any]:
    """The versions, device, backend and data that a run folder was made with."""
    try:
        found: Any = json.loads((folder / ENVIRONMENT).read_text())
        complete = {"backend", "data"} <= found.keys() and {"content", "tokenizer"} <= found["data"].keys()
    except (json.JSONDecodeError, AttributeError):
        complete, found = False, {}
    if not complete:
        raise ValueError(f"{folder / ENVIRONMENT} is damaged: train anew with --overwrite or another --out")
    return found


def _check_same(run: RunConfig, folder: Path) -> None:
    stored, asked = read_run(folder).model_dump(mode="json"), run.model_dump(mode="json")
    changed = [
        f"{section}.{key}"
        for section in ("model", "data", "train")
        for key in asked[section]
        if asked[section][key] != stored[section].get(key) and f"{section}.{key}" != _MAY_CHANGE
    ]
    if changed:
        raise ValueError(
            f"{folder} was started with another {changed[0]}: resume it with "
            f"`ssmoe train {folder} --resume`, or train anew with --overwrite or another --out, from its "
            f"weights with train.init_from={folder}"
        )


def _git_commit() -> str | None:
    """The commit of the working directory's repository, None outside one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
