"""`ssmoe generate`: continue a prompt, streaming."""

import argparse
import sys
from typing import Any

from ssmoe.cli.arguments import add_json, add_model, check_output, load_model, print_json

HELP = "continue a prompt with a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN --prompt TEXT and the sampling options"""
    add_model(parser)
    parser.add_argument("--prompt", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="keep the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--seed", type=int, help="default: 0")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    parser.add_argument(
        "--state-in", metavar="FILE", help="go on from a state; --prompt may then be left away"
    )
    parser.add_argument("--state-out", metavar="FILE", help="save where this ended, for --state-in")
    parser.add_argument(
        "--batch-invariant",
        action="store_true",
        help="the same bits as the prompt gets in any batch (see ssmoe.generate)",
    )
    parser.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        help="decode by CUDA graphs, on a GPU (default: where the model can)",
    )
    parser.add_argument("-n", type=int, default=1, help="how many continuations (default: 1)")
    parser.add_argument(
        "--beams", type=int, help="search for the likeliest with so many beams, without chance"
    )
    parser.add_argument("--store", metavar="FOLDER", help="keep states of prompts here and begin from them")
    parser.add_argument(
        "--store-every", type=int, metavar="TOKENS", help="--store: a state each (default: 256)"
    )
    parser.add_argument("--store-mb", type=int, metavar="MB", help="--store: room for states (default: 1024)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the prompt, then its continuation as it comes."""
    if arguments.prompt is None and arguments.state_in is None:
        message = "give --prompt TEXT or --state-in FILE; see `ssmoe generate --help`"
        print(f"ssmoe generate: {message}", file=sys.stderr)
        return 2
    if not arguments.prompt and arguments.state_in is None:
        raise ValueError("the prompt is empty: give some text after --prompt")
    prompt = arguments.prompt or ""
    if arguments.state_out:
        check_output(arguments.state_out, "--state-out ")
    _check(arguments)
    model, tokenizer = load_model(arguments)

    from ssmoe.generation import continuation
    from ssmoe.generation.text import generate

    start = None
    if arguments.state_in:
        start = continuation.load(arguments.state_in, model=model, tokenizer=tokenizer)
    unread = prompt
    if arguments.store:
        start, unread = _read_through(arguments, model, tokenizer, prompt), ""
    if arguments.beams is not None:
        return _search(arguments, model, tokenizer, prompt, unread, start)

    # nothing is shown before generate has accepted the arguments
    shown = False

    def show(row: int, piece: str) -> None:
        nonlocal shown
        del row
        sys.stdout.write(piece if shown else prompt + piece)
        sys.stdout.flush()
        shown = True

    done = generate(
        model,
        tokenizer,
        [unread],
        max_new_tokens=arguments.max_new_tokens,
        temperature=0.8 if arguments.temperature is None else arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed or 0,
        stop=arguments.stop,
        state=start,
        n=arguments.n,
        on_text=None if arguments.json or arguments.n > 1 else show,
        graph=arguments.graph,
        batch_invariant=arguments.batch_invariant,
    )
    if arguments.state_out:
        continuation.save(done.continuation, arguments.state_out, model=model, tokenizer=tokenizer)
    found = [
        {"text": text, "tokens": tokens, "reason": reason}
        for text, tokens, reason in zip(done.texts, done.tokens, done.reasons, strict=True)
    ]
    if arguments.json:
        print_json(found[0] if arguments.n == 1 else found)
    elif arguments.n > 1:
        for number, text in enumerate(done.texts, 1):
            print(f"-- {number}\n{prompt}{text}")
    else:
        show(0, "\n")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other."""
    if arguments.n > 1 and arguments.state_out:
        raise ValueError(f"-n {arguments.n} ends in as many places: leave --state-out away, or -n")
    if arguments.store and arguments.state_in:
        raise ValueError("--store begins from the prompt: leave --state-in away, or --store")
    for name, value in (("--store-every", arguments.store_every), ("--store-mb", arguments.store_mb)):
        if value is not None and not arguments.store:
            raise ValueError(f"{name} belongs to --store FOLDER: name one, or leave {name} away")
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: give at least 1")
    if arguments.beams is not None:
        given = {"--top-k": arguments.top_k, "--top-p": arguments.top_p, "--stop": arguments.stop or None}
        given |= {"--temperature": arguments.temperature, "--seed": arguments.seed}
        given["--state-out"] = arguments.state_out
        given |= {"--graph": arguments.graph, "--batch-invariant": arguments.batch_invariant or None}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"--beams searches for the likeliest text: leave {name} away, or --beams")


def _read_through(arguments: argparse.Namespace, model: Any, tokenizer: Any, prompt: str) -> Any:
    """The prompt's continuation, its state begun from what the store has and left there for the next time."""
    from ssmoe.generation.engine import Continuation
    from ssmoe.generation.store import StateStore, read_through

    store = StateStore(arguments.store, model, tokenizer, budget_bytes=(arguments.store_mb or 1024) << 20)
    ids = [tokenizer.end_id, *tokenizer.encode(prompt)]
    found = read_through(store, ids, every=arguments.store_every or 256)
    return Continuation(found.state, (found.tokens,), ((ids[-1],),))


def _search(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, prompt: str, unread: str, start: Any
) -> int:
    """Print the likeliest continuations, best first."""
    from ssmoe.generation.beam import beam_search

    [found] = beam_search(
        model,
        tokenizer,
        [unread],
        beams=arguments.beams,
        n=arguments.n,
        max_new_tokens=arguments.max_new_tokens,
        start=start,
    )
    if arguments.json:
        print_json([hypothesis._asdict() for hypothesis in found])
        return 0
    for number, hypothesis in enumerate(found, 1):
        if arguments.n > 1:
            print(f"-- {number}, {hypothesis.log_probability:.2f} nats")
        print(f"{prompt}{hypothesis.text}")
    return 0
