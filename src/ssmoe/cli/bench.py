"""`ssmoe bench`: how fast a preset runs on this machine."""

import argparse

from ssmoe.cli.arguments import add_json, add_preset, print_json, read_run_config

HELP = "time forward, backward, training step, prefill and decoding of a preset"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PRESET [key=value ...] [--batch N] [--context N]"""
    add_preset(parser)
    parser.add_argument("--batch", type=int, help="rows (default: the preset's micro-batch)")
    parser.add_argument("--context", type=int, help="tokens a row (default: the preset's)")
    parser.add_argument("--decode-tokens", type=int, default=32, help="tokens to decode (default: 32)")
    parser.add_argument("--repeats", type=int, default=5, help="medians of this many (default: 5)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print medians and tokens a second."""
    config, _ = read_run_config(arguments.preset, arguments.overrides)
    preset_batch = config.train.micro_batch_size or config.train.batch_size
    batch = preset_batch if arguments.batch is None else arguments.batch
    context = config.data.context if arguments.context is None else arguments.context
    if min(batch, context, arguments.decode_tokens, arguments.repeats) < 1:
        raise ValueError("--batch, --context, --decode-tokens and --repeats must be at least 1")

    import torch

    from ssmoe.check.bench import bench
    from ssmoe.model.build import build
    from ssmoe.ops.device import resolve_device
    from ssmoe.training.folder import device_name

    dtype = torch.bfloat16 if config.train.precision == "bfloat16" else None
    device = resolve_device(config.train.device)
    model = build(config.model, backend=config.train.backend, device=device, dtype=dtype)
    rows = bench(
        model, batch=batch, context=context, decode_tokens=arguments.decode_tokens, repeats=arguments.repeats
    )
    where = f"{device_name(config.train.device)}, {torch.get_num_threads()} threads, backend {model.backend}"
    if arguments.json:
        timings = [row._asdict() for row in rows]
        print_json({"where": where, "batch": batch, "context": context, "timings": timings})
        return 0
    print(f"{config.name}: {batch} rows of {context} tokens, {config.train.precision}; {where}")
    for row in rows:
        print(f"  {row.name:<20} {row.seconds * 1e3:>10.1f} ms {row.tokens_per_second:>12,.0f} tokens/s")
    if reason := config.model.why_no_generation():
        print(f"  no decoding: {reason}")
    return 0
