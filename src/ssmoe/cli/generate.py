"""`ssmoe generate`: continue a prompt, streaming."""

import argparse
import sys
from pathlib import Path

from ssmoe.cli.arguments import add_json, add_model, load_model, print_json

HELP = "continue a prompt with a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN --prompt TEXT and the sampling options"""
    add_model(parser)
    parser.add_argument("--prompt", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="keep the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
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
        action="store_true",
        help="decode by CUDA graphs, on a GPU",
    )
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
    if arguments.state_out and not Path(arguments.state_out).absolute().parent.is_dir():
        raise FileNotFoundError(
            f"--state-out {arguments.state_out}: its folder does not exist; make it first"
        )
    model, tokenizer = load_model(arguments)

    from ssmoe.generation import continuation
    from ssmoe.generation.text import generate

    start = None
    if arguments.state_in:
        start = continuation.load(arguments.state_in, model=model, tokenizer=tokenizer)

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
        [prompt],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=arguments.stop,
        state=start,
        on_text=None if arguments.json else show,
        graph=arguments.graph,
        batch_invariant=arguments.batch_invariant,
    )
    if arguments.state_out:
        continuation.save(done.continuation, arguments.state_out, model=model, tokenizer=tokenizer)
    if arguments.json:
        print_json({"text": done.texts[0], "tokens": done.tokens[0], "reason": done.reasons[0]})
    else:
        show(0, "\n")
    return 0
