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

from fedpeat.core.errors import EmulatorError
from fedpeat.core.run_folder import replace_folder
from fedpeat.core.wire import Payload
from fedpeat.model.blocks import frozen

__all__ = ["EmulatorPackage", "Manifest", "pack_emulator"]

SCHEMA = 1


@dataclass(frozen=True)
class Manifest:
    """What an emulator is and where it comes from.

    Attributes:
        recipe: How it was made, e.g. "layer_drop:0.5+distill:200000".
        block_path: Dotted name of the block list.
        source_blocks: Index in the full model of each block, in order.
        num_source_blocks: Blocks of the full model.
        num_parameters: Parameters, tied ones counted once.
        num_bytes: Length of the weights file.
        dtype: Type of the weights.
        parent_sha256: Fingerprint of the full model's weights.
        sha256: Hash of weights, configuration and block indices; the emulator's identity.
        fidelity: What was measured of it, by name.
    """

    recipe: str
    block_path: str
    source_blocks: tuple[int, ...]
    num_source_blocks: int
    num_parameters: int
    num_bytes: int
    dtype: str
    parent_sha256: str
    sha256: str
    fidelity: Mapping[str, float] = field(default_factory=dict)
    schema: int = SCHEMA


@dataclass(frozen=True)
class EmulatorPackage:
    """The bytes of an emulator with their description."""

    manifest: Manifest
    config: Mapping[str, Any]
    weights: bytes

    @property
    def index_map(self) -> dict[int, int]:
        """Index in the full model of each block index in the emulator."""
        return dict(enumerate(self.manifest.source_blocks))

    def build(self, device: torch.device, dtype: torch.dtype) -> transformers.PreTrainedModel:
        """Return the network, frozen, in evaluation mode.

        Raises:
            EmulatorError: If weights and configuration do not fit each other.
        """
        settings = {
            k: v
            for k, v in self.config.items()
            if k not in {"architectures", "transformers_version"}
        }
        try:
            config = transformers.AutoConfig.for_model(**settings)
            with torch.random.fork_rng(devices=[]):
                model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
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
        m = self.manifest
        if (got := identity(self.weights, self.config, m.block_path, m.source_blocks)) != m.sha256:
            raise EmulatorError(
                f"emulator is damaged: its hash must be {self.manifest.sha256[:12]}, got {got[:12]}"
            )

    def save(self, folder: Path) -> None:
        """Write a folder that transformers can load too, with manifest.json beside the weights."""
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
    model: transformers.PreTrainedModel,
    *,
    recipe: str,
    block_path: str,
    source_blocks: Sequence[int],
    num_source_blocks: int,
    dtype: torch.dtype,
    parent_sha256: str,
) -> EmulatorPackage:
    """Return an emulator's network as the bytes that travel, rounded to ``dtype``."""
    state = {
        name: t.detach().to("cpu", dtype).contiguous() for name, t in _untied_state(model).items()
    }
    weights = bytes(safetensors.torch.save(state, metadata={"format": "pt"}))
    config = json.loads(model.config.to_json_string(use_diff=False)) | {
        "dtype": str(dtype).split(".")[-1]
    }
    manifest = Manifest(
        recipe=recipe,
        block_path=block_path,
        source_blocks=tuple(source_blocks),
        num_source_blocks=num_source_blocks,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_bytes=len(weights),
        dtype=str(dtype).split(".")[-1],
        parent_sha256=parent_sha256,
        sha256=identity(weights, config, block_path, source_blocks),
    )
    return EmulatorPackage(manifest, config, weights)


def identity(
    weights: bytes, config: Mapping[str, Any], block_path: str, source_blocks: Sequence[int]
) -> str:
    """Return the hash that names an emulator: of its weights and of how to use them."""
    digest = hashlib.sha256(weights)
    digest.update(
        json.dumps([dict(config), block_path, list(source_blocks)], sort_keys=True).encode()
    )
    return digest.hexdigest()


def _untied_state(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the state without second names of one tensor, which safetensors would refuse."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


def _load_untied(model: transformers.PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
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
    manifest = Manifest(**{**data, "source_blocks": tuple(data["source_blocks"])})
    if manifest.schema != SCHEMA:
        raise EmulatorError(f"emulator schema must be {SCHEMA}, got {manifest.schema!r}")
    return manifest
