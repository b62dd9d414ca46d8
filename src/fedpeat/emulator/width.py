"""Leave out neurons between the linear layers of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.calibration import Batch, require_text, second_moment
from fedpeat.emulator.narrowing import (
    Cut,
    Narrowed,
    changing,
    differing,
    inputs_of,
    narrow,
    plain_layers,
    works_narrower,
)
from fedpeat.model.blocks import Blocks
from fedpeat.model.layers import matrix_of
from fedpeat.model.modes import evaluating

__all__ = ["Neurons", "fit_outgoing", "leave_out_neurons", "neuron_scores", "neurons_of"]

_DAMPING = 1e-4


@dataclass(frozen=True)
class Neurons:
    """Neurons of a block: each is a row of the layers before it and a column of the one after.

    Attributes:
        before: Names of the layers before; one that makes gate and value at once has the rows of
            each neuron in both of its halves.
        after: Name of the layer after.
        number: How many there are.
    """

    before: tuple[str, ...]
    after: str
    number: int

    def cut(self, model: nn.Module, kept: Int[Tensor, " kept"]) -> Cut:
        """Return what stays of the layers where only some neurons do."""
        rows = {}
        for name in self.before:
            halves = matrix_of(model.get_submodule(name)).shape[0] // self.number
            rows[name] = torch.cat([kept + half * self.number for half in range(halves)])
        return Cut(rows, self.after, kept)


def leave_out_neurons(
    model: nn.Module, blocks: Blocks, indices: Sequence[int], ratio: float, batches: Sequence[Batch]
) -> Narrowed:
    """Keep a share of the neurons of some blocks, in place, one block after the other.

    What the layer after the neurons makes of those that are left is fitted anew.

    Args:
        model: The emulator.
        blocks: Its blocks.
        indices: Blocks that lose neurons.
        ratio: Share of neurons that is kept, in (0, 1].
        batches: Text whose activations say which neurons matter.

    Returns:
        What was done to each layer, and what is left of it.

    Raises:
        EmulatorError: If there is no text, or no layer whose neurons can be told apart.
    """
    require_text("width", batches)
    done = Narrowed([], {})
    short = {name: values[:1] for name, values in batches[0].items()}
    for index in indices:
        for neurons in neurons_of(model, blocks, index, short):
            after = model.get_submodule(neurons.after)
            moment = second_moment(model, after, batches)
            scores = neuron_scores(matrix_of(after), moment)
            kept = (
                scores.topk(max(2, int(ratio * neurons.number) // 2 * 2))
                .indices.sort()
                .values.cpu()
            )
            fitted = fit_outgoing(matrix_of(after), moment, kept)
            done += narrow(model, neurons.cut(model, kept), fitted)
    if not done.layers:
        raise EmulatorError(
            f"emulator.recipe width finds no neurons in the {len(indices)} kept blocks of "
            f"{type(model).__name__}; dropping blocks would work"
        )
    return done


def neuron_scores(
    outgoing: Float[Tensor, "outer neurons"], moment: Float[Tensor, "neurons neurons"]
) -> Float[Tensor, " neurons"]:
    """Return the energy of each neuron's share of the output: E[a^2] * ||w||^2.

    Source:
        Sun et al. (2023), Wanda (arXiv:2306.11695): weights times activations, here for neurons.
    """
    return moment.diagonal() * outgoing.float().pow(2).sum(0)


def fit_outgoing(
    outgoing: Float[Tensor, "outer neurons"],
    moment: Float[Tensor, "neurons neurons"],
    kept: Int[Tensor, " kept"],
) -> Float[Tensor, "outer kept"]:
    """Return the weights of the kept neurons that make the output of all in least squares.

    With activations a and moment G = E[a a^T], the minimum of E ||W a - V a_kept||^2 is
    V = W G[:, kept] G[kept, kept]^-1.
    """
    part = moment[kept][:, kept].double()
    scale = float(part.diagonal().mean())
    if scale == 0:
        return outgoing[:, kept].float()
    damped = part + _DAMPING * scale * torch.eye(len(kept), dtype=part.dtype, device=part.device)
    target = outgoing.double() @ moment[:, kept].double()
    fitted: Tensor = torch.linalg.solve(damped, target.T).T.float()
    return fitted


def neurons_of(model: nn.Module, blocks: Blocks, index: int, batch: Batch) -> list[Neurons]:
    """Return the groups of neurons of a block, found by calls, not by names.

    The rows of a layer are neurons of a later one if changing some of them changes the same columns
    of what the later one takes in, and no others; and if the block still works with fewer of them.
    """
    layers = plain_layers(model, blocks, index)
    found = []
    with evaluating(model), torch.inference_mode():
        plain = inputs_of(model, layers, batch)
        for after in plain:
            layer = layers[after]
            number = matrix_of(layer).shape[1]
            candidates = [
                name
                for name, other in layers.items()
                if name != after and matrix_of(other).shape[0] in {number, 2 * number}
            ]
            before = tuple(
                name
                for name in candidates
                if _meets_rows(model, layers[name], layer, plain[after], batch)
            )
            neurons = Neurons(before, after, number)
            half = neurons.cut(model, torch.arange(0, number, 2))
            if before and number >= 4 and works_narrower(model, half, batch):
                found.append(neurons)
    return found


def _meets_rows(
    model: nn.Module,
    before: nn.Module,
    after: nn.Module,
    plain: Float[Tensor, "... columns"],
    batch: Batch,
) -> bool:
    """Say whether the rows of one layer are the columns of another, with nothing mixed between.

    Args:
        model: The network.
        before: Layer whose rows are changed.
        after: The later layer.
        plain: What goes into it otherwise.
        batch: What to call the network with.
    """
    rows = torch.zeros(matrix_of(after).shape[1], dtype=torch.bool)
    rows[::3] = True  # some in every part, so that a mix of neighbours shows as well
    places = rows.repeat(matrix_of(before).shape[0] // len(rows))
    with changing(before, lambda output: output + places.to(output) * (1 + output.abs().amax())):
        changed = inputs_of(model, {"after": after}, batch)
    return bool(changed) and torch.equal(differing(plain, changed["after"]), rows)
