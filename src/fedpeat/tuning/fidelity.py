"""How closely an emulator follows its full model: states, predictions, the adapter's gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div

from fedpeat.adapter.tunable import Tunable
from fedpeat.data.packing import PackedText
from fedpeat.model.blocks import Blocks
from fedpeat.model.modes import evaluating
from fedpeat.model.tracing import tensors_in
from fedpeat.tuning.distillation import Pair
from fedpeat.tuning.loss import Batch, autocast, batch_of, token_losses

__all__ = ["adapter_gradient", "agreement", "gradient_cosines"]


def agreement(pair: Pair, data: PackedText, batch_size: int) -> dict[str, float]:
    """Return how far the two networks agree on a text, at the boundary and in what they predict.

    Returns:
        ``hidden_relative_error``, ||T - S|| / ||T|| over all hidden states T of the full model and
        S of the emulator at the boundary; ``hidden_cosine``, the mean over positions of their
        cosine; ``logit_kl``, the mean over targets of KL(full || emulator) [nat];
        ``top1_agreement``, the share of targets for which both have the same first guess.
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
        for ids, mask in _batches(data, batch_size, device):
            teacher, student = (_seen(model, block, ids) for model, block in watched)
            parts = _states_agree(teacher[0], student[0])
            for row, wanted in enumerate(mask[:, 1:]):  # one block at a time: logits are large
                found = _guesses_agree(
                    teacher[1][row, :-1][wanted].float(), student[1][row, :-1][wanted].float()
                )
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
    teacher: Float[Tensor, "batch seq hidden"], student: Float[Tensor, "batch seq hidden"]
) -> dict[str, float]:
    teacher, student = teacher.double(), student.double()
    cosines = cosine_similarity(teacher, student, dim=-1)
    return {
        "error": float((teacher - student).pow(2).sum()),
        "norm": float(teacher.pow(2).sum()),
        "cosine": float(cosines.sum()),
        "positions": cosines.numel(),
    }


def _guesses_agree(
    teacher: Float[Tensor, "targets vocab"], student: Float[Tensor, "targets vocab"]
) -> dict[str, float]:
    divergence = kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="sum", log_target=True
    )
    same = (teacher.argmax(-1) == student.argmax(-1)).sum()
    return {"kl": float(divergence), "same": float(same), "targets": len(teacher)}


def adapter_gradient(tunable: Tunable, data: PackedText, batch_size: int) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over a text by each tensor of the adapter.

    Nothing of the network changes: no ``grad`` is kept, no random number is drawn.
    """
    parameters = list(tunable.parameters.values())
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    num_targets = max(data.num_targets, 1)
    with evaluating(tunable.model):
        for ids, mask in _batches(data, batch_size, tunable.device):
            with autocast(tunable.model, tunable.device):
                loss = (token_losses(tunable.model, ids) * mask[:, 1:]).sum() / num_targets
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(sums, found, strict=True):
                if gradient is not None:
                    total.add_(gradient.float())
    return dict(zip(tunable.parameters, sums, strict=True))


def gradient_cosines(
    full: Mapping[str, Tensor], emulator: Mapping[str, Tensor], blocks: Blocks
) -> dict[str, float]:
    """Return the cosine between an adapter's gradients on the full model and on its emulator.

    Both hold the adapter at equal values and see the same text. Where the gradients point the same
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


def _batches(data: PackedText, batch_size: int, device: torch.device) -> Iterator[Batch]:
    for start in range(0, data.num_examples, batch_size):
        yield batch_of(data, np.arange(start, min(start + batch_size, data.num_examples)), device)


def _seen(
    model: nn.Module, block: nn.Module, ids: Int[Tensor, "batch seq"]
) -> tuple[Float[Tensor, "batch seq hidden"], Float[Tensor, "batch seq vocab"]]:
    """Return the hidden states that leave a block, and the logits, of one call."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: object) -> None:
        states.append(next(tensors_in(output)))

    handle = block.register_forward_hook(keep)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    return states[0], logits
