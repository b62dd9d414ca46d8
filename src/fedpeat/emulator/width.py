"""Leave out neurons between the linear layers of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedpeat.core.errors import EmulatorError
from fedpeat.emulator.calibration import Batch, require_text, second_moments
from fedpeat.model.blocks import Blocks
from fedpeat.model.layers import LayerSpec, is_plain_linear, matrix_of, replace_layers
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


def leave_out_neurons(
    model: nn.Module, blocks: Blocks, indices: Sequence[int], ratio: float, batches: Sequence[Batch]
) -> list[LayerSpec]:
    """Keep a share of the neurons of some blocks, in place, one block after the other.

    What the layer after the neurons makes of those that are left is fitted anew.

    Args:
        model: The emulator.
        blocks: Its blocks.
        indices: Blocks that lose neurons.
        ratio: Share of neurons that is kept, in (0, 1].
        batches: Text whose activations say which neurons matter.

    Returns:
        What was done to each layer.

    Raises:
        EmulatorError: If there is no text, or no layer whose neurons can be told apart.
    """
    require_text("width", batches)
    specs: list[LayerSpec] = []
    short = {name: values[:1] for name, values in batches[0].items()}
    for index in indices:
        for neurons in neurons_of(model, blocks, index, short):
            after = model.get_submodule(neurons.after)
            moment = second_moments(model, {neurons.after: after}, batches)[neurons.after]
            scores = neuron_scores(matrix_of(after), moment)
            kept = scores.topk(max(2, int(ratio * neurons.number) // 2 * 2)).indices.sort().values
            specs += _narrow(model, neurons, kept, fit_outgoing(matrix_of(after), moment, kept))
    if not specs:
        raise EmulatorError(
            f"emulator.recipe width finds no neurons in the {len(indices)} kept blocks of "
            f"{type(model).__name__} that are not tuned; low_rank or dropping blocks would work"
        )
    return specs


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
    layers = {
        f"{part_name}.{name}": module
        for part_name, part in blocks.parts(model, index)
        for name, module in part.named_modules()
        if name and is_plain_linear(module)
    }
    found = []
    with evaluating(model), torch.inference_mode():
        for after, layer in layers.items():
            number = matrix_of(layer).shape[1]
            candidates = [
                name
                for name, other in layers.items()
                if name != after and matrix_of(other).shape[0] in {number, 2 * number}
            ]
            before = tuple(
                name for name in candidates if _meets_rows(model, layers[name], layer, batch)
            )
            neurons = Neurons(before, after, number)
            if before and number >= 4 and _works_narrower(model, neurons, batch):
                found.append(neurons)
    return found


def _meets_rows(model: nn.Module, before: nn.Module, after: nn.Module, batch: Batch) -> bool:
    """Say whether the rows of one layer are the columns of another, with nothing mixed between."""
    number = matrix_of(after).shape[1]
    rows = torch.zeros(number, dtype=torch.bool)
    rows[::3] = True  # some in every part, so that a mix of neighbours shows as well
    plain = _inputs_of(model, after, batch)
    with _changed(before, rows.repeat(matrix_of(before).shape[0] // number)):
        changed = _inputs_of(model, after, batch)
    if plain is None or changed is None or plain.shape != changed.shape:
        return False
    differs = (plain != changed).flatten(0, -2).any(0).cpu()
    return bool((differs == rows).all())


def _inputs_of(model: nn.Module, layer: nn.Module, batch: Batch) -> Tensor | None:
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].clone())

    handle = layer.register_forward_pre_hook(keep)
    try:
        model(**batch)
    finally:
        handle.remove()
    return seen[0] if len(seen) == 1 else None


@contextmanager
def _changed(layer: nn.Module, rows: Tensor) -> Iterator[None]:
    """Change what a layer puts out in some rows, for a while."""

    def change(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return output + rows.to(output) * (1 + output.abs().amax())

    handle = layer.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def _works_narrower(model: nn.Module, neurons: Neurons, batch: Batch) -> bool:
    """Try half of the neurons, and compare with all of them and the others' columns at zero."""
    kept = torch.arange(0, neurons.number, 2)
    names = [*neurons.before, neurons.after]
    old = {name: model.get_submodule(name) for name in names}
    with _silent_columns(old[neurons.after], kept):
        wanted = _output(model, batch)
    try:
        outgoing = matrix_of(old[neurons.after])[:, kept].float()
        _narrow(model, neurons, kept, outgoing)
        got = _output(model, batch)
    except (RuntimeError, ValueError):  # a view into heads, say, that fixes the number
        return False
    finally:
        for name, module in old.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module)
    return wanted.shape == got.shape and torch.allclose(wanted, got, rtol=1e-3, atol=1e-4)


def _output(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch)
    result: Tensor = output.logits if hasattr(output, "logits") else output
    return result


@contextmanager
def _silent_columns(layer: nn.Module, kept: Tensor) -> Iterator[None]:
    def silence(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        silent = torch.zeros_like(inputs[0])
        silent[..., kept] = inputs[0][..., kept]
        return (silent, *inputs[1:])

    handle = layer.register_forward_pre_hook(silence)
    try:
        yield
    finally:
        handle.remove()


def _narrow(
    model: nn.Module, neurons: Neurons, kept: Int[Tensor, " kept"], outgoing: Tensor
) -> list[LayerSpec]:
    """Put layers with only the kept neurons into the network."""
    specs = []
    for name in neurons.before:
        old = model.get_submodule(name)
        halves = matrix_of(old).shape[0] // neurons.number
        rows = torch.cat([kept + half * neurons.number for half in range(halves)])
        bias = _bias(old)
        spec = LayerSpec(name, "fewer_outputs", len(rows))
        specs.append(
            _replace(model, spec, matrix_of(old)[rows], None if bias is None else bias[rows])
        )
    bias = _bias(model.get_submodule(neurons.after))
    spec = LayerSpec(neurons.after, "fewer_inputs", len(kept))
    return [*specs, _replace(model, spec, outgoing, bias)]


def _replace(model: nn.Module, spec: LayerSpec, matrix: Tensor, bias: Tensor | None) -> LayerSpec:
    replace_layers(model, [spec])
    layer = model.get_submodule(spec.name)
    with torch.no_grad():
        matrix_of(layer).copy_(matrix)
        if bias is not None:
            layer.get_parameter("bias").copy_(bias)
    layer.requires_grad_(False)
    return spec


def _bias(layer: nn.Module) -> Tensor | None:
    bias = getattr(layer, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None
