"""Show how a network would be cut, and try on the network itself that cutting it is exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fedpeat.adapter.placement import tuned_blocks
from fedpeat.adapter.tunable import attach
from fedpeat.config.recipe import Step
from fedpeat.config.schema import AdapterConfig, Cut, Placement
from fedpeat.core.errors import AdapterError, ConfigError, FedPEATError, ModelError, SplitError
from fedpeat.emulator.package import pack_emulator
from fedpeat.emulator.selection import choose_blocks
from fedpeat.model.blocks import BlockList, Blocks, find_blocks
from fedpeat.model.cut import build_from_blocks, only_blocks, reasons_to_keep
from fedpeat.model.examples import bound_inputs, random_inputs
from fedpeat.model.loading import fingerprint, load_strictly, resolve_device
from fedpeat.model.modes import evaluating
from fedpeat.model.tracing import check_chain, tensors_in

__all__ = ["RATIOS", "FoundList", "Inspection", "Rung", "inspect"]

RATIOS = (0.75, 0.5, 0.33, 0.2)
FLOAT32_BYTES = 4  # in which an adapter travels


@dataclass(frozen=True)
class FoundList:
    """A list of blocks.

    Attributes:
        paths: Where it is; more than one where the parts of a block are in lists side by side.
        num_blocks: Its length.
        kinds: How many blocks of each class.
        num_parameters: Parameters of all its blocks.
    """

    paths: tuple[str, ...]
    num_blocks: int
    kinds: Mapping[str, int]
    num_parameters: int


@dataclass(frozen=True)
class Rung:
    """An emulator that keeps a share of the blocks that may go, and the adapter on it.

    Attributes:
        ratio: The share.
        kept: Blocks of the full model that it keeps.
        num_parameters: Its parameters, with embeddings and head, tied ones counted once.
        num_bytes: Bytes of its weights, in the type that the network is loaded in.
        adapter_parameters: Parameters of LoRA on it; None where LoRA does not fit.
        adapter_bytes: Bytes of these, as they travel.
    """

    ratio: float
    kept: tuple[int, ...]
    num_parameters: int
    num_bytes: int
    adapter_parameters: int | None
    adapter_bytes: int | None


@dataclass(frozen=True)
class Inspection:
    """How a network is cut, and what was tried on it.

    Attributes:
        name: What the user called it.
        architecture: Its class.
        num_parameters: Its parameters, tied ones counted once.
        num_bytes: Bytes of its weights, in the type that it is loaded in.
        dtype: That type.
        lists: Its lists of blocks.
        placement: Where the adapter sits.
        tuned: Blocks that are tuned; with placement "all" those that an emulator keeps.
        needed: Why a block must be kept, by its index; tuned blocks are kept besides.
        rungs: Emulators of some ratios, evenly spaced.
        lora_refused: Why LoRA does not fit, if so.
        checks: What holds.
    """

    name: str
    architecture: str
    num_parameters: int
    num_bytes: int
    dtype: str
    lists: tuple[FoundList, ...]
    placement: str
    tuned: tuple[int, ...]
    needed: Mapping[int, str]
    rungs: tuple[Rung, ...]
    lora_refused: str | None
    checks: tuple[str, ...]

    @property
    def num_blocks(self) -> int:
        """Blocks of all lists together."""
        return sum(item.num_blocks for item in self.lists)

    def record(self) -> dict[str, Any]:
        """Return all of it as plain values, for JSON."""
        return asdict(self)


def inspect(
    model: str | Path | nn.Module,
    inputs: object = None,
    blocks: str | None = None,
    *,
    cut: Cut = "both",
    placement: Placement = "ends",
    num_bottom: int = AdapterConfig.num_bottom,
    num_top: int = AdapterConfig.num_top,
    ratios: Sequence[float] = RATIOS,
    revision: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Inspection:
    """Find the blocks of a network, and try that cutting it and plugging back is exact.

    Args:
        model: Hub name, folder in the Hub's form, "bundled", or any network.
        inputs: What to call it with: a tensor, several in order, or arguments by name; random text
            or images for a network of transformers if not given.
        blocks: Dotted name of the list to cut; found if not given.
        cut: Half of an encoder-decoder to cut.
        placement: Blocks that are tuned: "ends", "top" or "all".
        num_bottom: How many at the bottom, for "ends".
        num_top: How many at the top, for "ends" and "top".
        ratios: Shares of the other blocks that emulators keep.
        revision: Branch, tag or commit of a Hub model.
        device: Device to compute on, for a name or a folder.
        trust_remote_code: Whether a Hub model may run code of its own.

    Raises:
        ModelError: If the network cannot be loaded, or called.
        SplitError: If it cannot be cut, or cutting it is not exact.
        EmulatorError: If none of its blocks can be dropped.
        ConfigError: If a ratio or a number of tuned blocks is out of range.
    """
    config = AdapterConfig(placement=placement, num_bottom=num_bottom, num_top=num_top)
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise ConfigError(f"ratios must be in (0, 1], got {ratio}")
    if isinstance(model, nn.Module):
        name, network = type(model).__name__, model
    else:
        name = str(model)
        network = _load(name, revision, device, trust_remote_code=trust_remote_code)
    found = find_blocks(network, blocks, cut)
    batch = _inputs(network, inputs)
    with evaluating(network), _frozen(network):
        with _refused(f"{type(network).__name__} does not run with {', '.join(batch)}"):
            _outputs(network, batch)
        if blocks is not None or not isinstance(network, transformers.PreTrainedModel):
            check_chain(network, found, batch)
        tuned = tuned_blocks(placement, found.num_blocks, num_bottom, num_top)
        protected = [] if placement == "all" else tuned
        choices = [
            choose_blocks(Step("layer_drop", ratio), network, found, protected, [batch])
            for ratio in ratios
        ]
        needed = reasons_to_keep(network, found, batch)
        with _refused(f"{type(network).__name__} does not run with fewer blocks"):
            checks, copy = _self_test(network, found, min(choices, key=len), batch)
        sizes, refused = _adapter_sizes(copy, found, config)
        rungs = [
            _rung(network, found, ratio, kept, tuned if protected else kept, sizes)
            for ratio, kept in zip(ratios, choices, strict=True)
        ]
    return Inspection(
        name=name,
        architecture=type(network).__name__,
        num_parameters=_num_parameters(network),
        num_bytes=_num_bytes(network),
        dtype=str(next(network.parameters()).dtype).removeprefix("torch."),
        lists=tuple(_described(network, found, item, start) for item, start in found.starts),
        placement=placement,
        tuned=tuple(tuned),
        needed=needed,
        rungs=tuple(rungs),
        lora_refused=refused,
        checks=tuple(checks),
    )


def _load(
    name: str, revision: str | None, device: str, *, trust_remote_code: bool
) -> transformers.PreTrainedModel:
    """Load the network that its configuration names, a causal LM if it names none."""

    def kind_of(config: transformers.PretrainedConfig) -> Any:
        for architecture in getattr(config, "architectures", None) or ():
            kind = getattr(transformers, architecture, None)
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
                return kind
        return transformers.AutoModelForCausalLM

    return load_strictly(
        name,
        kind_of,
        revision=revision,
        device=resolve_device(device),
        trust_remote_code=trust_remote_code,
    )[0]


def _inputs(model: nn.Module, given: object) -> dict[str, Any]:
    if given is not None:
        return bound_inputs(model, given)
    if isinstance(model, transformers.PreTrainedModel):
        return random_inputs(model)
    raise ModelError(
        f"{type(model).__name__} is no network of transformers and needs inputs to be tried with: "
        "fedpeat.inspect(model, inputs)"
    )


@torch.inference_mode()
def _outputs(model: nn.Module, batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return every tensor that a network gives, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some attention hashes at random
        return list(tensors_in(model(**batch)))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter be trained for a while: PyTorch computes some of them by other formulas."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turn any error of a network's own into one of ours, in one line."""
    try:
        yield
    except FedPEATError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise SplitError(f"{what}: {type(error).__name__}: {reason}") from error


