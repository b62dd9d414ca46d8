"""The loss of a causal language model on packed blocks."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedpeat.data.packing import PackedText

__all__ = ["autocast", "batch_of", "mean_loss", "mean_loss_of_logits", "token_losses"]

Batch = tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]


def batch_of(data: PackedText, rows: np.ndarray, device: torch.device) -> Batch:
    """Return token ids and loss mask of some blocks on a device."""
    ids = torch.from_numpy(data.input_ids[rows].astype(np.int64)).to(device)
    return ids, torch.from_numpy(data.loss_mask[rows]).to(device)


def token_losses(model: nn.Module, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq-1"]:
    """Return the negative log-likelihood of every token but the first of its block [nat]."""
    return _losses(model(input_ids=ids, use_cache=False).logits, ids)


def mean_loss(
    model: nn.Module, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Return the mean over the tokens that count; 0 where none does."""
    return mean_loss_of_logits(model(input_ids=ids, use_cache=False).logits, ids, mask)


def mean_loss_of_logits(
    logits: Float[Tensor, "batch positions vocab"],
    ids: Int[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    """Return the same from what a model has put out."""
    wanted = mask[:, 1:]
    return (_losses(logits, ids) * wanted).sum() / wanted.sum().clamp(min=1)


def _losses(
    logits: Float[Tensor, "batch positions vocab"], ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq-1"]:
    """Return every token's loss; a soft prompt makes positions at the front, which are cut off."""
    predicting = logits[:, -ids.shape[1] : -1]
    flat = cross_entropy(predicting.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return flat.view(ids.shape[0], -1)


def autocast(model: nn.Module, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Compute in the frozen weights' 16-bit type where they have one, else as is."""
    dtype = next(
        (p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None
    )
    return torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext()
