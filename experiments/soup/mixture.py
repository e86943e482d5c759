"""What the soup experiment trains on and asks: word-pair tasks, made-up tasks, and text.

A document is examples `input>output`, one a line, of one task, or a piece of text. Held out are pairs of
every task (a pair is held out in both directions and in every task that has it) and whole tasks, real and
made up.
"""

import json
import lzma
import random
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from math import exp, log
from pathlib import Path
from typing import NamedTuple

from ssmoe.eval.tasks import Pair, Template, read_task, split_task

TEMPLATE = Template(question="{input}>", answer="{output}", end="\n")

FORM = (
    "adj-comparative",
    "present-past",
    "singular-plural",
    "verb-3sg",
    "verb-gerund",
    "wordnet-adj-graded-to-lemma",
    "wordnet-irregular-plural-to-lemma",
    "wordnet-irregular-verb-form-to-lemma",
)
"""Tasks whose answer follows from the spelling of the input, mostly: a small model can answer pairs that it
never saw. Fixed before anything was measured."""
FACT = (
    "country-capital",
    "country-currency",
    "country-demonym",
    "country-language",
    "country-name-french",
    "country-name-german",
    "country-name-spanish",
    "country-region",
    "english-french",
    "english-german",
    "english-spanish",
    "google-city-in-state",
    "google-family",
    "google-gram6-nationality-adjective",
    "language-name-french",
    "language-name-german",
    "language-name-italian",
    "language-name-spanish",
    "wordnet-antonym",
    "wordnet-hypernym",
    "wordnet-synonym",
)
"""Tasks that must be known: held-out pairs of most are beyond any small model."""
UNSEEN = (
    "adj-superlative",
    "google-gram1-adjective-to-adverb",
    "google-gram2-opposite",
    "google-gram7-past-tense",
)
"""Whole tasks that are never trained on. The other files repeat these or those above and are left out."""
TEXTS = ("encyclopedia", "books")

_MAX_EXAMPLES = 40
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# the affixes of the unseen tasks, which no made-up task may use
_RESERVED = ("est", "st", "ly", "y", "un", "in", "im", "ir", "dis", "ed", "d")


class Task(NamedTuple):
    """Examples are drawn from `shown`, questions from `asked`, which no training document holds."""

    name: str
    shown: list[Pair]
    asked: list[Pair]


class Tasks(NamedTuple):
    """By group; the names of `made_up` tell their rule."""

    form: list[Task]
    fact: list[Task]
    unseen: list[Task]
    made_up: list[Task]


def load_tasks(folder: Path, *, seed: int = 0) -> Tasks:
    """Every task of the corpus folder `icl`, split, and twelve made-up ones with affixes never trained on."""
    split = {
        name: split_task(read_task(folder / f"{name}.json"), seed=seed) for name in (*FORM, *FACT, *UNSEEN)
    }
    held_out = {frozenset(pair) for _, asked in split.values() for pair in asked}
    tasks = {
        name: Task(name, [pair for pair in shown if frozenset(pair) not in held_out], asked)
        for name, (shown, asked) in split.items()
    }
    # of an unseen task no pair may be shown by another one
    unseen = {frozenset(pair) for name in UNSEEN for pair in (*tasks[name].shown, *tasks[name].asked)}
    for name in (*FORM, *FACT):
        tasks[name] = tasks[name]._replace(
            shown=[pair for pair in tasks[name].shown if frozenset(pair) not in unseen]
        )
    form, fact = [tasks[name] for name in FORM], [tasks[name] for name in FACT]
    return Tasks(form, fact, [tasks[name] for name in UNSEEN], _unseen_rules(form, seed))


def documents(tasks: Tasks, texts: Sequence[str], *, size: int, seed: int = 0) -> Iterator[str]:
    """Training documents of about `size` bytes in all: a third text, the rest tasks, half of them made up."""
    generator = random.Random(seed)
    words = _words(tasks.form)
    total = 0
    while total < size:
        draw = generator.random()
        if draw < 0.18:  # of documents; text documents are longer
            document = _piece(generator, texts)
        elif draw < 0.55:
            _, rule = _rule(generator, held_out=False)
            document = _examples(
                generator, [Pair(w, rule(w)) for w in generator.sample(words, _MAX_EXAMPLES)]
            )
        else:
            group = tasks.form if generator.random() < 0.75 else tasks.fact
            document = _examples(generator, generator.choice(group).shown)
        total += len(document.encode())
        yield document


