"""`ssmoe state`: recurrent states as files."""

import argparse
from pathlib import Path
from typing import Any

from ssmoe.cli.arguments import add_device, add_json, check_output, load_model, print_json
from ssmoe.cli.extras import require

HELP = "save, inspect, mix and retrieve recurrent states as files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """save RUN FILE (--text | --file | --task) | inspect FILE ... | mix RUN OUT FILE ... | retrieve ..."""
    parser.add_argument("action", choices=("save", "inspect", "mix", "retrieve"))
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="save: RUN FILE; inspect: state files; mix: RUN OUT FILE FILE ...; retrieve: RUN LIBRARY-FOLDER",
    )
    parser.add_argument("--text", help="save, retrieve: the text to read")
    parser.add_argument("--file", help="save, retrieve: read the text of this file")
    parser.add_argument(
        "--task", help="save, retrieve: read examples of this task, a .json of input and output"
    )
    parser.add_argument(
        "--mixable", action="store_true", help="save: as mix and retrieve need it, as with --task"
    )
    parser.add_argument("--shots", type=int, help="examples of --task (default: 32)")
    parser.add_argument("--seed", type=int, help="which examples of --task (default: 0)")
    parser.add_argument("--method", help="mix: mean, sum, norm-kept, decay or any-order (default: mean)")
    parser.add_argument("--weights", type=float, nargs="+", help="mix: of a weighted mean")
    parser.add_argument("--layers", type=int, nargs="+", help="retrieve: layers to compare (default: all)")
    parser.add_argument(
        "--centre", action="store_true", help="retrieve: subtract the library's mean state first"
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", help="inspect: norms, similarity and a map of the states"
    )
    add_device(parser)
    add_json(parser)


_OPTIONS = {
    "text": ("save", "retrieve"),
    "file": ("save", "retrieve"),
    "task": ("save", "retrieve"),
    "shots": ("save", "retrieve"),
    "seed": ("save", "retrieve"),
    "mixable": ("save",),
    "method": ("mix",),
    "weights": ("mix",),
    "layers": ("retrieve",),
    "centre": ("retrieve",),
    "plot": ("inspect",),
    "json": ("inspect", "retrieve"),
}
"""The actions that an option is for."""


def run(arguments: argparse.Namespace) -> int:
    """Do one of them."""
    for name, actions in _OPTIONS.items():
        if getattr(arguments, name) not in (None, False) and arguments.action not in actions:
            raise ValueError(
                f"--{name} is for {' and '.join(actions)}: leave it away with {arguments.action}"
            )
    for name in ("shots", "seed"):
        if getattr(arguments, name) is not None and arguments.task is None:
            raise ValueError(f"--{name} chooses examples of --task: name one, or leave --{name} away")
    match arguments.action:
        case "save":
            return _save(arguments)
        case "mix":
            return _mix(arguments)
        case "retrieve":
            return _retrieve(arguments)
        case _:
            return _inspect(arguments)


def _save(arguments: argparse.Namespace) -> int:
    if len(arguments.paths) != 2:
        raise ValueError("ssmoe state save takes a run and a file: ssmoe state save RUN FILE --text TEXT")
    text = _text(arguments)
    arguments.run, out = arguments.paths
    check_output(out)
    model, tokenizer = load_model(arguments)

    from ssmoe.generation import continuation
    from ssmoe.generation.engine import read
    from ssmoe.soup.library import save_memory

    if arguments.task is not None or arguments.mixable:
        memory = _capture(model, tokenizer, text)
        save_memory(memory, out, model=model, tokenizer=tokenizer)
        what = "the text" if arguments.task is None else f"{_shots(arguments)} examples of {arguments.task}"
        print(f"{out}: {what} in {memory.tokens} tokens, to be mixed or found")
        return 0
    found = read(model, [[tokenizer.end_id, *tokenizer.encode(text)]])
    continuation.save(found, out, model=model, tokenizer=tokenizer)
    print(f"{out}: the state after {found.tokens[0] + 1} tokens; go on with")
    print(f"ssmoe generate {arguments.run} --state-in {out}")
    return 0


def _mix(arguments: argparse.Namespace) -> int:
    if len(arguments.paths) < 4:
        raise ValueError("ssmoe state mix takes a run, a file to write and at least two states to mix")
    arguments.run, out, *sources = arguments.paths
    check_output(out)
    model, tokenizer = load_model(arguments)

    from ssmoe.soup.library import load_memory, save_memory
    from ssmoe.soup.mix import mix

    memories = [load_memory(path, model=model, tokenizer=tokenizer) for path in sources]
    method = arguments.method or "mean"
    mixed = mix(model, memories, method, arguments.weights)
    save_memory(mixed, out, model=model, tokenizer=tokenizer)
    print(f"{out}: {method} of {len(memories)} states, {mixed.tokens} tokens in all")
    return 0


def _retrieve(arguments: argparse.Namespace) -> int:
    if len(arguments.paths) != 2:
        raise ValueError("ssmoe state retrieve takes a run and a library folder, and what to look for")
    text = _text(arguments)
    arguments.run, folder = arguments.paths
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no such library folder: {folder}; fill one with `ssmoe state save --task`")
    model, tokenizer = load_model(arguments)

    from ssmoe.soup.library import Library
    from ssmoe.soup.retrieve import similarities

    library = Library(folder, model, tokenizer)
    names = library.names()
    query = _capture(model, tokenizer, text)
    memories = [library.get(name) for name in names]
    found = similarities([query], memories, arguments.layers, centre=arguments.centre)[0]
    order = found.argsort(descending=True, stable=True)
    ranked = [(names[int(i)], float(found[i])) for i in order]
    if arguments.json:
        print_json([{"name": name, "similarity": similarity} for name, similarity in ranked])
    else:
        for name, similarity in ranked:
            print(f"{similarity:7.4f}  {name}")
    return 0


def _text(arguments: argparse.Namespace) -> str:
    """What --text, --file or --task say."""
    given = [value for value in (arguments.text, arguments.file, arguments.task) if value is not None]
    if len(given) != 1:
        raise ValueError("give the text to read: one of --text, --file or --task")
    if arguments.task is not None:
        from ssmoe.eval.tasks import Template, read_task, split_task

        shots, _ = split_task(read_task(arguments.task), seed=arguments.seed or 0)
        number = _shots(arguments)
        if not 1 <= number <= len(shots):
            raise ValueError(f"--shots {number}: the task has 1 to {len(shots)} examples to show")
        return "".join(Template().example(pair) for pair in shots[:number])
    text = arguments.text if arguments.file is None else Path(arguments.file).read_text(encoding="utf-8")
    if not text:
        raise ValueError("the text is empty: give some to read")
    return text


def _shots(arguments: argparse.Namespace) -> int:
    return 32 if arguments.shots is None else arguments.shots


def _capture(model: Any, tokenizer: Any, text: str) -> Any:
    import torch

    from ssmoe.soup.capture import capture

    ids = torch.tensor([[tokenizer.end_id, *tokenizer.encode(text)]], device=model.embedding.weight.device)
    return capture(model, ids)


def _inspect(arguments: argparse.Namespace) -> int:
    from ssmoe.model import state_file

    if arguments.plot is not None:
        _check_plot(arguments.plot)
    found: list[dict[str, Any]] = []
    states: dict[str, dict[str, Any]] = {}
    for path in arguments.paths:
        header, tensors = state_file.read(path)
        states[path] = tensors
        norms = {name: tensor.double().square().sum().sqrt().item() for name, tensor in tensors.items()}
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        found.append({"path": path, **header._asdict(), "norms": norms, "shapes": shapes})
    if arguments.plot is not None:
        _draw(states, Path(arguments.plot))
    if arguments.json:
        print_json(found)
        return 0
    for one in found:
        print(f"{one['path']}: {len(one['tokens'])} row(s) after {', '.join(map(str, one['tokens']))} tokens")
        print(f"  model {one['model']}  tokenizer {one['tokenizer'] or 'not recorded'}  {one['dtype']}")
        if one["note"]:
            print(f"  {one['note']}")
        for name, norm in one["norms"].items():
            print(f"  {name:<28}{'x'.join(map(str, one['shapes'][name])):>20}   norm {norm:.4g}")
    if arguments.plot is not None:
        print(f"picture: {arguments.plot}")
    return 0


def _check_plot(path: str) -> None:
    require("matplotlib", "plots")
    if not path.endswith(".png"):
        raise ValueError(f"--plot {path}: give a name that ends in .png")
    check_output(path)


def _draw(states: dict[str, dict[str, Any]], path: Path) -> None:
    """Norms and steps a layer, similarities, and a map of the states by their two main directions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ssmoe.soup.picture import overview

    seen = overview(states)
    names = [Path(name).name.removesuffix(".safetensors") for name in states]
    figure = Figure(figsize=(15, 2 + 0.25 * len(names)), layout="constrained")
    norms, steps, alike, plane = figure.subplots(1, 4)
    panels = (
        (norms, "norm of the scan state", seen.norms, seen.layers, None),
        (steps, "sum of delta', mean over channels", seen.steps, seen.layers, None),
        (alike, "mean cosine", seen.similarity, names, (-1, 1)),
    )
    for axes, title, values, columns, limits in panels:
        low, high = limits or (None, None)
        picture = axes.imshow(
            values.numpy(), aspect="auto", vmin=low, vmax=high, cmap="RdBu_r" if limits else "viridis"
        )
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(columns)), columns, fontsize=7, rotation=90 if limits else 0)
        axes.set_yticks(range(len(names)), names if axes is norms else [], fontsize=7)
        figure.colorbar(picture, ax=axes)
    norms.set_xlabel("layer")
    steps.set_xlabel("layer")
    plane.scatter(*seen.places.t().tolist())
    for name, place in zip(names, seen.places, strict=True):
        plane.annotate(name, (float(place[0]), float(place[1])), fontsize=7)
    plane.set_title("two main directions", fontsize=9)
    FigureCanvasAgg(figure).print_figure(path, dpi=90)
