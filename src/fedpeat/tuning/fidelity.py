"""How closely an emulator follows its full model: states, predictions, the adapter's gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

from fedpeat.adapter.tunable import Tunable
from fedpeat.data.examples import IGNORED, Examples
from fedpeat.model.blocks import Blocks
from fedpeat.model.modes import evaluating
from fedpeat.model.tracing import states_after
from fedpeat.tuning.distillation import Pair
from fedpeat.tuning.loss import Batch, autocast, batch_of, losses_of, scores

__all__ = ["adapter_gradient", "agreement", "gradient_cosines"]


def agreement(pair: Pair, data: Examples, batch_size: int) -> dict[str, float]:
    """Return how far the two networks agree on some data, at the boundary and in what they predict.

    Returns:
        ``hidden_relative_error``, ||T - S|| / ||T|| over all hidden states T of the full model and
        S of the emulator at the boundary; ``hidden_cosine``, the mean over positions of their
        cosine, or over examples where a block gives no sequence of states; ``logit_kl``, the mean
        over targets of KL(full || emulator) [nat]; ``top1_agreement``, the share of targets for
        which both have the same first guess.
    """
    device = next(pair.student.parameters()).device
    watched = list(zip((pair.teacher, pair.student), pair.meetings[-1], strict=True))
    sums = dict.fromkeys(("error", "norm", "cosine", "positions", "kl", "same", "targets"), 0.0)
    with (
        evaluating(pair.teacher),
        evaluating(pair.student),
        torch.inference_mode(),
        autocast(pair.student, device),
    ):
        for batch in _batches(data, batch_size, device):
            teacher, student = (_seen(model, block, batch) for model, block in watched)
            parts = _states_agree(teacher[0], student[0])
            counts = batch.targets != IGNORED
            for one, two, wanted in zip(teacher[1], student[1], counts, strict=True):
                # one example at a time, since scores are large; for an image ``wanted`` is 0-d
                found = _guesses_agree(one[wanted].float(), two[wanted].float())
                parts = {**parts, **{k: parts.get(k, 0.0) + v for k, v in found.items()}}
            for name, value in parts.items():
                sums[name] += value
    return {
        "hidden_relative_error": (sums["error"] / max(sums["norm"], 1e-30)) ** 0.5,
        "hidden_cosine": sums["cosine"] / sums["positions"],
        "logit_kl": sums["kl"] / max(sums["targets"], 1),
        "top1_agreement": sums["same"] / max(sums["targets"], 1),
    }


def _states_agree(
    teacher: Float[Tensor, "*positions hidden"], student: Float[Tensor, "*positions hidden"]
) -> dict[str, float]:
    teacher, student = teacher.double(), student.double()
    if teacher.ndim != 3:  # not (batch, sequence, hidden), so no axis is known to be the state's
        teacher, student = teacher.flatten(1), student.flatten(1)
    cosines = cosine_similarity(teacher, student, dim=-1)
    return {
        "error": float((teacher - student).pow(2).sum()),
        "norm": float(teacher.pow(2).sum()),
        "cosine": float(cosines.sum()),
        "positions": cosines.numel(),
    }


def _guesses_agree(
    teacher: Float[Tensor, "targets classes"], student: Float[Tensor, "targets classes"]
) -> dict[str, float]:
    divergence = kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True
    )
    same = (teacher.argmax(-1) == student.argmax(-1)).sum()
    return {"kl": float(divergence), "same": float(same), "targets": len(teacher)}


def adapter_gradient(tunable: Tunable, data: Examples, batch_size: int) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over some data by each tensor of the adapter.

    Nothing of the network changes: no ``grad`` is kept, no random number is drawn.
    """
    parameters = list(tunable.parameters.values())
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    num_targets = sum(int(b.num_targets) for b in _batches(data, batch_size, tunable.device))
    with evaluating(tunable.model):
        for batch in _batches(data, batch_size, tunable.device):
            with autocast(tunable.model, tunable.device):
                losses = losses_of(scores(tunable.model, batch), batch.targets)
            loss = losses.sum() / max(num_targets, 1)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total.add_(gradient.float())
    return dict(zip(tunable.parameters, sums, strict=True))


def gradient_cosines(
    full: Mapping[str, Tensor], emulator: Mapping[str, Tensor], blocks: Blocks
) -> dict[str, float]:
    """Return the cosine between an adapter's gradients on the full model and on its emulator.

    Both hold the adapter at equal values and see the same data. Where the gradients point the same
    way, a step that a device makes on the emulator is one that helps the full model; a common
    factor does not matter to Adam. Tensors are matched by name; one of another shape, such as that
    of a narrower layer, is left out. LoRA starts with B = 0, where the gradient of A is exactly 0
    on both networks: the cosine there is that of B's gradients alone. So this is worth asking at
    the start and again after some steps.

    Returns:
        ``gradient_cosine`` over all tensors as one vector, and ``gradient_cosine_block_I`` for
        block I of the full model; one that is not defined, since a gradient is 0 or not finite,
        is left out.

    Source:
        The quantity that GradOT (arXiv:2507.04455) and LLEOT (ACL Findings 2026) ask an emulator to
        keep; LLEOT's reviewers asked to see it measured.
    """
    groups: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, gradient in full.items():
        other = emulator.get(name)
        if other is None or other.shape != gradient.shape:
            continue
        index = blocks.locate(name)
        for group in ("gradient_cosine", f"gradient_cosine_block_{index}"):
            if group == "gradient_cosine" or index is not None:
                groups.setdefault(group, []).append((gradient, other))
    cosines = {name: _cosine(pairs) for name, pairs in groups.items()}
    return {name: value for name, value in cosines.items() if value is not None}


def _cosine(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    dot, one, two = (
        sum(float((pair[i].double() * pair[j].double()).sum()) for pair in pairs)
        for i, j in ((0, 1), (0, 0), (1, 1))
    )
    norm = float(np.sqrt(one) * np.sqrt(two))
    return dot / norm if norm > 0 and np.isfinite(dot / norm) else None


def _batches(data: Examples, batch_size: int, device: torch.device) -> Iterator[Batch]:
    for start in range(0, data.num_examples, batch_size):
        yield batch_of(data, np.arange(start, min(start + batch_size, data.num_examples)), device)


def _seen(
    model: nn.Module, block: nn.Module, batch: Batch
) -> tuple[Float[Tensor, "*positions hidden"], Float[Tensor, "*outputs classes"]]:
    """Return the hidden states that leave a block, and the scores at targets, of one call."""
    with states_after([block]) as states:
        found = scores(model, batch)
    return states[block], found
