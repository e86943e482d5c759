"""The state store: longest prefixes, budget, sharing, and processes killed at any moment."""

import subprocess
import sys

import pytest
import torch

from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.generation.store import StateStore, read_through
from ssmoe.model.build import build
from tests.model.zoo import small

MODEL = build(small("mamba", vocab_size=257)).eval()
TOKENIZER = ByteTokenizer()


def store_of(folder, *, budget_bytes=1 << 20, model=MODEL):
    return StateStore(folder, model, TOKENIZER, budget_bytes=budget_bytes)


def state_of(ids, model=MODEL):
    with torch.no_grad():
        return model(torch.tensor([ids])).state


def assert_same(found, ids):
    for one, other in zip(found.state, state_of(ids), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_longest_prefix_is_found(tmp_path):
    store = store_of(tmp_path)
    assert store.get([1, 2, 3]) is None
    for ids in ([1, 2], [1, 2, 3, 4], [9, 9, 9]):
        store.put(ids, state_of(ids))
    for ids, length in (([1, 2, 3], 2), ([1, 2, 3, 4], 4), ([1, 2, 3, 4, 5], 4), ([9, 9, 9, 1], 3)):
        found = store.get(ids)
        assert found.tokens == length
        assert_same(found, ids[:length])
    assert store.get([1]) is None
    assert store.get([2, 1, 3]) is None
    # every byte of an id counts
    assert store.get([1, 2 + 256]) is None
    assert store.get([1, 2 + (1 << 16)]) is None


def test_a_state_of_several_rows_is_refused(tmp_path):
    store, ids = store_of(tmp_path), torch.tensor([[1, 2], [1, 3]])
    with pytest.raises(ValueError, match=r"a state of 2 rows: pick one with ssmoe\.state\.select"):
        store.put([1, 2], MODEL(ids).state)
    assert store.num_bytes() == 0


def test_models_and_tokenizers_do_not_meet(tmp_path):
    store_of(tmp_path).put([1, 2], state_of([1, 2]))
    other = build(small("mamba", vocab_size=257), seed=1).eval()
    assert store_of(tmp_path, model=other).get([1, 2]) is None
    assert store_of(tmp_path).get([1, 2]).tokens == 2


def test_the_budget_keeps_what_was_used_last(tmp_path):
    store = store_of(tmp_path)
    store.put([0, 0], state_of([0, 0]))
    size = store.num_bytes()
    store = store_of(tmp_path, budget_bytes=3 * size + size // 2)
    for i in (1, 2):
        store.put([i, i], state_of([i, i]))
    assert store.get([0, 0]) is not None
    store.put([3, 3], state_of([3, 3]))
    assert [store.get([i, i]) is not None for i in range(4)] == [True, False, True, True]
    assert store.num_bytes() <= store.budget_bytes
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert not store_of(tmp_path / "b", budget_bytes=10).put([1], state_of([1]))
    with pytest.raises(ValueError, match="budget_bytes=0"):
        store_of(tmp_path, budget_bytes=0)


@pytest.mark.parametrize("damage", ["gone", "cut", "swapped"])
def test_a_damaged_file_is_a_miss(tmp_path, damage):
    store = store_of(tmp_path)
    store.put([1], state_of([1]))
    [short] = tmp_path.glob("*.safetensors")
    store.put([1, 2], state_of([1, 2]))
    [path] = set(tmp_path.glob("*.safetensors")) - {short}
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3] if damage == "cut" else short.read_bytes())
    found = store.get([1, 2, 3])
    assert found.tokens == 1
    assert_same(found, [1])
    if damage != "swapped":
        assert store.num_bytes() == short.stat().st_size
    # what no entry speaks of goes with the next writing
    store.put([7], state_of([7]))
    assert len(list(tmp_path.glob("*.safetensors"))) == (3 if damage == "swapped" else 2)


@pytest.mark.parametrize("name", ["hybrid", "moe-mamba"])
def test_a_warm_store_gives_the_bits_of_a_cold_one(tmp_path, name):
    model = build(small(name, vocab_size=257)).eval()
    ids = torch.randint(257, (23,), generator=torch.Generator().manual_seed(0)).tolist()
    cold = read_through(store_of(tmp_path / "a", model=model), ids, every=5)
    store = store_of(tmp_path / "b", model=model)
    read_through(store, [*ids[:17], 0, 0, 0], every=5)
    assert store.get(ids).tokens == 15
    warm = read_through(store, ids, every=5)
    assert cold.tokens == warm.tokens == 22
    for one, other in zip(cold.state, warm.state, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert store.get(ids).tokens == 20


def test_a_prefix_stored_at_another_distance_is_gone_on_from_at_multiples(tmp_path):
    store = store_of(tmp_path)
    ids = list(range(23))
    read_through(store, ids[:14], every=4)
    assert store.get(ids).tokens == 12
    read_through(store, ids, every=5)
    assert store.get(ids).tokens == 20


KILLS = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.generation.store import StateStore
from ssmoe.model.build import build
from ssmoe.config.model import MambaConfig, ModelConfig

folder, cycles = sys.argv[1], int(sys.argv[2])
config = ModelConfig(vocab_size=257, d_model=8, pattern=(MambaConfig(d_state=2),), repeat=2)
model = build(config).eval()
probe = StateStore(folder, model, ByteTokenizer(), budget_bytes=40_000)

def ids_of(draw):
    return [draw.randrange(3) for _ in range(draw.randint(1, 6))]

def state_of(ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).state

def check(found, ids):
    assert found.tokens <= len(ids)
    for a, b in zip(found.state, state_of(ids[: found.tokens])):
        assert all(torch.equal(x, y) for x, y in zip(a, b)), ids

def work(seed, count):
    draw, hits = random.Random(seed), 0
    for _ in range(count):
        ids = ids_of(draw)
        if draw.random() < 0.5:
            probe.put(ids, state_of(ids))
        elif (found := probe.get(ids)) is not None:
            check(found, ids)
            hits += 1
    return hits

def child(seed):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(seed, 1_000_000_000)
            code = 0
        finally:
            os._exit(code)
    return pid

draw, killed = random.Random(0), 0
for cycle in range(cycles):
    pids = [child(2 * cycle), child(2 * cycle + 1)]
    time.sleep(draw.random() * 0.03)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), status
        killed += 1
    if cycle % 10 == 0:
        work(-cycle, 4)
        assert probe.num_bytes() <= probe.budget_bytes
hits = work(1, 200)
on_disk = sum(e.stat().st_size for e in os.scandir(folder) if e.name.endswith(".safetensors"))
assert on_disk == probe.num_bytes() <= probe.budget_bytes, (on_disk, probe.num_bytes())
assert not [e.name for e in os.scandir(folder) if e.name.endswith(".new")]
assert hits > 20, hits
print(killed, hits)
"""


@pytest.mark.slow
def test_processes_killed_at_random_never_cause_a_wrong_answer(tmp_path):
    """1,000 real SIGKILLs of endless writers, always two at once, with evictions all the time."""
    done = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path, "500"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1000 ")
