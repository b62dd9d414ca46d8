"""An emulator as it is stored and sent: weights, a configuration and a manifest.

What a device computes with is always built from these bytes, on the server too, so that all hold
identical weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from torch import nn

from fedpeat.core.errors import EmulatorError
from fedpeat.core.run_folder import replace_folder
from fedpeat.core.wire import Payload
from fedpeat.model.blocks import BlockList, Blocks
from fedpeat.model.cut import frozen, skeleton
from fedpeat.model.layers import LayerSpec, num_parameters, read_specs

__all__ = ["EmulatorPackage", "Manifest", "pack_emulator"]

SCHEMA = 3


@dataclass(frozen=True)
class Manifest:
    """What an emulator is and where it comes from.

    Attributes:
        recipe: How it was made, e.g. "layer_drop:0.5+distill:200000".
        architecture: Class of the network in transformers, e.g. "LlamaForCausalLM".
        blocks: The full model's lists of blocks.
        source_blocks: Index in the full model of each block, in order.
        layers: Layers that differ from the full model's, in the order in which they were changed.
        num_parameters: Parameters, tied ones counted once.
        num_bytes: Length of the weights file.
        dtype: Type of the weights.
        parent_sha256: Fingerprint of the full model's weights.
        sha256: Hash of weights, configuration and block indices; the emulator's identity.
        fidelity: What was measured of it, by name.
    """

    recipe: str
    architecture: str
    blocks: Blocks
    source_blocks: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    num_parameters: int
    num_bytes: int
    dtype: str
    parent_sha256: str
    sha256: str
    fidelity: Mapping[str, float] = field(default_factory=dict)
    schema: int = SCHEMA


@dataclass(frozen=True)
class EmulatorPackage:
    """The bytes of an emulator with their description.

    Attributes:
        manifest: What it is.
        config: Configuration of the full model; blocks are taken out of a network built from it.
        weights: A safetensors file.
    """

    manifest: Manifest
    config: Mapping[str, Any]
    weights: bytes

    def build(self, device: torch.device, dtype: torch.dtype) -> transformers.PreTrainedModel:
        """Return the network, frozen, in evaluation mode.

        Raises:
            EmulatorError: If weights and configuration do not fit each other.
        """
        manifest = self.manifest
        try:
            model = skeleton(
                manifest.architecture,
                self.config,
                manifest.blocks,
                manifest.source_blocks,
                dtype,
                layers=manifest.layers,
            )
            state = safetensors.torch.load(self.weights)
            _load_untied(model, state)
        except EmulatorError:
            raise
        except (
            Exception
        ) as error:  # a configuration from elsewhere can fail in any way the library knows
            reason = " ".join(str(error).split())
            raise EmulatorError(
                f"emulator {self.manifest.sha256[:12]} cannot be built: {reason}"
            ) from error
        return frozen(model, device)

    def to_payload(self) -> Payload:
        """Return the emulator as a message."""
        record = {"manifest": asdict(self.manifest), "config": dict(self.config)}
        return Payload({"weights": np.frombuffer(self.weights, np.uint8)}, record)

    @classmethod
    def from_payload(cls, payload: Payload) -> EmulatorPackage:
        """Return the emulator in a message, its hash verified.

        Raises:
            EmulatorError: If the message lacks a part, or the hash does not fit.
        """
        try:
            manifest = _manifest_from_dict(payload.record["manifest"])
            package = cls(manifest, payload.record["config"], payload.arrays["weights"].tobytes())
        except (KeyError, TypeError) as error:
            raise EmulatorError(f"not an emulator: {error!r}") from error
        package.verify()
        return package

    def verify(self) -> None:
        """Check that the weights are those that the manifest names.

        Raises:
            EmulatorError: If they are not.
        """
        wanted, got = self.manifest.sha256, identity(self.weights, self.config, self.manifest)
        if got != wanted:
            raise EmulatorError(
                f"emulator is damaged: its hash must be {wanted[:12]}, got {got[:12]}"
            )

    def save(self, folder: Path) -> None:
        """Write weights, the full model's configuration and the manifest into a folder."""
        with replace_folder(folder) as temporary:
            (temporary / "model.safetensors").write_bytes(self.weights)
            (temporary / "config.json").write_text(json.dumps(dict(self.config), indent=2))
            (temporary / "manifest.json").write_text(json.dumps(asdict(self.manifest), indent=2))

    @classmethod
    def load(cls, folder: Path) -> EmulatorPackage:
        """Read a folder that ``save`` wrote, its hash verified.

        Raises:
            EmulatorError: If a file is missing or damaged.
        """
        try:
            manifest = _manifest_from_dict(json.loads((folder / "manifest.json").read_text()))
            config = json.loads((folder / "config.json").read_text())
            package = cls(manifest, config, (folder / "model.safetensors").read_bytes())
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise EmulatorError(f"cannot read emulator {folder}: {error}") from error
        package.verify()
        return package

    def with_fidelity(self, fidelity: Mapping[str, float]) -> EmulatorPackage:
        """Return the same emulator with what was measured of it."""
        return replace(self, manifest=replace(self.manifest, fidelity=dict(fidelity)))


