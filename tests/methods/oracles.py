"""Merge methods once more, in slow float64 loops written from the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def kept(values: Matrix, count: int) -> list[bool]:
    """Which entries are the `count` largest by size, the first in row order among equals."""
    sizes = [abs(float(x)) for x in values.ravel()]
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    chosen = set(order[:count])
    return [i in chosen for i in range(len(sizes))]


def rounded(share: float, size: int) -> int:
    """As PEFT and mergekit count: rounded down."""
    return int(share * size)


def trim(values: Matrix, density: float, outliers: float = 0.0) -> Matrix:
    skip = rounded(outliers, values.size)
    count = max(1, rounded(density, values.size))
    keep, drop = kept(values, min(values.size, skip + count)), kept(values, skip)
    flat = [x if k and not d else 0.0 for x, k, d in zip(values.ravel(), keep, drop, strict=True)]
    return np.array(flat).reshape(values.shape)


def consensus(deltas: Sequence[Matrix], weights: Sequence[float], order: str, normalize: bool) -> Matrix:
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(merged.shape):
        values = [float(delta[place]) for delta in deltas]
        votes = values if order == "elect-first" else [w * x for w, x in zip(weights, values, strict=True)]
        sign = 1 if sum(votes) >= 0 else -1
        agree = [i for i, vote in enumerate(votes) if vote * sign > 0]
        total = sum(weights[i] * values[i] for i in agree)
        divisor: float = 1.0
        if normalize and agree:
            divisor = len(agree) if order == "elect-first" else sum(weights[i] for i in agree) or 1.0
        merged[place] = total / divisor
    return merged


def della_chances(values: Matrix, density: float, epsilon: float) -> Matrix:
    chances = np.zeros_like(values)
    for r, row in enumerate(values):
        for rank, column in enumerate(sorted(range(len(row)), key=lambda c: (abs(row[c]), c))):
            chances[r, column] = density + epsilon * (rank / (len(row) - 1) - 0.5)
    return chances


def slerp(one: Matrix, other: Matrix, t: float) -> Matrix:
    x, y = one.ravel(), other.ravel()
    angle = math.acos(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)))
    return (math.sin((1 - t) * angle) * one + math.sin(t * angle) * other) / math.sin(angle)


def karcher(deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Fixed-step Riemannian gradient descent on dense unit vectors."""
    lengths = [float(np.linalg.norm(delta)) for delta in deltas]
    points = [delta.ravel() / length for delta, length in zip(deltas, lengths, strict=True)]
    shares = [weight / sum(weights) for weight in weights]
    mean = points[0].copy()
    for _ in range(2000):
        step = np.zeros_like(mean)
        for share, point in zip(shares, points, strict=True):
            cosine = min(1.0, max(-1.0, float(mean @ point)))
            away = point - cosine * mean
            size = float(np.linalg.norm(away))
            if size > 1e-15:
                step += share * math.acos(cosine) * away / size
        mean = mean + 0.5 * step
        mean /= np.linalg.norm(mean)
    length = sum(w * size for w, size in zip(weights, lengths, strict=True))
    return length * mean.reshape(deltas[0].shape)


