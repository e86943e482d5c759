"""A small text and runs of a second, for the tests of whole paths."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch

from ssmoe.config.load import RunConfig, load_run

# tensors this small gain nothing from threads, which wait for one another on a busy machine
torch.set_num_threads(1)

MODEL = """
[model]
vocab_size = 257
d_model = 16

[[model.pattern]]
kind = "mamba"
d_state = 4

[[model.pattern]]
kind = "moe"
num_experts = 4
d_expert = 16
capacity_factor = 1.0

[train]
steps = 6
batch_size = 4
micro_batch_size = 2
learning_rate = 0.01
eval_every = 3
eval_rows = 4
checkpoint_every = 3
"""


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of words."""
    folder, random = tmp_path_factory.mktemp("text"), Random(0)
    words = ["state", "space", "model", "mixture", "of", "experts", "router", "token", "ÿ", "é"]
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(" ".join(random.choices(words, k=random.randint(5, 120))))
    return folder


@pytest.fixture
def tiny_file(text_folder: Path, tmp_path: Path) -> Path:
    """A run file of a MoE-Mamba with capacity and micro-batches; its cache is in `tmp_path`."""
    path = tmp_path / "tiny.toml"
    data = f'sources = "{text_folder}"\ntokenizer = "bytes"\ncontext = 32\nheld_out = 0.2\n'
    path.write_text(f'{MODEL}\n[data]\n{data}cache_dir = "{tmp_path / "cache"}"\n')
    return path


@pytest.fixture
def tiny_run(tiny_file: Path) -> Callable[..., RunConfig]:
    """That run, changed by `key=value`."""
    return lambda *overrides: load_run(str(tiny_file), overrides)
