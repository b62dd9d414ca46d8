"""LoRA's pairs of factors and their algebra. NumPy only.

A pair changes a weight by s B A, with A (r, d_in) and B (d_out, r). The scale s, lora_alpha / r or
lora_alpha / sqrt(r), is the adapter's: a device that tunes at a lower rank keeps it. So products of
all devices compare, and no formula here has s in it. No product (d_out, d_in) is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float

from fedpeat.core.errors import AdapterError

__all__ = [
    "Part",
    "State",
    "best_pair",
    "check_only_pairs",
    "lora_pairs",
    "mean_of_products",
    "part_of",
    "product_error",
    "shape_at_rank",
    "truncated",
]

T = TypeVar("T")
State = Mapping[str, np.ndarray]
"""Tensors of an adapter by their name in the full model."""
Part = Literal["all", "lora_A", "lora_B"]
"""The whole adapter, or one factor of every pair."""

_EPS = float(np.finfo(np.float32).eps)  # what is smaller beside 1, float32 cannot tell from 0
_A, _B = ".lora_A.weight", ".lora_B.weight"  # as PEFT writes them into files


def lora_pairs(adapter: State) -> list[tuple[str, str]]:
    """Return the names of A and B of every pair of matrices, in a fixed order.

    Linear layers have such pairs, GPT-2's Conv1D too; LoRA of convolutions and embeddings has other
    shapes or names, and is none.
    """
    stems = [name.removesuffix(_A) for name in sorted(adapter) if name.endswith(_A)]
    return [
        (stem + _A, stem + _B)
        for stem in stems
        if stem + _B in adapter and adapter[stem + _A].ndim == adapter[stem + _B].ndim == 2
    ]


def check_only_pairs(adapter: State) -> None:
    """Check that an adapter has pairs of matrices and nothing else.

    Raises:
        AdapterError: If it has another tensor; its name is in the text.
    """
    others = adapter.keys() - {name for pair in lora_pairs(adapter) for name in pair}
    if others:
        raise AdapterError(
            "an adapter for federated.lora_aggregation other than 'average' must have pairs of "
            f"matrices lora_A.weight, lora_B.weight and nothing else, got {min(others)}"
        )


def part_of(adapter: Mapping[str, T], part: Part) -> dict[str, T]:
    """Return the tensors of one part of an adapter."""
    return {n: a for n, a in adapter.items() if part == "all" or n.endswith(f".{part}.weight")}


def shape_at_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Return the shape that a factor has when its pair is cut to a rank.

    Raises:
        AdapterError: If the tensor is no factor, or the rank is not one that it can be cut to.
    """
    if not name.endswith((_A, _B)):
        raise AdapterError(f"only LoRA can be tuned at a lower rank, got {name}")
    r = shape[0] if name.endswith(_A) else shape[1]
    if not 1 <= rank <= r:
        raise AdapterError(f"rank must be in [1, {r}], got {rank}")
    return (rank, *shape[1:]) if name.endswith(_A) else (shape[0], rank)


def truncated(adapter: State, rank: int) -> dict[str, np.ndarray]:
    """Return the adapter of a lower rank whose products are nearest, pair by pair."""
    cut: dict[str, np.ndarray] = {}
    for name_a, name_b in lora_pairs(adapter):
        exact = _exact(adapter[name_a])
        a, b = best_pair(exact, _exact(adapter[name_b]), spare=exact[:rank])
        cut |= {
            name_a: a.astype(adapter[name_a].dtype),
            name_b: b.astype(adapter[name_b].dtype),
        }
    return cut


def mean_of_products(
    states: Sequence[State], weights: Sequence[float], current: State
) -> dict[str, np.ndarray]:
    """Return the pairs whose products are nearest to the mean product, at the adapter's rank.

    Args:
        states: Pairs of each participant, whose ranks may differ.
        weights: Share of each; together 1.
        current: The round's adapter. It adds nothing to the mean; where that has less than the
            adapter's rank, the current A gives the rest of the new one.

    Source:
        Bai et al. (2024), FlexLoRA; Singhal et al. (2025), FedEx-LoRA, for the exact mean.
    """
    mean: dict[str, np.ndarray] = {}
    for name_a, name_b in lora_pairs(current):
        old_a, old_b = current[name_a], current[name_b]
        stack_a = np.vstack([_exact(s[name_a]) for s in states])
        stack_b = np.hstack([w * _exact(s[name_b]) for w, s in zip(weights, states, strict=True)])
        a, b = best_pair(stack_a, stack_b, spare=_exact(old_a))
        mean |= {name_a: a.astype(old_a.dtype), name_b: b.astype(old_b.dtype)}
    return mean


