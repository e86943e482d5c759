"""Decoding on the CPU: ssmoe, llama.cpp, transformers and the memory's own speed side by side, greedily.

    pip install -e '.[benchmark]'
    python benchmarks/cpu_decode.py [--threads 1 2] [--batch 1 8] [--dtype bfloat16 float32]

Each figure is the median of `--rounds` processes, the systems in turn; of each the median over 9 windows of
consecutive tokens, the whole of a token counted (embedding to chosen id). A process during which others took
more than a tenth of a core is run again, at most 5 times; what then is left of it is printed. Weights are
random and the same for ssmoe and llama.cpp, whose next tokens are compared first. `taken`: the same while
another process spins on one core. `floor`: bytes of weights and states over the fastest reading seen here.
Huge pages: glibc's and torch's allocators are asked for them for everyone, or for no one (ssmoe's own choice
for its weights is then all that remains).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from cpu_peers import CALM, TRIES, Others, median_ms, require_parity
from decode_peers import Step, llama, transformers, write_gguf

import ssmoe
from ssmoe import ops
from ssmoe.generation.engine import decode
from ssmoe.generation.sampler import Sampling
from ssmoe.model.lm import LM
from ssmoe.model.weights import load_weights, save_weights

WINDOWS = 9
TOKENS = 8
"""Tokens in a window."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def ssmoe_seconds(folder: Path, dtype: torch.dtype, rows: int, tokens: int) -> tuple[list[float], float]:
    """Seconds of each of `tokens` tokens through the engine, and the cores that others took."""
    model = load_weights(folder, dtype=None if dtype == torch.float32 else dtype)
    times: list[float] = []
    others = Others()

    def accept(row: int, token: int) -> bool:
        nonlocal others
        del token
        if row == 0:
            times.append(time.perf_counter())
            others = Others() if len(times) == 2 else others
        return True

    prompts = [[row + 1] for row in range(rows)]
    decode(model, prompts, accept, sampling=Sampling(temperature=0), max_new_tokens=tokens + 2)
    return np.diff(times)[-tokens:].tolist(), others.cores()


def peer_seconds(step: Step, rows: int, tokens: int) -> tuple[list[float], float]:
    """The same of a peer, by its step."""
    ids, times = step([row + 1 for row in range(rows)]), [time.perf_counter()]
    others = Others()
    for _ in range(tokens):
        ids = step(ids)
        times.append(time.perf_counter())
    return np.diff(times).tolist(), others.cores()


def read_speed() -> float:
    """Bytes a second: the fastest of three ways to read 512 MB once."""
    x = ops.settled(torch.ones(1 << 17, 1 << 10), "cpu")
    vector = torch.ones(1, 1 << 10)
    with torch.no_grad():
        best = min(
            median_ms(lambda: x.sum()),
            median_ms(lambda: torch.dot(x.view(-1), x.view(-1))),
            median_ms(lambda: torch.ops.ssmoe.skinny_linear(vector, x, None)),
        )
    return x.numel() * 4 / best * 1e3


