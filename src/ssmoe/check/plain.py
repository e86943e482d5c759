"""The ops in Python floats, one number at a time: what every backend's self-check is held against."""

from math import cos, exp, log, log1p, sin, sqrt

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


def experts(x: Tensor, up: Tensor, down: Tensor, shares: Rows) -> Rows:
    """(t, d): each token through its experts; shares: (t, e), a token's weight at each expert, or 0."""
    rows: Rows = []
    for token, row in zip(_matrix(x), shares, strict=True):
        total = [0.0] * len(token)
        for e, share in enumerate(row):
            hidden = [max(value, 0.0) for value in _times(_matrix(up[e]), token)]
            total = [a + share * b for a, b in zip(total, _times(_matrix(down[e]), hidden), strict=True)]
        rows.append(total)
    return rows


def maps(x: Tensor, bank: Tensor, shares: Rows) -> Rows:
    """(t, d_out): each token through its matrices; shares as in `experts`."""
    rows: Rows = []
    for token, row in zip(_matrix(x), shares, strict=True):
        outputs = [_times(_matrix(matrix), token) for matrix in bank]
        rows.append(
            [sum(w * y for w, y in zip(row, column, strict=True)) for column in zip(*outputs, strict=True)]
        )
    return rows


def spread(expert: Tensor, share: Tensor, e: int) -> Rows:
    """(t, e): the weight of each token's one expert in its column; expert, share: (t, 1), -1 is none."""
    pairs = zip(vector(expert.flatten()), vector(share.flatten()), strict=True)
    return [[weight * (i == chosen) for i in range(e)] for chosen, weight in pairs]


def route(scores: Rows, bias: Tensor, k: int, *, normalise: bool) -> Rows:
    """(t, e): the scores of the k experts of largest score + bias, the others 0."""
    rows: Rows = []
    for row in scores:
        choice = [value + shift for value, shift in zip(row, vector(bias), strict=True)]
        best = sorted(range(len(row)), key=lambda i: -choice[i])[:k]
        total = sum(row[i] for i in best) if normalise else 1.0
        rows.append([row[i] / total * (i in best) for i in range(len(row))])
    return rows


def with_load(shares: Rows) -> Rows:
    """The rows, and one more: how many of them have a weight at each expert."""
    return [*shares, [float(sum(weight > 0 for weight in column)) for column in zip(*shares, strict=True)]]


def sigmoid(x: Tensor) -> Rows:
    """1 / (1 + exp(-x))"""
    return [[1 / (1 + exp(-value)) for value in row] for row in _matrix(x)]


def softmax(rows: Rows) -> Rows:
    """exp(x) over its sum along a row"""
    return [[exp(value) / sum(map(exp, row)) for value in row] for row in rows]


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
        terms = zip(row, vector(weight), vector(bias), strict=True)
        rows.append([(value - mean) * scale * w + b for value, w, b in terms])
    return rows


def cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Rows:
    """(1, 1): the mean over rows of log sum exp(logits) - the target's logit."""
    losses: list[float] = []
    for row, target in zip(linear(x, weight), vector(targets), strict=True):
        logits = [value + b for value, b in zip(row, vector(bias), strict=True)]
        losses.append(log(sum(exp(value) for value in logits)) - logits[int(target)])
    return [[sum(losses) / len(losses)]]


def step(x: Tensor, weights: dict[str, Tensor], window: Tensor, state: Tensor, eps: float) -> Rows:
    """(b, d): one token through a residual Mamba layer with RMSNorm; `weights` as `mamba_step` names them."""
    in_proj, x_proj, delta_proj, out_proj, taps_of, A_log = (
        _matrix(weights[name])
        for name in ("in_proj", "x_proj", "delta_proj", "out_proj", "conv_weight", "A_log")
    )
    gain, conv_bias, delta_bias, D = (
        vector(weights[name]) for name in ("norm_weight", "conv_bias", "delta_bias", "D")
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


def attention(qkv: Tensor, keys: Tensor, values: Tensor, lengths: list[int], base: float) -> Rows:
    """(b, h * d): each row's new query over `lengths` cached tokens and the new one, rotated by position."""
    h, d = keys.shape[1], keys.shape[3]
    rows: Rows = []
    for b, past in enumerate(lengths):
        new = [vector(part) for part in qkv[b].view(3 * h, d)]
        row: list[float] = []
        for i in range(h):
            q, k = _rotate(new[i], past, base), _rotate(new[h + i], past, base)
            seen = [*_matrix(keys[b, i, :past]), k]
            weights = softmax([[value / sqrt(d) for value in _times(seen, q)]])[0]
            columns = zip(*_matrix(values[b, i, :past]), new[2 * h + i], strict=True)
            row += [sum(w * v for w, v in zip(weights, column, strict=True)) for column in columns]
        rows.append(row)
    return rows


def adamw(
    value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: int, *, rate: float,
    betas: tuple[float, float], eps: float, decay: float,
) -> Rows:  # fmt: skip
    """(3 * rows, columns): the parameter, the mean and the mean square after one update, below each other."""
    found: list[Rows] = [[], [], []]
    for row in zip(*map(_matrix, (value, gradient, mean, square)), strict=True):
        new: Rows = []
        for p, g, m, v in zip(*row, strict=True):
            m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
            first, second = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
            new.append([p - rate * decay * p - rate * first / (sqrt(second) + eps), m, v])
        for part, column in zip(found, zip(*new, strict=True), strict=True):
            part.append(list(column))
    return [row for part in found for row in part]


def muon(
    gradient: Tensor,
    momentum: Tensor,
    passes: tuple[tuple[float, float, float], ...],
    *,
    rate: float,
    mu: float,
) -> Rows:
    """A wide matrix of zeros after one update, the gradient's Gram matrix bounded by its norm."""
    pairs = [list(zip(*pair, strict=True)) for pair in zip(_matrix(gradient), _matrix(momentum), strict=True)]
    moved = [[mu * (mu * m + (1 - mu) * g) + (1 - mu) * g for g, m in row] for row in pairs]
    norm = sum(value * value for row in _gram(moved) for value in row) ** 0.25
    x = [[value / norm for value in row] for row in moved]
    for a, b, c in passes:
        gram = _gram(x)
        factor = [
            [
                a * (i == j) + b * gram[i][j] + c * sum(map(float.__mul__, gram[i], gram[j]))
                for j in range(len(x))
            ]
            for i in range(len(x))
        ]
        x = [_times([list(column) for column in zip(*x, strict=True)], row) for row in factor]
    size = rate * 0.2 * sqrt(max(len(x), len(x[0])))
    return [[-size * value for value in row] for row in x]


def _rotate(x: list[float], position: int, base: float) -> list[float]:
    half = len(x) // 2
    angles = [position * base ** (-i / half) for i in range(half)]
    pairs = list(zip(x[:half], x[half:], angles, strict=True))
    first = [a * cos(angle) - b * sin(angle) for a, b, angle in pairs]
    return first + [b * cos(angle) + a * sin(angle) for a, b, angle in pairs]


def _gram(x: Rows) -> Rows:
    return [_times(x, row) for row in x]


def vector(x: Tensor) -> list[float]:
    """Of one dimension."""
    return [float(value) for value in x]


def _matrix(x: Tensor) -> Rows:
    return [vector(row) for row in x]


def _times(matrix: Rows, vector: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def _silu(value: float) -> float:
    return value / (1 + exp(-value))