def pack_emulator(
    emulator: nn.Module,
    parent: transformers.PreTrainedModel,
    blocks: Blocks,
    source_blocks: Sequence[int],
    *,
    layers: Sequence[LayerSpec] = (),
    recipe: str,
    dtype: torch.dtype,
    parent_sha256: str,
) -> EmulatorPackage:
    """Return an emulator's network as the bytes that travel, rounded to ``dtype``.

    Args:
        emulator: The network.
        parent: The full model.
        blocks: The full model's blocks.
        source_blocks: Index in the full model of each block of the emulator.
        layers: What was done to its layers.
        recipe: How it was made.
        dtype: Type of the weights.
        parent_sha256: Fingerprint of the full model's weights.
    """
    state = {
        name: _stored(tensor, dtype).contiguous()
        for name, tensor in _untied_state(emulator).items()
    }
    weights = bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
    config = json.loads(parent.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # where the owner keeps the model is nobody's business
    config["dtype"] = str(dtype).split(".")[-1]
    manifest = Manifest(
        recipe=recipe,
        architecture=type(parent).__name__,
        blocks=blocks,
        source_blocks=tuple(source_blocks),
        layers=tuple(layers),
        num_parameters=num_parameters(emulator),
        num_bytes=len(weights),
        dtype=str(dtype).split(".")[-1],
        parent_sha256=parent_sha256,
        sha256="",
    )
    manifest = replace(manifest, sha256=identity(weights, config, manifest))
    return EmulatorPackage(manifest, config, weights)


def identity(weights: bytes, config: Mapping[str, Any], manifest: Manifest) -> str:
    """Return the hash that names an emulator: of its weights and of how to use them."""
    digest = hashlib.sha256(weights)
    use = [
        dict(config),
        manifest.architecture,
        asdict(manifest.blocks),
        manifest.source_blocks,
        [asdict(spec) for spec in manifest.layers],
    ]
    digest.update(json.dumps(use, sort_keys=True).encode())
    return digest.hexdigest()


def _stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor as it is stored: numbers with a point are rounded, and never widened."""
    rounds = tensor.is_floating_point() and tensor.dtype.itemsize >= dtype.itemsize
    return tensor.detach().to("cpu", dtype if rounds else tensor.dtype)


def _untied_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state without second names of one tensor, which safetensors would refuse."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


def _load_untied(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load strictly: every tensor of the model, tied ones once, and none besides."""
    wanted = _untied_state(model)
    if set(wanted) != set(state):
        raise EmulatorError(
            f"tensors differ from the configuration's: {sorted(set(wanted) ^ set(state))[:5]}"
        )
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            wanted_shape, got = tuple(tensor.shape), tuple(state[name].shape)
            raise EmulatorError(f"{name} must have shape {wanted_shape}, got {got}")
        with torch.no_grad():
            tensor.copy_(state[name])


def _manifest_from_dict(data: Mapping[str, Any]) -> Manifest:
    if (schema := data.get("schema")) != SCHEMA:
        raise EmulatorError(f"emulator schema must be {SCHEMA}, got {schema!r}")
    lists = [BlockList(tuple(i["paths"]), int(i["num_blocks"])) for i in data["blocks"]["lists"]]
    blocks = Blocks(tuple(lists))
    source_blocks, layers = tuple(data["source_blocks"]), read_specs(data["layers"])
    parts = {"blocks": blocks, "source_blocks": source_blocks, "layers": layers}
    return Manifest(**{**data, **parts})