# --- invariant 1 ---------------------------------------------------------------------------------


def _self_test(
    model: nn.Module, blocks: Blocks, kept: Sequence[int], batch: Mapping[str, Any]
) -> tuple[list[str], nn.Module]:
    """Try that cutting and plugging back is exact; return what holds, and a copy of the network.

    Raises:
        SplitError: If something does not hold.
    """
    held: list[str] = []

    def require(claim: str, *holds: bool) -> None:
        if not all(holds):
            raise SplitError(f"{type(model).__name__} cannot be cut; this does not hold: {claim}")
        held.append(claim)

    before, expected = fingerprint(model), _outputs(model, batch)
    whole = build_from_blocks(model, blocks, range(blocks.num_blocks))
    require("an emulator of all blocks answers as the full model", _same(whole, batch, expected))
    small = build_from_blocks(model, blocks, kept)
    with only_blocks(model, blocks, kept):
        answer = _outputs(model, batch)
    count = f"an emulator of {len(kept)} of {blocks.num_blocks} blocks"
    require(f"{count} answers as the full model without the others", _same(small, batch, answer))
    if isinstance(model, transformers.PreTrainedModel):
        dtype = next(model.parameters()).dtype
        package = pack_emulator(
            small, model, blocks, kept, recipe="", dtype=dtype, parent_sha256=before
        )
        rebuilt = package.build(next(model.parameters()).device, dtype)
        require(f"{count}, read back from its file, is the same", _same(rebuilt, batch, answer))
    _plug(small, whole, blocks, kept)
    require(
        "cut and plugged back, every weight and every answer is as before",
        fingerprint(model) == fingerprint(whole) == before,
        _same(model, batch, expected),
        _same(whole, batch, expected),
    )
    return held, whole


