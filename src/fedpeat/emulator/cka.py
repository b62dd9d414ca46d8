"""Merge neighbouring blocks that make alike states, and keep the middle one of each group."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.calibration import Batch
from fedpeat.model.blocks import Blocks
from fedpeat.model.tracing import block_calls

__all__ = ["clusters_of_blocks", "linear_cka", "select_by_cka"]


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Return linear centred kernel alignment of two sets of states (rows, width): 1 for the same.

    Source:
        Kornblith et al. (2019), Similarity of neural network representations revisited, eq. 3.
    """
    x, y = first - first.mean(0), second - second.mean(0)
    cross = (x.T @ y).pow(2).sum()
    scale = (x.T @ x).pow(2).sum().sqrt() * (y.T @ y).pow(2).sum().sqrt()
    return float(cross / scale.clamp(min=1e-12))


@torch.no_grad()
def clusters_of_blocks(
    model: nn.Module,
    blocks: Blocks,
    candidates: Sequence[int],
    num_clusters: int,
    batches: Sequence[Batch],
) -> list[list[int]]:
    """Return neighbouring blocks in groups, merged from the most alike pair on.

    Source:
        Zhang et al. (2023), CRaSh, arXiv:2310.15477: adjacent clusters of the highest linear CKA of
        their centres' states are merged.
    """
    states: dict[int, list[Tensor]] = {index: [] for index in candidates}
    for batch in batches:
        for index, call in block_calls(model, blocks, candidates, batch).items():
            states[index].append(call.states[1].float().flatten(0, -2))
    if idle := [index for index, parts in states.items() if not parts]:
        raise EmulatorError(f"cka compares what blocks give; {idle} do not run for text")
    rows = {index: torch.cat(parts) for index, parts in states.items()}
    clusters = [[index] for index in candidates]
    while len(clusters) > num_clusters:
        likeness = [
            linear_cka(rows[_centre(a)], rows[_centre(b)]) for a, b in itertools.pairwise(clusters)
        ]
        best = max(range(len(likeness)), key=lambda i: (likeness[i], -i))
        clusters[best : best + 2] = [clusters[best] + clusters[best + 1]]
    return clusters


def _centre(cluster: Sequence[int]) -> int:
    return cluster[(len(cluster) - 1) // 2]


def select_by_cka(
    model: nn.Module,
    blocks: Blocks,
    candidates: Sequence[int],
    num_kept: int,
    batches: Sequence[Batch],
) -> list[int]:
    """Return the middle block of each cluster, rising."""
    clusters = clusters_of_blocks(model, blocks, candidates, num_kept, batches)
    return [_centre(cluster) for cluster in clusters]
