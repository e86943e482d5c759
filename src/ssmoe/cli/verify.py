"""`ssmoe verify`: the layer contract on a trained model's own weights."""

import argparse

from ssmoe.cli.arguments import add_json, print_json

HELP = "check that a trained model computes the same whole, cut, packed, padded and saved"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN [--rows N] [--length N] [--device DEVICE]"""
    parser.add_argument("run", help="a run folder or a checkpoint folder")
    parser.add_argument("--rows", type=int, help="default: 3, or enough to fill a mixture's groups")
    parser.add_argument("--length", type=int, help="tokens a row (default: 48, or the next multiple)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens (default: 0)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the largest and mean error of every layer; 1 when one is beyond its tolerance."""
    rows, length = arguments.rows, arguments.length
    if (rows is not None and rows < 2) or (length is not None and length < 4):
        raise ValueError("--rows must be at least 2 and --length at least 4")

    import torch

    from ssmoe.check.verify import verify
    from ssmoe.model.lm import LM
    from ssmoe.ops import BACKENDS
    from ssmoe.ops.device import resolve_device
    from ssmoe.training.checkpoint import load

    device = resolve_device(arguments.device)
    reference, tokenizer = load(arguments.run, backend="reference", device=device)
    others: dict[str, LM] = {}
    absent: dict[str, str] = {}
    for backend in BACKENDS:
        if reason := _absent(backend, device.type):
            absent[backend] = reason
        else:
            others[f"{backend} float32"], _ = load(arguments.run, backend=backend, device=device)
    generator = torch.Generator().manual_seed(arguments.seed)
    config = reference.config
    shape = (
        rows or -(-3 // config.row_multiple) * config.row_multiple,
        length or max(2, -(-48 // config.length_multiple)) * config.length_multiple,
    )
    ids = torch.randint(tokenizer.vocab_size, shape, generator=generator).to(device)
    findings = verify(reference.double(), others, ids)
    failed = [finding for finding in findings if not finding.passed]
    if arguments.json:
        rows = [{**finding._asdict(), "passed": finding.passed} for finding in findings]
        print_json({"passed": not failed, "findings": rows, "absent": absent})
        return 1 if failed else 0
    for backend, layer in dict.fromkeys((f.backend, f.layer) for f in findings):
        group = [f for f in findings if (f.backend, f.layer) == (backend, layer)]
        cells = (f"{f.check} {f.max_error:.0e} ({f.mean_error:.0e})" for f in group)
        print(f"{backend:<18} {layer:<20} {', '.join(cells)}")
    for backend, reason in absent.items():
        print(f"{backend} is not checked: {reason}")
    print("errors are the largest (mean), relative to the layer's largest output")
    for f in failed:
        print(f"FAILED {f.backend}, {f.layer}, {f.check}: {f.max_error:.1e} is above {f.tolerance:.0e}")
    if not failed:
        print(f"all {len(findings)} checks hold")
    return 1 if failed else 0


def _absent(backend: str, device: str) -> str | None:
    from ssmoe.ops import missing

    home = {"cpu": "cpu", "triton": "cuda"}.get(backend, device)
    return missing(backend) if home == device else f"it runs on {home}, not on {device}"