def _same(model: nn.Module, batch: Mapping[str, Any], expected: Sequence[torch.Tensor]) -> bool:
    """Say whether a network gives exactly these outputs."""
    outputs = _outputs(model, batch)
    return len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))


@torch.no_grad()
def _plug(small: nn.Module, whole: nn.Module, blocks: Blocks, kept: Sequence[int]) -> None:
    """Put the blocks of an emulator into a full model, whose own are cleared first."""
    own, state = blocks.select(kept), small.state_dict()
    inside = [name for name in state if own.locate(name) is not None]
    full = whole.state_dict()
    names = own.rename(inside, blocks, dict(enumerate(kept)))
    for name in names.values():
        full[name].zero_()
    for name, target in names.items():
        full[target].copy_(state[name])


# --- sizes ---------------------------------------------------------------------------------------


def _adapter_sizes(
    copy: nn.Module, blocks: Blocks, config: AdapterConfig
) -> tuple[dict[int, int], str | None]:
    """Return LoRA's parameters on each block of a network, which is spent; or why it has none."""
    everything = list(range(blocks.num_blocks))
    try:
        tunable = attach(copy, blocks, everything, config)
    except AdapterError as error:
        return {}, str(error)
    sizes = Counter(dict.fromkeys(everything, 0))
    for name, parameter in tunable.parameters.items():
        index = blocks.locate(name)
        assert index is not None
        sizes[index] += parameter.numel()
    return dict(sizes), None


def _rung(
    model: nn.Module,
    blocks: Blocks,
    ratio: float,
    kept: Sequence[int],
    tuned: Sequence[int],
    sizes: Mapping[int, int],
) -> Rung:
    adapter = sum(sizes[index] for index in tuned) if sizes else None
    with only_blocks(model, blocks, kept):
        num_parameters, num_bytes = _num_parameters(model), _num_bytes(model)
    return Rung(
        ratio=ratio,
        kept=tuple(kept),
        num_parameters=num_parameters,
        num_bytes=num_bytes,
        adapter_parameters=adapter,
        adapter_bytes=None if adapter is None else adapter * FLOAT32_BYTES,
    )


def _described(model: nn.Module, blocks: Blocks, item: BlockList, start: int) -> FoundList:
    parts = [blocks.parts(model, start + i) for i in range(item.num_blocks)]
    kinds = Counter(" + ".join(type(module).__name__ for _, module in block) for block in parts)
    weights = {id(p): p.numel() for block in parts for _, m in block for p in m.parameters()}
    return FoundList(item.paths, item.num_blocks, dict(kinds), sum(weights.values()))


def _num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _num_bytes(model: nn.Module) -> int:
    """Return the bytes of a network's weights and of what else its file holds."""
    tensors = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}
    return sum(tensors.values())
