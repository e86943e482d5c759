"""`ssmoe eval`: held-out loss, perplexity, bits a byte."""

import argparse
from pathlib import Path
from typing import Any

from ssmoe.cli.arguments import add_json, add_model, load_model, print_json

HELP = "held-out loss, perplexity and bits a byte of a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN [--rows N] [--bigram]"""
    add_model(parser)
    parser.add_argument("--rows", type=int, default=0, help="held-out rows to read (default: 0, all)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows at a time (default: 16)")
    parser.add_argument("--bigram", action="store_true", help="also fit and score bigram count models")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate on the run's own held-out documents, in eval mode (dropless)."""
    if arguments.rows < 0 or arguments.batch_size < 1:
        raise ValueError("--rows must be 0 or more and --batch-size 1 or more")
    model, tokenizer = load_model(arguments)

    from ssmoe.data.prepare import prepare
    from ssmoe.eval.bigram import byte_bigram, token_bigram
    from ssmoe.eval.perplexity import HeldOut, evaluate
    from ssmoe.model.feedforwards.mode import token_choice
    from ssmoe.training.folder import read_run

    config = read_run(_run_folder(Path(arguments.run)))
    data = prepare(config.data, tokenizer=tokenizer)

    def score() -> HeldOut:
        return evaluate(
            model,
            data.held_out,
            context=config.data.context,
            batch_size=arguments.batch_size,
            rows=arguments.rows,
            isolate=config.data.isolate_documents,
            mask_fraction=config.data.mask_fraction,
        )

    result: dict[str, Any] = {"model": {**score()._asdict(), "mode": "eval"}}
    with token_choice(model) as changed:
        if changed:
            result["token_choice"] = {**score()._asdict(), "mode": "eval, token choice"}
    if arguments.bigram:
        result["token_bigram"] = token_bigram(data.train, data.held_out, tokenizer.vocab_size)._asdict()
        result["byte_bigram"] = {"bits_per_byte": byte_bigram(data.train, data.held_out, tokenizer)}
    if arguments.json:
        print_json(result)
    else:
        _print(result)
    return 0


def _run_folder(path: Path) -> Path:
    """The run that a run folder, checkpoint or weights folder belongs to."""
    candidates = (path, *path.absolute().parents[:3])
    for folder in candidates:
        if (folder / "metrics.jsonl").is_file():
            return folder
    raise FileNotFoundError(f"{path} is not in a run folder, whose configuration says which text is held out")


def _print(result: dict[str, Any]) -> None:
    model = result["model"]
    print(
        f"held-out loss {model['loss']:.4f} nats  perplexity {model['perplexity']:.2f}  "
        f"{model['bits_per_byte']:.3f} bits/byte  ({model['targets']:,} targets, eval mode)"
    )
    if "token_choice" in result:
        print(f"with the same weights as token choice: loss {result['token_choice']['loss']:.4f} nats")
    for name in ("token_bigram", "byte_bigram"):
        if name in result:
            bits = result[name]["bits_per_byte"]
            verdict = "the model is better" if model["bits_per_byte"] < bits else "the model is NOT better"
            print(f"{name.replace('_', ' ')} on the same text: {bits:.3f} bits/byte, {verdict}")
