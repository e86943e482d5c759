"""The ops in Python floats, one number at a time: what every backend's self-check is held against."""

from math import exp, log, log1p, sqrt

from torch import Tensor

Rows = list[list[float]]


def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Rows:
    """(l, d): the recurrence, one number at a time."""
    d, n = A.shape
    h = [[0.0] * n for _ in range(d)]
    rows: Rows = []
    for t in range(x.shape[0]):
        row: list[float] = []
        for i in range(d):
            step = log1p(exp(float(delta[t, i])))
            for j in range(n):
                h[i][j] = exp(step * float(A[i, j])) * h[i][j] + step * float(B[t, j]) * float(x[t, i])
            row.append(sum(float(C[t, j]) * h[i][j] for j in range(n)))
        rows.append(row)
    return rows


def conv(x: Tensor, weight: Tensor) -> Rows:
    """(l, d): each tap in turn, then SiLU."""
    taps = weight.shape[1]
    rows: Rows = []
    for t in range(x.shape[0]):
        sums = [
            sum(
                float(weight[i, j]) * float(x[t - taps + 1 + j, i])
                for j in range(taps)
                if t - taps + 1 + j >= 0
            )
            for i in range(x.shape[1])
        ]
        rows.append([value / (1 + exp(-value)) for value in sums])
    return rows


def experts(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, share: Tensor) -> Rows:
    """(t, d): each token through its one expert."""
    rows: Rows = []
    for t in range(x.shape[0]):
        e = int(expert[t, 0])
        if e < 0:
            rows.append([0.0] * x.shape[1])
            continue
        hidden = (up[e].double() @ x[t].double()).clamp(min=0)
        output = float(share[t, 0]) * (down[e].double() @ hidden)
        rows.append([float(value) for value in output])
    return rows


def maps(x: Tensor, bank: Tensor, expert: Tensor, share: Tensor) -> Rows:
    """(t, d_out): each token through its one matrix."""
    rows: Rows = []
    for t in range(x.shape[0]):
        e = int(expert[t, 0])
        output = float(share[t, 0]) * (bank[e].double() @ x[t].double()) * (e >= 0)
        rows.append([float(value) for value in output])
    return rows


def linear(x: Tensor, weight: Tensor) -> Rows:
    """(t, d_out): one product after another."""
    return [
        [sum(float(a) * float(b) for a, b in zip(row, column, strict=True)) for column in weight] for row in x
    ]


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Rows:
    """(t, d): layer normalisation of each row."""
    rows: Rows = []
    for row in _matrix(x):
        mean = sum(row) / len(row)
        scale = 1 / sqrt(sum((value - mean) ** 2 for value in row) / len(row) + eps)
        terms = zip(row, _vector(weight), _vector(bias), strict=True)
        rows.append([(value - mean) * scale * w + b for value, w, b in terms])
    return rows


def cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Rows:
    """(1, 1): the mean over rows of log sum exp(logits) - the target's logit."""
    losses: list[float] = []
    for row, target in zip(linear(x, weight), _vector(targets), strict=True):
        logits = [value + b for value, b in zip(row, _vector(bias), strict=True)]
        losses.append(log(sum(exp(value) for value in logits)) - logits[int(target)])
    return [[sum(losses) / len(losses)]]


def step(x: Tensor, weights: dict[str, Tensor], window: Tensor, state: Tensor, eps: float) -> Rows:
    """(b, d): one token through a residual Mamba layer with RMSNorm; `weights` as `mamba_step` names them."""
    in_proj, x_proj, delta_proj, out_proj, taps_of, A_log = (
        _matrix(weights[name])
        for name in ("in_proj", "x_proj", "delta_proj", "out_proj", "conv_weight", "A_log")
    )
    gain, conv_bias, delta_bias, D = (
        _vector(weights[name]) for name in ("norm_weight", "conv_bias", "delta_bias", "D")
    )
    rows: Rows = []
    for row, past, h in zip(_matrix(x), map(_matrix, window), map(_matrix, state), strict=True):
        scale = 1 / sqrt(sum(value * value for value in row) / len(row) + eps)
        inner = _times(in_proj, [value * scale * w for value, w in zip(row, gain, strict=True)])
        d, n = len(past), len(h[0])
        u = [
            _silu(bias + sum(w * value for w, value in zip(taps, [*old, new], strict=True)))
            for taps, bias, old, new in zip(taps_of, conv_bias, past, inner[:d], strict=True)
        ]
        parts = _times(x_proj, u)
        low, B, C = parts[: -2 * n], parts[-2 * n : -n], parts[-n:]
        sums = zip(_times(delta_proj, low), delta_bias, strict=True)
        delta = [log1p(exp(value + bias)) for value, bias in sums]
        y: list[float] = []
        for i in range(d):
            total = D[i] * u[i]
            for j in range(n):
                total += C[j] * (exp(-exp(A_log[i][j]) * delta[i]) * h[i][j] + delta[i] * B[j] * u[i])
            y.append(total * _silu(inner[d + i]))
        rows.append([a + b for a, b in zip(row, _times(out_proj, y), strict=True)])
    return rows


def _vector(x: Tensor) -> list[float]:
    return [float(value) for value in x]


def _matrix(x: Tensor) -> Rows:
    return [_vector(row) for row in x]


def _times(matrix: Rows, vector: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def _silu(value: float) -> float:
    return value / (1 + exp(-value))
