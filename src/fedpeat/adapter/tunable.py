"""A network with an adapter attached, whose tensors are named as in the full model.

Emulator and full model hold the same blocks at different places. All that travels is named by the
full model's block indices, so that plugging in is a copy by name, and a tensor that has no partner
is an error.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import nn

from fedpeat.adapter.lora import shape_at_rank
from fedpeat.adapter.methods import METHODS
from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError
from fedpeat.core.run_folder import replace_folder
from fedpeat.model.blocks import Blocks
from fedpeat.model.modes import evaluating

__all__ = ["Tunable", "adapter_facts", "attach", "attached", "check_state", "read_adapter"]

_PEFT_PREFIX = "base_model.model."
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


class Tunable:
    """A network and the parameters of it that are tuned.

    Attributes:
        model: The network to call; a ``peft.PeftModel`` where a PEFT method is used.
        parameters: Tuned parameters by their name in the full model, in a fixed order.
        shapes: Shape of each at the rank that it was attached with.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}

    @property
    def device(self) -> torch.device:
        """Device that the network lives on."""
        return next(iter(self.parameters.values())).device

    @property
    def network(self) -> nn.Module:
        """The network itself, with the adapter in its layers."""
        if isinstance(self.model, peft.PeftModel):
            return self.model.get_base_model()
        return self.model

    @property
    def num_parameters(self) -> int:
        """Number of tuned parameters."""
        return sum(p.numel() for p in self.parameters.values())

    def state(self) -> dict[str, np.ndarray]:
        """Return a float32 copy of the tuned tensors, by their name in the full model."""
        return {
            name: p.detach().float().cpu().numpy().copy() for name, p in self.parameters.items()
        }

    def load(self, state: Mapping[str, np.ndarray], *, rank: int | None = None) -> None:
        """Plug in: copy tuned tensors from ``state``, every one and no other.

        Args:
            state: Tensors by their name in the full model.
            rank: Rank that LoRA has in ``state``, and here from now on; the one that it was
                attached with if not given. Its scale stays that of the attached rank.

        Raises:
            AdapterError: If a name or a shape does not fit; nothing is copied then.
        """
        shapes: Mapping[str, tuple[int, ...]] = self.shapes
        if rank is not None:
            shapes = {name: shape_at_rank(name, s, rank) for name, s in shapes.items()}
        check_state(state, shapes)
        self._resize(shapes)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(state[name])))

    def _resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Put parameters of other shapes in the place of those that have not these."""
        old = {id(p): name for name, p in self.parameters.items() if p.shape != shapes[name]}
        places = [
            (old[id(p)], module, attribute, p)
            for module in self.model.modules()
            for attribute, p in module.named_parameters(recurse=False)
            if id(p) in old
        ]
        for name, module, attribute, p in places:
            self.parameters[name] = nn.Parameter(p.new_empty(shapes[name]))
            setattr(module, attribute, self.parameters[name])

    @contextmanager
    def only(self, names: Collection[str]) -> Iterator[Tunable]:
        """Give this network with some of its tuned tensors; the others are frozen for a while.

        Raises:
            AdapterError: If there is no tensor of these names.
        """
        chosen = {name: p for name, p in self.parameters.items() if name in names}
        if not chosen:
            raise AdapterError(f"no tensor to tune is one of those wanted: {sorted(names)[:3]}")
        frozen = [p for name, p in self.parameters.items() if name not in chosen]
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            yield Tunable(self.model, chosen)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Switch a PEFT adapter off for a while: the network is then the one it was attached to."""
        if not isinstance(self.model, peft.PeftModel):
            raise AdapterError("only a PEFT adapter can be switched off; whole tuned blocks cannot")
        with self.model.disable_adapter():
            yield

    def save(self, folder: Path, model_name: str) -> None:
        """Write the adapter: a PEFT checkpoint of the full model, or whole blocks by name."""
        with replace_folder(folder) as temporary:
            if isinstance(self.model, peft.PeftModel):
                settings = self.model.peft_config["default"]
                settings.base_model_name_or_path = model_name
                self.model.save_pretrained(str(temporary), save_embedding_layers=False)
                (temporary / "README.md").unlink(missing_ok=True)
            else:
                save_file(self.state(), temporary / WEIGHTS_FILE)
                record = {"fedpeat": "whole blocks", "base_model_name_or_path": model_name}
                (temporary / CONFIG_FILE).write_text(json.dumps(record, indent=2))

    def merged(self) -> transformers.PreTrainedModel:
        """Return the full model with the adapter merged in; this object is spent afterwards.

        Raises:
            AdapterError: If the method cannot be merged (prompts).
        """
        if not isinstance(self.model, peft.PeftModel):
            return self.model  # type: ignore[return-value]
        if not hasattr(self.model.base_model, "merge_and_unload"):
            raise AdapterError("a prompt cannot be merged into weights; export it without --merged")
        return self.model.base_model.merge_and_unload()  # type: ignore[no-any-return, operator]