def read_texts(folder: Path, *, size: int) -> tuple[list[str], list[str]]:
    """Training and held-out paragraphs of each text file, about `size` bytes of each file for training.

    Every 100th megabyte of a file is held out; of the first one, half a megabyte is kept.
    """
    train: list[str] = []
    held_out: list[str] = []
    for name in TEXTS:
        with lzma.open(folder / f"{name}.txt.xz", "rt", encoding="utf-8") as file:
            held_out += _paragraphs(file.read(1 << 19))
            file.read(1 << 19)
            train += _paragraphs(file.read(size))
    return train, held_out


def write(path: Path, found: Iterator[str]) -> None:
    """Documents as .jsonl.xz, which `data.sources` reads; the file has its name once it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    with lzma.open(partial, "wt", preset=1, encoding="utf-8") as file:
        for document in found:
            file.write(json.dumps({"text": document}) + "\n")
    partial.rename(path)


def _examples(generator: random.Random, pairs: Sequence[Pair]) -> str:
    """2 to 40 examples, few more often than many."""
    number = min(1 + round(exp(generator.uniform(0, log(_MAX_EXAMPLES - 1)))), len(pairs))
    return "".join(TEMPLATE.example(pair) for pair in generator.sample(pairs, number))


def _piece(generator: random.Random, texts: Sequence[str]) -> str:
    """128 to 768 bytes of a text, cut at a space."""
    text = generator.choice(texts)
    length = generator.randint(128, 768)
    begin = generator.randint(0, max(0, len(text) - length))
    return text[begin : begin + length].split(" ", 1)[-1]


def _paragraphs(text: str) -> list[str]:
    """Pieces of 1 to 4 kB made of whole lines; the first line may be half a one and is dropped."""
    pieces: list[str] = []
    current = ""
    for line in text.split("\n")[1:-1]:
        current += line + "\n"
        if len(current) >= 1024:
            pieces += [current[i : i + 4096] for i in range(0, len(current), 4096)]
            current = ""
    return [piece for piece in pieces if len(piece) >= 1024]


def _words(tasks: Sequence[Task]) -> list[str]:
    """Words that made-up tasks are about: plain inputs of the shown pairs."""
    found = {pair.input for task in tasks for pair in task.shown}
    return sorted(word for word in found if word.isascii() and word.isalpha() and 3 <= len(word) <= 9)


def _affix(generator: random.Random, *, held_out: bool) -> str:
    """1 to 4 letters; a tenth of all are for held-out tasks only."""
    while True:
        letters = "".join(generator.choice(_LETTERS) for _ in range(generator.choice((1, 2, 2, 3, 3, 4))))
        is_held_out = blake2b(letters.encode(), digest_size=1).digest()[0] % 10 == 0
        if is_held_out == held_out and letters not in _RESERVED:
            return letters


def _rule(
    generator: random.Random, *, held_out: bool, kind: str | None = None
) -> tuple[str, Callable[[str], str]]:
    """The name of a made-up task and its rule."""
    one = _affix(generator, held_out=held_out)
    other = _affix(generator, held_out=held_out)
    cut = generator.choice((1, 2))
    match kind or generator.choice(
        ("suffix", "suffix", "prefix", "both", "end", "begin", "constant", "plain")
    ):
        case "suffix":
            return f"...{one}", lambda word: word + one
        case "prefix":
            return f"{one}...", lambda word: one + word
        case "both":
            return f"{one}...{other}", lambda word: one + word + other
        case "end":
            return f"...-{cut}{one}", lambda word: word[:-cut] + one
        case "begin":
            return f"{one}{cut}-...", lambda word: one + word[cut:]
        case "constant":
            return f"={one}", lambda _: one
        case _:
            return _plain(generator)


def _plain(generator: random.Random) -> tuple[str, Callable[[str], str]]:
    """Rules without an affix."""
    letter = generator.choice("-_.,;:/+*'")
    return generator.choice(
        (
            ("capital", str.capitalize),
            ("same", str),
            ("first", lambda word: word[:1]),
            ("last", lambda word: word[-1:]),
            (f"twice{letter}", lambda word: f"{word}{letter}{word}"),
            (f"mark{letter}", lambda word: word + letter),
        )
    )


def _unseen_rules(form: Sequence[Task], seed: int) -> list[Task]:
    generator = random.Random(f"unseen {seed}")
    asked = {pair.input for task in form for pair in task.asked}
    words = _words([task._replace(shown=task.asked) for task in form])
    shown = [word for word in _words(form) if word not in asked]
    tasks: list[Task] = []
    for kind in ("suffix", "prefix", "both", "end"):
        for _ in range(3):
            name, rule = _rule(generator, held_out=True, kind=kind)
            examples = [Pair(word, rule(word)) for word in generator.sample(shown, 400)]
            questions = [Pair(word, rule(word)) for word in generator.sample(words, 200)]
            tasks.append(Task(name, examples, questions))
    return tasks
