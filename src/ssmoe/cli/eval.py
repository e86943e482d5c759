"""`ssmoe eval`: loss, perplexity, bits a byte, on the run's held-out text or any other."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ssmoe.cli.arguments import add_json, add_model, load_model, print_json
from ssmoe.config.data import DataConfig

HELP = "held-out loss, perplexity and bits a byte of a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN [--data PATH ...] [--context N] [--rows N] [--bigram]"""
    add_model(parser)
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="read all of these files instead of the run's held-out text"
    )
    parser.add_argument("--context", type=int, help="tokens a row (default: the run's, or 256 without a run)")
    parser.add_argument("--rows", type=int, default=0, help="rows to read (default: 0, all)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at a time (default: 16)")
    parser.add_argument("--bigram", action="store_true", help="also fit and score bigram count models")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate in eval mode (dropless): on the run's own held-out documents, or on --data."""
    if arguments.rows < 0 or arguments.batch_size < 1:
        raise ValueError("--rows must be 0 or more and --batch-size 1 or more")
    if arguments.context is not None and arguments.context < 1:
        raise ValueError(f"--context {arguments.context}: must be 1 or more")
    if arguments.bigram and arguments.data:
        raise ValueError("--bigram is fitted on the run's own text: leave --data or --bigram away")
    model, tokenizer = load_model(arguments)

    from ssmoe.data.prepare import prepare, prepare_text
    from ssmoe.eval.bigram import byte_bigram, token_bigram
    from ssmoe.eval.perplexity import HeldOut, evaluate
    from ssmoe.model.feedforwards.mode import token_choice
    from ssmoe.training.folder import find_run, read_environment, read_run

    folder = find_run(Path(arguments.run))
    if folder is None and not arguments.data:
        raise ValueError(
            f"{arguments.run} is not in a run folder, whose configuration says which text is held out: "
            "name text with --data"
        )
    config = DataConfig() if folder is None else read_run(folder).data
    data = None
    if arguments.data:
        corpus = prepare_text(config.model_copy(update={"sources": tuple(arguments.data)}), tokenizer)
    else:
        data = prepare(config, tokenizer=tokenizer)
        corpus = data.held_out
        if folder is not None and read_environment(folder)["data"]["content"] != data.content_hash:
            print(
                "ssmoe: the text has changed since the run began, and so has what is held out",
                file=sys.stderr,
            )

    def score() -> HeldOut:
        return evaluate(
            model,
            corpus,
            context=arguments.context or config.context,
            batch_size=arguments.batch_size,
            rows=arguments.rows,
            isolate=config.isolate_documents,
            mask_fraction=config.mask_fraction,
        )

    text = "data" if arguments.data else "held-out"
    result: dict[str, Any] = {"text": text, "model": {**score()._asdict(), "mode": "eval"}}
    with token_choice(model) as changed:
        if changed:
            result["token_choice"] = {**score()._asdict(), "mode": "eval, token choice"}
    if arguments.bigram and data is not None:
        result["token_bigram"] = token_bigram(data.train, data.held_out, tokenizer.vocab_size)._asdict()
        result["byte_bigram"] = {"bits_per_byte": byte_bigram(data.train, data.held_out, tokenizer)}
    if arguments.json:
        print_json(result)
    else:
        _print(result)
    return 0


def _print(result: dict[str, Any]) -> None:
    model = result["model"]
    print(
        f"{result['text']} loss {model['loss']:.4f} nats  perplexity {model['perplexity']:.2f}  "
        f"{model['bits_per_byte']:.3f} bits/byte  ({model['targets']:,} targets, eval mode)"
    )
    if "token_choice" in result:
        print(f"with the same weights as token choice: loss {result['token_choice']['loss']:.4f} nats")
    for name in ("token_bigram", "byte_bigram"):
        if name in result:
            bits = result[name]["bits_per_byte"]
            verdict = "the model is better" if model["bits_per_byte"] < bits else "the model is NOT better"
            print(f"{name.replace('_', ' ')} on the same text: {bits:.3f} bits/byte, {verdict}")
