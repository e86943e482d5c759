"""A plan in five lines, its warnings, and its numbers as a dictionary."""

from typing import Any

from ssmoe.config.count import count_parameters
from ssmoe.config.model import MoEConfig
from ssmoe.scaling.law import Law, extrapolations
from ssmoe.scaling.optimum import flops_for_loss, optimum
from ssmoe.scaling.plan import Plan
from ssmoe.scaling.published import DENSE, FINE_GRAINED, JOINT, MOE_64, SAVING_OVER_DENSE, joint


def explain(plan: Plan) -> list[str]:
    """Five lines: budget, model, data, loss, cost."""
    return [
        f"{head:7}{text}"
        for head, text in zip(("budget", "model", "data", "loss", "cost"), _lines(plan), strict=True)
    ]


def warnings(plan: Plan) -> list[str]:
    """What the reader must know before believing the plan."""
    phrases = extrapolations(plan.law, plan.parameters, plan.tokens, plan.shape.granularity)
    lines = [f"extrapolation: {'; '.join(phrases)}"] if phrases else []
    return lines + ([f"law {plan.law.name}: {plan.law.note}"] if plan.law.note else [])


def as_dict(plan: Plan) -> dict[str, Any]:
    """Everything a script may want, in plain numbers."""
    total = count_parameters(plan.run.model)
    return {
        "law": plan.law.name,
        "source": plan.law.source,
        "expansion": plan.law.expansion,
        "granularity": plan.shape.granularity,
        "d_model": plan.shape.d_model,
        "num_blocks": plan.shape.num_blocks,
        "law_parameters": plan.parameters,
        "total_parameters": total.total,
        "active_parameters": total.active,
        "tokens": plan.tokens,
        "steps": plan.run.train.steps,
        "flops": plan.flops,
        "flops_with_head": plan.flops_with_head,
        "loss": plan.loss,
        "saving_over_dense": saving_over_dense(plan),
        "memory_bytes": plan.memory_bytes,
        "seconds": plan.seconds,
        "exact": {**plan.exact._asdict(), "law": plan.law.name},
        "warnings": warnings(plan),
        "run": plan.run.model_dump(mode="json"),
    }


def saving_over_dense(plan: Plan) -> float | None:
    """How many times the FLOPs a dense Transformer needs for the same loss; None without a dense law."""
    law = _dense_law(plan.law)
    if law is None:
        return None
    needed = flops_for_loss((law,), plan.loss)
    return needed / plan.flops if needed < float("inf") else None


def _dense_law(law: Law) -> Law | None:
    """The dense law of the same paper."""
    if law.intervals or law.name == DENSE.name:
        return None
    if JOINT in law.source:
        return joint(1) if law.expansion > 1 else None
    return DENSE if FINE_GRAINED in law.source else None


def _lines(plan: Plan) -> tuple[str, ...]:
    law, train = plan.law, plan.run.train
    head = f"{plan.flops_with_head:.3g} with the head"
    batch = f"{train.steps} steps of {train.batch_size} rows of {plan.run.data.context} tokens"
    time = "" if plan.seconds is None else f"; {_duration(plan.seconds)}"
    return (
        f"{plan.flops:.3g} FLOPs, {head}; law {law.name} ({law.source})",
        _model_line(plan),
        f"{_short(plan.tokens)} tokens: {batch}",
        _loss_line(plan),
        f"{plan.memory_bytes / 1e9:.3g} GB for weights, gradients and AdamW, activations on top{time}",
    )


def _model_line(plan: Plan) -> str:
    model, total = plan.run.model, count_parameters(plan.run.model)
    kinds = ", ".join(layer.kind for layer in model.pattern)
    parts = [f"{plan.shape.num_blocks} x ({kinds}), width {model.d_model}"]
    moe = next((layer for layer in model.pattern if isinstance(layer, MoEConfig)), None)
    if moe:
        per_token = f"{moe.top_k} a token (E = {plan.law.expansion:g}, G = {plan.shape.granularity})"
        parts.append(f"{moe.num_experts} experts of width {moe.d_expert}, {per_token}")
    size = f"{_short(total.non_embedding)} parameters without embeddings"
    parts.append(size + (f", {_short(total.active)} active" if moe else ""))
    return "; ".join(parts)


def _loss_line(plan: Plan) -> str:
    exact, law = plan.exact, plan.law
    parts = [f"{plan.loss:.3f} expected"]
    if law.rmse is not None:
        parts[0] += f" (fit's error {law.rmse:.3f})"
    parts[0] += f", {exact.loss:.3f} at the exact width {exact.d_model:.0f}"
    if plan.others:
        parts.append(", ".join(f"{other.loss:.3f} at G = {other.granularity}" for other in plan.others))
    saving = saving_over_dense(plan)
    if saving is not None:
        said = _paper_says(plan)
        parts.append(f"a dense Transformer needs {saving:.1f} times the FLOPs{said}")
    return "; ".join(parts)


def _paper_says(plan: Plan) -> str:
    """The paper's own saving, where it states one for this budget; its models had no caps."""
    if plan.law.name == MOE_64.name and plan.exact.loss < optimum((plan.law,), plan.exact.flops).loss + 1e-6:
        for flops, text in SAVING_OVER_DENSE:
            if abs(plan.exact.flops / flops - 1) < 0.1:
                return f" (the paper says {text})"
    return ""


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.3g} hours" if seconds >= 3600 else f"{seconds / 60:.3g} minutes"
