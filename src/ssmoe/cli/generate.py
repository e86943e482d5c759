"""`ssmoe generate`: continue a prompt, streaming."""

import argparse
import sys

from ssmoe.cli.arguments import add_json, add_model, load_model, print_json

HELP = "continue a prompt with a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN --prompt TEXT and the sampling options"""
    add_model(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="keep the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the prompt, then its continuation as it comes."""
    if not arguments.prompt:
        raise ValueError("the prompt is empty: give some text after --prompt")
    model, tokenizer = load_model(arguments)

    from ssmoe.generation.text import generate

    # nothing is shown before generate has accepted the arguments
    shown = False

    def show(row: int, piece: str) -> None:
        nonlocal shown
        del row
        sys.stdout.write(piece if shown else arguments.prompt + piece)
        sys.stdout.flush()
        shown = True

    done = generate(
        model,
        tokenizer,
        [arguments.prompt],
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop=arguments.stop,
        on_text=None if arguments.json else show,
    )
    if arguments.json:
        print_json({"text": done.texts[0], "tokens": done.tokens[0], "reason": done.reasons[0]})
    else:
        show(0, "\n")
    return 0
