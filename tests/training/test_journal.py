import numpy as np
import pytest
import torch

from ssmoe.config.train import TrainConfig
from ssmoe.data.packing import Batch
from ssmoe.model.build import build
from ssmoe.training.journal import Diverged, Journal, Taken
from ssmoe.training.metrics import MetricsFile, read_metrics
from ssmoe.training.optimizer import build_optimizer, parameter_groups
from ssmoe.training.step import StepResult, train_step
from tests.model.zoo import small


class Lines:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.messages, self.records = [], []

    def message(self, text):
        self.messages.append(text)

    def record(self, record):
        self.records.append(record)


def result(lm=2.0):
    return StepResult(*(torch.tensor(value) for value in (lm, 0.25, 0.5, 1.5)), {}, None)


def taken(step):
    return Taken(step, 32 * step, 32, 0.01)


def note_and_settle(book, step, found):
    book.add(step, found)
    book.settle()


@pytest.fixture
def journal(tmp_path):
    files = []

    def make(*, at_once, saved=0):
        lines, metrics = Lines(), MetricsFile(tmp_path)
        files.append(metrics)
        return Journal(metrics, lines, at_once=at_once, seconds=10.0, saved=saved), lines

    yield make
    for metrics in files:
        metrics.close()


def test_at_once_every_step_is_written_before_the_next(journal, tmp_path):
    book, lines = journal(at_once=True)
    for step in (1, 2):
        book.begin()
        book.add(taken(step), result())
        assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, step + 1))
    assert lines.records == read_metrics(tmp_path)
    assert lines.records[0]["loss"] == 2.75
    assert book.seconds > 10


def test_otherwise_a_step_is_written_with_the_next_one_or_when_asked(journal, tmp_path):
    book, lines = journal(at_once=False)
    for step in (1, 2, 3):
        book.begin()
        book.add(taken(step), result())
        assert [r["step"] for r in lines.records] == list(range(1, step))
    book.settle()
    book.settle()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    seconds = [10.0, *(r["seconds"] for r in lines.records)]
    assert seconds == sorted(seconds)


def test_time_between_settling_and_the_next_step_is_no_training(journal, monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 100.0, 104.0])
    monkeypatch.setattr("ssmoe.training.journal.perf_counter", lambda: next(clock))
    book, lines = journal(at_once=False)
    for step in (1, 2):
        book.begin()
        book.add(taken(step), result())
        book.settle()
    assert [r["seconds"] for r in lines.records] == [12.0, 16.0]
    assert [r["tokens_per_second"] for r in lines.records] == [16.0, 8.0]


def test_launching_the_next_step_is_part_of_the_one_under_way(journal, monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 6.0, 100.0])
    monkeypatch.setattr("ssmoe.training.journal.perf_counter", lambda: next(clock))
    book, lines = journal(at_once=False)
    for step in (1, 2):
        book.begin()
        book.add(taken(step), result())
    book.settle()
    assert [r["seconds"] for r in lines.records] == [14.0, 15.0]


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_no_number_is_never_written(journal, tmp_path, at_once):
    book, _ = journal(at_once=at_once, saved=1)
    book.begin()
    book.add(taken(1), result())
    book.begin()
    with pytest.raises(Diverged, match="loss is nan at step 2; the checkpoint of step 1 is good"):
        note_and_settle(book, taken(2), result(float("nan")))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_a_gradient_that_is_no_number_is_told_with_a_finite_loss(journal, tmp_path):
    book, _ = journal(at_once=True)
    book.begin()
    with pytest.raises(Diverged, match="grad_norm is inf at step 1; there is no checkpoint yet"):
        book.add(taken(1), result()._replace(grad_norm=torch.tensor(float("inf"))))
    assert read_metrics(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("name", ["mamba", "moe", "moe-fine"])
def test_no_step_waits_for_the_gpu(name, journal):
    """From the batch on the CPU to the noted numbers; the kernels are compiled in the first step."""
    model = build(small(name), device="cuda", dtype=torch.bfloat16).train()
    optimizer = build_optimizer(parameter_groups(model), TrainConfig())
    ids = np.random.default_rng(0).integers(0, 61, (8, 33))
    flags = np.zeros((8, 32), np.bool_)
    batch = Batch(ids[:, :-1], ids[:, 1:], np.zeros((8, 32), np.int32), flags)
    book, lines = journal(at_once=False)
    for step in (1, 2, 3):
        torch.cuda.set_sync_debug_mode("default" if step == 1 else "error")
        try:
            book.begin()
            found = train_step(model, optimizer, batch, TrainConfig(), 0.001, isolate=True)
            book.add(taken(step), found)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    book.settle()
    assert [r["step"] for r in lines.records] == [1, 2, 3]