def best_pair(
    a: Float[np.ndarray, "m d_in"],
    b: Float[np.ndarray, "d_out m"],
    spare: Float[np.ndarray, "rank d_in"],
) -> tuple[Float[np.ndarray, "rank d_in"], Float[np.ndarray, "d_out rank"]]:
    """Return the pair of some rank whose product is nearest to b @ a, by singular values falling.

    QR of both factors, then the SVD of a small core: B = Q_b R_b and A' = Q_a R_a give
    BA = Q_b (R_b R_a') Q_a'. Each side gets the square root of the singular values. The largest
    entry of each row of A is positive, so that signs do not depend on the SVD.

    Args:
        a: One factor.
        b: The other.
        spare: Rows that span what A reads where the product has less than the wanted rank, beside
            zeros in B, as in a fresh pair: with zeros in both, neither would ever get a gradient.

    Source:
        Eckart, Young (1936), The approximation of one matrix by another of lower rank.
    """
    rank = len(spare)
    q_a, r_a = np.linalg.qr(a.T)
    q_b, r_b = np.linalg.qr(b)
    u, values, vt = np.linalg.svd(r_b @ r_a.T)
    roots = np.sqrt(values[values > values[0] * _EPS][:rank])
    k = len(roots)
    rows = vt[:k] @ q_a.T  # (k, d_in), orthonormal
    rows = np.vstack([rows, _directions(spare - spare @ rows.T @ rows, np.linalg.norm(spare))])
    rows = rows[:rank]
    largest = rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)]
    signs = np.where(largest < 0, -1.0, 1.0)
    rows *= signs[:, None]
    rows[:k] *= roots[:, None]
    columns = q_b @ u[:, :k] * (signs[:k] * roots)
    return _filled(rows, (rank, a.shape[1])), _filled(columns, (b.shape[0], rank))


def _directions(
    rows: Float[np.ndarray, "rank d_in"], scale: float | np.floating[Any]
) -> Float[np.ndarray, "found d_in"]:
    """Return orthonormal rows that span some rows, widest first, but for rounding errors."""
    _, values, vt = np.linalg.svd(rows, full_matrices=False)
    found: np.ndarray = vt[values > scale * _EPS]
    return found


def product_error(states: Sequence[State], weights: Sequence[float]) -> float | None:
    """Return ||mean(BA) - mean(B) mean(A)|| / ||mean(BA)||, Frobenius norms over all pairs.

    It is what plain averaging of the factors does wrong. Factors of a lower rank are filled up with
    zeros. A pair's means are over those who have it.

    Args:
        states: Pairs of each participant; those on a smaller rung have fewer.
        weights: Share of each; together 1.

    Returns:
        The error; None where there is no pair, or the mean product is zero.

    Source:
        mean(BA) - mean(B) mean(A) is a covariance, mean((B - mean(B)) (A - mean(A))), which loses
        no digits where all A are equal.
    """
    errors, norms = [], []
    for name_a, name_b in sorted({pair for state in states for pair in lora_pairs(state)}):
        holders = [i for i, state in enumerate(states) if name_a in state]
        own = [states[i] for i in holders]
        total = sum(weights[i] for i in holders)
        if not total:
            continue
        shares = np.asarray([weights[i] / total for i in holders])
        r = max(len(s[name_a]) for s in own)
        a = _stacked([s[name_a] for s in own], (r, own[0][name_a].shape[1]))
        b = _stacked([s[name_b] for s in own], (len(own[0][name_b]), r))
        error, norm = _squared_norms(shares, a, b)
        errors.append(error)
        norms.append(norm)
    norm = math.fsum(norms)
    return math.sqrt(math.fsum(errors) / norm) if norm else None


def _squared_norms(
    shares: Float[np.ndarray, " k"],
    a: Float[np.ndarray, "k r d_in"],
    b: Float[np.ndarray, "k d_out r"],
) -> tuple[float, float]:
    """Return ||mean(BA) - mean(B) mean(A)||^2 and ||mean(BA)||^2, from products of factors only.

    mean(BA) is the covariance plus mean(B) mean(A), so that its norm needs the small products of
    those two alone on top of the covariance's.
    """
    mean_a, mean_b = (np.tensordot(shares, x, axes=1) for x in (a, b))
    stack_a = (a - mean_a).reshape(-1, a.shape[2])  # (k r, d_in)
    stack_b = (b - mean_b).swapaxes(1, 2).reshape(-1, b.shape[1])  # (k r, d_out)
    scale = np.repeat(shares, a.shape[1])
    error = max(0.0, float(scale @ ((stack_b @ stack_b.T) * (stack_a @ stack_a.T)) @ scale))
    cross = float(np.sum(scale @ ((stack_b @ mean_b) * (stack_a @ mean_a.T))))
    mean = float(np.sum((mean_b.T @ mean_b) * (mean_a @ mean_a.T)))
    return error, max(0.0, error + 2 * cross + mean)


def _filled(matrix: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a matrix in float64, filled up with zeros to a shape."""
    (filled,) = _stacked([matrix], shape)
    return np.asarray(filled)


def _stacked(matrices: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Return matrices as one array in float64, each filled up with zeros to the shape."""
    full = np.zeros((len(matrices), *shape))
    for place, matrix in zip(full, matrices, strict=True):
        place[: matrix.shape[0], : matrix.shape[1]] = matrix
    return full


def _exact(matrix: np.ndarray) -> np.ndarray:
    return matrix.astype(np.float64)