def attach(
    model: nn.Module,
    blocks: Blocks,
    tuned: Sequence[int],
    config: AdapterConfig,
    *,
    kept: Sequence[int] | None = None,
    seed: int = 0,
) -> Tunable:
    """Attach a freshly initialised adapter to a network.

    Args:
        model: Full model or emulator; it is changed in place.
        blocks: Blocks of the full model.
        tuned: Indices of the tuned blocks, as in the full model.
        config: The method and its settings.
        kept: Full-model index of each block of this network; none if this is the full model.
        seed: Seed of the initial adapter; the caller's random stream is left as it was.

    Raises:
        AdapterError: If the method cannot be put onto this network.
    """
    here = blocks if kept is None else blocks.select(kept)
    to_full = dict(enumerate(range(blocks.num_blocks) if kept is None else kept))
    own = [index for index, full in to_full.items() if full in set(tuned)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _let_gradients_through(model, here)
        tuned_model = METHODS[config.method](model, here, own, config)
    trained = {_wire_name(name): p for name, p in tuned_model.named_parameters() if p.requires_grad}
    if not trained:
        raise AdapterError(f"adapter method {config.method!r} leaves nothing to tune")
    names = here.rename(trained, blocks, to_full)
    tuned_model.eval()
    return Tunable(tuned_model, {names[name]: p for name, p in trained.items()})


@contextmanager
def attached(
    model: transformers.PreTrainedModel,
    blocks: Blocks,
    tuned: Sequence[int],
    config: AdapterConfig,
    *,
    kept: Sequence[int] | None = None,
    seed: int = 0,
) -> Iterator[Tunable]:
    """Attach an adapter for a while; afterwards the network is as it was, values and modes too.

    Args and Raises as of ``attach``.
    """
    before = [(p, p.data, p.requires_grad) for p in model.parameters()]
    owned = {id(p) for p, _, _ in before}
    values: list[tuple[torch.Tensor, torch.Tensor]] = []
    with evaluating(model):
        tuned_model: Any = None
        try:
            tunable = attach(model, blocks, tuned, config, kept=kept, seed=seed)
            tuned_model = tunable.model
            tuned_weights = [p for p in tunable.parameters.values() if id(p) in owned]
            values = [(p, p.detach().clone()) for p in tuned_weights]
            yield tunable
        finally:
            if isinstance(tuned_model, peft.PeftModel):
                _take_off(model)
            if _go_by_themselves(model, blocks if kept is None else blocks.select(kept)):
                model.disable_input_require_grads()
            for parameter, data, flag in before:
                parameter.data = data
                parameter.requires_grad_(flag)
            with torch.no_grad():
                for weight, value in values:
                    weight.copy_(value)


def _take_off(model: nn.Module) -> None:
    """Put a network's own layers back in the places of PEFT's.

    PEFT's ``unload`` assigns to ``weight``, which some of our layers only compute.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BaseTunerLayer):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _let_gradients_through(model: nn.Module, blocks: Blocks) -> None:
    """Give embeddings a gradient where blocks go backwards by themselves (Reformer).

    They do so only if what enters them has one.
    """
    if isinstance(model, transformers.PreTrainedModel) and _go_by_themselves(model, blocks):
        model.enable_input_require_grads()


def _go_by_themselves(model: nn.Module, blocks: Blocks) -> bool:
    return any(hasattr(part, "backward_pass") for _, part in blocks.parts(model, 0))


def check_state(state: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that an adapter's tensors are exactly those wanted.

    Raises:
        AdapterError: If a name is missing or unexpected, or a shape differs.
    """
    for problem, names in (
        ("lacks", shapes.keys() - state.keys()),
        ("has unexpected", state.keys() - shapes.keys()),
    ):
        if names:
            raise AdapterError(
                f"adapter {problem} {len(names)} of {len(shapes)} tensors: "
                f"{', '.join(sorted(names)[:3]):.300}"
            )
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise AdapterError(
                f"adapter tensor {name} must have shape {shape}, got {state[name].shape}"
            )


def read_adapter(folder: Path) -> dict[str, np.ndarray]:
    """Read an exported adapter's tensors, by their name in the full model.

    Raises:
        AdapterError: If the folder holds none, or the file is damaged.
    """
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise AdapterError(f"cannot read adapter {path}: {error}") from error
    return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def _wire_name(name: str) -> str:
    """Return a parameter's name as PEFT writes it into a file, without PEFT's prefix."""
    if name == "prompt_encoder.default.embedding.weight":
        return "prompt_embeddings"
    name = name.removeprefix(_PEFT_PREFIX)
    return name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector").replace(
        ".default", ""
    )


def adapter_facts(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the number of parameters and of bytes of an adapter's tensors."""
    return {
        "num_parameters": int(sum(a.size for a in state.values())),
        "num_bytes": int(sum(a.nbytes for a in state.values())),
    }