def worker(name: str, folder: Path, dtype: str, rows: int, threads: int, tokens: int) -> tuple[float, float]:
    """Tokens a second of one system, over all rows, bytes a second for "memory"; cores that others took."""
    torch.set_num_threads(threads)
    kind = DTYPES[dtype]
    if name == "memory":
        others = Others()
        return read_speed(), others.cores()
    if name == "ssmoe":
        times, others = ssmoe_seconds(folder, kind, rows, tokens)
    elif name == "llama.cpp":
        step, _ = llama(folder / f"{dtype}.gguf", rows, threads)
        times, others = peer_seconds(step, rows, tokens)
    else:
        config = ssmoe.preset("mamba-130m").model
        times, others = peer_seconds(transformers(config, kind), rows, tokens)
    windows = np.array(times).reshape(WINDOWS, -1).sum(1)
    return rows * (tokens // WINDOWS) / statistics.median(windows), others


def measure(
    name: str, folder: Path, dtype: str, rows: int, threads: int, tokens: int, *, huge: bool, taken: float = 0
) -> tuple[float, float] | None:
    """The calmest of up to TRIES `worker`s, each a process of its own; None where the peer is not installed.

    taken: cores that are meant to be taken.
    """
    found: list[tuple[float, float]] = []
    while len(found) < TRIES:
        one = attempt(name, folder, dtype, rows, threads, tokens, huge=huge)
        if one is None:
            return None
        found.append((one[0], max(0.0, one[1] - taken)))
        if found[-1][1] < CALM:
            break
    return min(found, key=lambda rate_others: rate_others[1])


def attempt(
    name: str, folder: Path, dtype: str, rows: int, threads: int, tokens: int, *, huge: bool
) -> tuple[float, float] | None:
    """One process of `worker`."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "THP_MEM_ALLOC_ENABLE": str(int(huge))}
    if huge:
        environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    request = json.dumps([name, str(folder), dtype, rows, threads, tokens * WINDOWS])
    command = [sys.executable, __file__, "--worker", request]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "ModuleNotFoundError" in done.stderr:
        return None
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def core_taken() -> Iterator[None]:
    """Another process spins on the last core of this machine."""
    core = max(os.sched_getaffinity(0))
    spin = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", spin])
    time.sleep(0.5)
    try:
        yield
    finally:
        other.kill()
        other.wait()


def compare_tokens(folder: Path, model: LM) -> None:
    """Refuse to time a llama.cpp that computes something else: its float32 logits after three tokens."""
    try:
        step, logits = llama(folder / "float32.gguf", 1, 1)
    except ModuleNotFoundError:
        print("llama-cpp-python is not installed: left out")
        return
    for token in (5, 17, 300):
        step([token])
    with torch.no_grad():
        ours = model(torch.tensor([[5, 17, 300]]), logits="last").logits
    assert ours is not None
    error = np.abs(logits()[0] - ours[0].numpy()).max() / ours.abs().max().item()
    print(f"llama.cpp's float32 logits differ from ours by {error:.1e} of the largest")
    if error > 1e-2:
        sys.exit("llama.cpp computes something else: nothing to compare")


def bytes_a_token(model: LM, dtype: torch.dtype, rows: int) -> float:
    """Weights once for all rows, states read and written for each."""
    matrices = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    state = sum(t.numel() * t.element_size() for layer in model.init_state(rows) for t in layer)
    return matrices + 2 * state


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--systems", nargs="*", default=["ssmoe", "llama.cpp", "transformers"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--huge-pages", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--no-taken", action="store_true", help="leave out the rows with a core taken")
    parser.add_argument("--worker")
    arguments = parser.parse_args()
    if arguments.worker:
        name, folder, *rest = json.loads(arguments.worker)
        print(json.dumps(worker(name, Path(folder), *rest)))
        return
    require_parity("mamba_step")
    with tempfile.TemporaryDirectory() as name:
        run(arguments, Path(name))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the model for everyone, then every row of the table."""
    model = ssmoe.build(ssmoe.preset("mamba-130m").model, seed=0).eval()
    save_weights(model, folder)
    if "llama.cpp" in arguments.systems:
        try:
            for dtype in arguments.dtype:
                write_gguf(model, folder / f"{dtype}.gguf", bfloat16=dtype == "bfloat16")
        except ModuleNotFoundError:
            print("gguf is not installed: llama.cpp is left out")
            arguments.systems.remove("llama.cpp")
        else:
            if "float32" in arguments.dtype:
                compare_tokens(folder, model)
    print(f"torch {torch.__version__}, {ops.describe('cpu')}; tokens a second over all rows")
    for huge in arguments.huge_pages:
        for threads in arguments.threads:
            speed = measure("memory", folder, "float32", 1, threads, 1, huge=bool(huge))
            assert speed is not None
            speed = speed[0]
            print(f"huge pages {'asked for' if huge else 'not asked for'}, {threads} threads: "
                  f"memory is read at {speed / 1e9:.1f} GB/s")  # fmt: skip
            for dtype in arguments.dtype:
                for rows in arguments.batch:
                    line(arguments, folder, model, dtype, rows, threads, speed, huge=bool(huge))
    if not arguments.no_taken:
        taken(arguments, folder)


def line(
    arguments: argparse.Namespace,
    folder: Path,
    model: LM,
    dtype: str,
    rows: int,
    threads: int,
    speed: float,
    *,
    huge: bool,
) -> None:
    """One row of the table: every system, the floor, and ours over the others."""
    rounds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for name in arguments.systems:
            tokens = 2 if name == "transformers" else TOKENS
            if (one := measure(name, folder, dtype, rows, threads, tokens, huge=huge)) is not None:
                rounds.setdefault(name, []).append(one)
    found = {name: statistics.median(rate for rate, _ in all_) for name, all_ in rounds.items()}
    disturbed = max(others for all_ in rounds.values() for _, others in all_)
    floor = rows * speed / bytes_a_token(model, DTYPES[dtype], rows)
    ours = found.get("ssmoe") or float("nan")
    parts = [
        f"{name} {value:7.1f}" + ("" if name == "ssmoe" else f" ({ours / value:.2f}x)")
        for name, value in found.items()
    ]
    noise = f"  (others took up to {disturbed:.2f} cores)" if disturbed >= CALM else ""
    print(f"  {dtype:8} batch {rows}: {'  '.join(parts)}  floor {floor:7.1f}{noise}", flush=True)


def taken(arguments: argparse.Namespace, folder: Path) -> None:
    """Two threads while one core is taken, next to one thread on a free machine."""
    threads = max(arguments.threads)
    print(f"one core taken by another process, {threads} threads (share of the own figure of one thread)")
    for dtype in arguments.dtype:
        for rows in arguments.batch:
            for name in [name for name in arguments.systems if name != "transformers"]:
                alone = measure(name, folder, dtype, rows, 1, TOKENS, huge=False)
                with core_taken():
                    shared = measure(name, folder, dtype, rows, threads, TOKENS, huge=False, taken=1)
                if alone and shared:
                    print(
                        f"  {dtype:8} batch {rows}: {name:9} {shared[0]:7.1f} ({shared[0] / alone[0]:.2f})",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