def model_stock(deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    k, cosines = len(deltas), []
    for i in range(k):
        for j in range(i + 1, k):
            x, y = deltas[i].ravel(), deltas[j].ravel()
            cosines.append(float(x @ y) / (np.linalg.norm(x) * np.linalg.norm(y)))
    cosine = min(1.0, max(0.0, sum(cosines) / len(cosines)))
    t = k * cosine / (1 + (k - 1) * cosine)
    return t * sum((w * d for w, d in zip(weights, deltas, strict=True)), np.zeros_like(deltas[0]))


def knots(deltas: Sequence[Matrix], weights: Sequence[float], density: float, order: str) -> Matrix:
    u, sigma, vh = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    rank = int((sigma > 1e-10 * sigma[0]).sum())
    u, rows = u[:, :rank], sigma[:rank, None] * vh[:rank]
    # The part of a zero delta is zero, not the rounding of the joint SVD, which would count as entries.
    parts = [part * delta.any() for part, delta in zip(np.split(rows, len(deltas), axis=1), deltas, strict=True)]
    parts = [trim(part, density) for part in parts]
    return u @ consensus(parts, weights, order, normalize=True)


def tsv(deltas: Sequence[Matrix], weights: Sequence[float], share: float | None) -> Matrix:
    """Without a share the paper's rule: of min(out, in) singular values one in so many as there are deltas."""
    if 1 in deltas[0].shape:
        return np.asarray(sum(w * d for w, d in zip(weights, deltas, strict=True)))
    left, sigma, right = [], [], []
    acting = sum(bool(delta.any()) for delta in deltas)
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        rank = int((s > 1e-10 * s[0]).sum())
        count = max(1, min(delta.shape) // acting) if share is None else math.ceil(share * rank - 1e-9)
        count = min(count, rank)
        left.append(u[:, :count])
        sigma.extend(weight * s[:count])
        right.append(vh[:count].T)

    def polar(columns: Matrix) -> Matrix:
        p, lengths, qh = np.linalg.svd(columns, full_matrices=False)
        spans = lengths > 1e-10 * lengths[0]
        return p[:, spans] @ qh[spans]

    return polar(np.concatenate(left, axis=1)) @ np.diag(sigma) @ polar(np.concatenate(right, axis=1)).T


def iso_c(deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    u, s, vh = np.linalg.svd(sum(w * d for w, d in zip(weights, deltas, strict=True)), full_matrices=False)
    rank = int((s > 1e-10 * s[0]).sum())
    return s[:rank].mean() * u[:, :rank] @ vh[:rank]


def fisher(deltas: Sequence[Matrix], weights: Sequence[float], found: Sequence[Matrix]) -> Matrix:
    merged = np.zeros_like(deltas[0])
    for place in np.ndindex(merged.shape):
        shares = [w * float(f[place]) for w, f in zip(weights, found, strict=True)]
        if sum(shares) == 0:
            shares = list(weights)
        merged[place] = sum(s * float(d[place]) for s, d in zip(shares, deltas, strict=True)) / sum(shares)
    return merged


def regmean(deltas: Sequence[Matrix], weights: Sequence[float], inputs: Sequence[Matrix]) -> Matrix:
    """Least squares: min over D of sum_i w_i |X_i D^T - X_i D_i^T|^2."""
    rows = np.concatenate([math.sqrt(w) * x for w, x in zip(weights, inputs, strict=True)])
    wanted = np.concatenate([math.sqrt(w) * x @ d.T for w, x, d in zip(weights, inputs, deltas, strict=True)])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T


def wudi(deltas: Sequence[Matrix], weights: Sequence[float], ridge: float) -> Matrix:
    """Least squares: min over D of sum_i |(D - w_i D_i) D_i^T|^2 / |D_i|^2 + rho |D - sum_i w_i D_i|^2."""
    total = np.asarray(sum(w * d for w, d in zip(weights, deltas, strict=True)))
    acting = [(w, d) for w, d in zip(weights, deltas, strict=True) if d.any()]
    # the mean is over the directions that a delta reads
    read = np.linalg.matrix_rank(np.concatenate([d for _, d in acting])) if acting else 1
    rho = ridge * len(acting) / read
    rows = np.concatenate([*(d / np.linalg.norm(d) for _, d in acting), math.sqrt(rho) * np.eye(total.shape[1])])
    wanted = [w * d @ d.T / np.linalg.norm(d) for w, d in acting]
    # what is wanted beyond the sum, so that the least solution adds nothing where no delta reads
    missing = np.concatenate([*wanted, math.sqrt(rho) * total], axis=1) - total @ rows.T
    return total + np.linalg.lstsq(rows, missing.T, rcond=1e-10)[0].T


def do_merging(deltas: Sequence[Matrix], weights: Sequence[float], per: str) -> Matrix:
    merged = np.zeros_like(deltas[0])
    columns = [slice(j, j + 1) for j in range(merged.shape[1])] if per == "column" else [slice(None)]
    for part in columns:
        lengths = [float(np.linalg.norm(delta[:, part])) for delta in deltas]
        acting = [i for i, length in enumerate(lengths) if length > 0]
        share = sum(abs(weights[i]) for i in acting)
        if share:
            mean = sum(abs(weights[i]) * lengths[i] for i in acting) / share
            merged[:, part] = sum(weights[i] * deltas[i][:, part] * mean / lengths[i] for i in acting)
    return merged
