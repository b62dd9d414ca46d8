"""An emulator as it is stored and sent: parts with weights, a configuration and a manifest.

What a device computes with is always built from these bytes, on the server too, so that all hold
identical weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from fedpeat.core.errors import EmulatorError
from fedpeat.core.run_folder import replace_folder
from fedpeat.core.wire import Payload
from fedpeat.emulator.parts import (
    OUTSIDE,
    Contents,
    Tensors,
    fill,
    part_bytes,
    part_hash,
    read_part,
    short,
    split,
    tensor_names,
    untied_state,
)
from fedpeat.emulator.update import UPDATE, add_update
from fedpeat.model.blocks import BlockList, Blocks
from fedpeat.model.cut import frozen, skeleton
from fedpeat.model.layers import Kept, LayerSpec, num_parameters, read_specs

__all__ = [
    "EmulatorPackage",
    "Manifest",
    "Memory",
    "Part",
    "check_only_own_blocks",
    "pack_emulator",
]

SCHEMA = 5
WEIGHTS_FILE, UPDATE_FILE = "model.safetensors", "update.safetensors"
KEPT_FILE = "kept.json"
_MAX_BLOCKS = 2**16

Memory = MutableMapping[str, dict[str, torch.Tensor]]
"""Tensors of parts by the parts' hashes; networks that are built from one share it."""


@dataclass(frozen=True)
class Part:
    """A part of an emulator, as its manifest lists it."""

    name: str
    sha256: str
    num_bytes: int


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
        num_bytes: Length of all parts together.
        dtype: Type of the weights.
        parent_sha256: Fingerprint of the full model's weights.
        kept_sha256: Hash of what its narrower layers have of the full model's.
        sha256: Hash of parts, configuration and block indices; the emulator's identity.
        parts: Its parts.
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
    kept_sha256: str
    sha256: str
    parts: tuple[Part, ...]
    fidelity: Mapping[str, float] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def hashes(self) -> list[str]:
        """Hashes of its parts."""
        return [part.sha256 for part in self.parts]


@dataclass(frozen=True)
class EmulatorPackage:
    """The bytes of an emulator with their description.

    Attributes:
        manifest: What it is.
        config: Configuration of the full model; blocks are taken out of a network built from it.
        parts: Its parts by hash, or those of them that were sent.
        kept: Rows and columns that its narrower layers have, by the layers' names in the full
            model. They stay with the server: a device needs no more than how many there are.
    """

    manifest: Manifest
    config: Mapping[str, Any]
    parts: Mapping[str, bytes]
    kept: Kept = field(default_factory=dict)

    def build(
        self, device: torch.device, dtype: torch.dtype, memory: Memory | None = None
    ) -> transformers.PreTrainedModel:
        """Return the network, frozen, in evaluation mode.

        Args:
            device: Where it is to compute.
            dtype: Type in which it is to compute.
            memory: Parts that are in memory already, to be shared; those that are not are added.

        Raises:
            EmulatorError: If weights and configuration do not fit each other.
        """
        manifest = self.manifest
        memory = {} if memory is None else memory
        try:
            model = skeleton(
                manifest.architecture,
                self.config,
                manifest.blocks,
                manifest.source_blocks,
                dtype,
                layers=manifest.layers,
            )
            self._read_into(memory)
            weights = [memory[p.sha256] for p in self.manifest.parts if p.name != UPDATE]
            fill(model, self.full_names(untied_state(model)), weights, device)
            self._add_update(model, memory, device, dtype)
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

    def full_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return the name in the full model of each tensor or layer of the network."""
        blocks, kept = self.manifest.blocks, self.manifest.source_blocks
        return blocks.select(kept).rename(names, blocks, dict(enumerate(kept)))

    def own_names(self, names: Iterable[str]) -> dict[str, str]:
        """Return the name in the network of each tensor or layer of the full model."""
        blocks, kept = self.manifest.blocks, self.manifest.source_blocks
        return blocks.rename(names, blocks.select(kept), {i: place for place, i in enumerate(kept)})

    def _read_into(self, memory: Memory) -> None:
        for part in self.manifest.parts:
            if part.sha256 not in memory:
                memory[part.sha256] = read_part(self.parts[part.sha256])

    def _add_update(
        self, model: nn.Module, memory: Memory, device: torch.device, dtype: torch.dtype
    ) -> None:
        factors = {
            name: tensor.to(device, dtype)
            for part in self.manifest.parts
            if part.name == UPDATE
            for name, tensor in memory[part.sha256].items()
        }
        own = self.own_names(factors)
        add_update(model, {own[name]: tensor for name, tensor in factors.items()})

    def update(self) -> dict[str, torch.Tensor]:
        """Return the factors of its low-rank update by their layers' names in the full model."""
        parts = [part.sha256 for part in self.manifest.parts if part.name == UPDATE]
        return {name: t for sha256 in parts for name, t in read_part(self.parts[sha256]).items()}

    def with_parts(self, changed: Mapping[str, Tensors]) -> EmulatorPackage:
        """Return the emulator with other tensors in some parts, by their names; none for no part.

        Tensors are rounded to the type of the emulator's weights.
        """
        dtype = getattr(torch, self.manifest.dtype)
        contents = {part.name: self.parts[part.sha256] for part in self.manifest.parts}
        for name, tensors in changed.items():
            if not tensors:
                contents.pop(name, None)
            else:
                stored = {n: _stored(t, dtype).contiguous() for n, t in tensors.items()}
                contents[name] = part_bytes(stored)
        listed, by_hash = _listed(contents)
        manifest = replace(
            self.manifest, parts=listed, num_bytes=sum(part.num_bytes for part in listed)
        )
        manifest = replace(manifest, sha256=identity(self.config, manifest))
        return replace(self, manifest=manifest, parts=by_hash)

    def to_payload(self, held: Collection[str] = ()) -> Payload:
        """Return the emulator as a message, without the parts that somebody holds.

        Args:
            held: Beginnings of the hashes of parts, as ``short`` gives them.
        """
        record = {"manifest": asdict(self.manifest), "config": dict(self.config)}
        arrays = {
            sha256: np.frombuffer(content, np.uint8)
            for sha256, content in self.parts.items()
            if short(sha256) not in held
        }
        return Payload(arrays, record)

    @classmethod
    def from_payload(cls, payload: Payload) -> EmulatorPackage:
        """Return the emulator in a message, what came of it verified.

        Raises:
            EmulatorError: If the message is of another kind, or a hash does not fit.
        """
        try:
            manifest = _manifest_from_dict(payload.record["manifest"])
            package = cls(manifest, dict(payload.record["config"]), Contents(payload.arrays))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise EmulatorError(f"not an emulator: {error!r:.200}") from error
        package.verify()
        return package

    def verify(self) -> None:
        """Check that manifest, configuration and parts belong together.

        Raises:
            EmulatorError: If they do not.
        """
        wanted, got = self.manifest.sha256, identity(self.config, self.manifest)
        if got != wanted:
            raise EmulatorError(
                f"emulator is damaged: its hash must be {wanted[:12]}, got {got[:12]}"
            )
        listed = {part.sha256: part for part in self.manifest.parts}
        for sha256, content in self.parts.items():
            if sha256 not in listed:
                raise EmulatorError(f"part {sha256[:12]} is none of emulator {wanted[:12]}")
            part = listed[sha256]
            if len(content) != part.num_bytes:
                raise EmulatorError(
                    f"emulator is damaged: its {part.name} must have {part.num_bytes} bytes, "
                    f"got {len(content)}"
                )
            if (got := part_hash(content)) != sha256:
                raise EmulatorError(
                    f"emulator is damaged: the hash of its {part.name} must be {sha256[:12]}, "
                    f"got {got[:12]}"
                )

    def save(self, folder: Path) -> None:
        """Write weights, the full model's configuration and the manifest into a folder."""
        weights: dict[str, torch.Tensor] = {}
        with replace_folder(folder) as temporary:
            for part in self.manifest.parts:
                if part.name == UPDATE:
                    (temporary / UPDATE_FILE).write_bytes(self.parts[part.sha256])
                else:
                    weights |= safetensors.torch.load(self.parts[part.sha256])
            safetensors.torch.save_file(
                weights, temporary / WEIGHTS_FILE, metadata={"format": "pt"}
            )
            if self.kept:
                (temporary / KEPT_FILE).write_text(json.dumps(dict(self.kept)))
            (temporary / "config.json").write_text(json.dumps(dict(self.config), indent=2))
            (temporary / "manifest.json").write_text(json.dumps(asdict(self.manifest), indent=2))

    @classmethod
    def load(cls, folder: Path) -> EmulatorPackage:
        """Read a folder that ``save`` wrote, its hashes verified.

        Raises:
            EmulatorError: If a file is missing or damaged.
        """
        try:
            manifest = _manifest_from_dict(json.loads((folder / "manifest.json").read_text()))
            config = json.loads((folder / "config.json").read_text())
            tensors = split(safetensors.torch.load_file(folder / WEIGHTS_FILE), manifest.blocks)
            updates = [path.read_bytes() for path in folder.glob(UPDATE_FILE)]
            texts = [path.read_text() for path in folder.glob(KEPT_FILE)]
            kept = {name: tuple(own) for text in texts for name, own in json.loads(text).items()}
        except SafetensorError as error:
            raise EmulatorError(f"emulator {folder} is damaged: {error}") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise EmulatorError(f"cannot read emulator {folder}: {error}") from error
        contents = {name: part_bytes(tensors.pop(name)) for name in list(tensors)}
        parts = _listed(contents)[1]
        parts |= {part_hash(content): content for content in updates}
        package = cls(manifest, config, parts, kept)
        package.verify()
        if (got := _kept_hash(kept)) != (wanted := manifest.kept_sha256):
            raise EmulatorError(
                f"emulator is damaged: the hash of {KEPT_FILE} must be {wanted[:12]}, "
                f"got {got[:12]}"
            )
        if lacking := package.lacking():
            raise EmulatorError(f"emulator is damaged: it lacks {', '.join(lacking)}")
        return package

    def lacking(self, held: Collection[str] = ()) -> list[str]:
        """Return the names of the parts that are neither here nor among those held."""
        return [
            part.name
            for part in self.manifest.parts
            if part.sha256 not in self.parts and short(part.sha256) not in held
        ]

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
    kept: Kept | None = None,
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
        kept: Rows and columns that are left of the full model's layers; those of other blocks than
            its own are passed over.
        recipe: How it was made.
        dtype: Type of the weights.
        parent_sha256: Fingerprint of the full model's weights.
    """
    state = {
        name: _stored(tensor, dtype).contiguous() for name, tensor in untied_state(emulator).items()
    }
    names = blocks.select(source_blocks).rename(state, blocks, dict(enumerate(source_blocks)))
    listed, parts = _parts({names[name]: tensor for name, tensor in state.items()}, blocks)
    config = json.loads(parent.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # where the owner keeps the model is nobody's business
    config["dtype"] = str(dtype).split(".")[-1]
    own = {n: k for n, k in (kept or {}).items() if blocks.locate(n) in {None, *source_blocks}}
    manifest = Manifest(
        recipe=recipe,
        architecture=type(parent).__name__,
        blocks=blocks,
        source_blocks=tuple(source_blocks),
        layers=tuple(layers),
        num_parameters=num_parameters(emulator),
        num_bytes=sum(part.num_bytes for part in listed),
        dtype=str(dtype).split(".")[-1],
        parent_sha256=parent_sha256,
        kept_sha256=_kept_hash(own),
        sha256="",
        parts=listed,
    )
    manifest = replace(manifest, sha256=identity(config, manifest))
    return EmulatorPackage(manifest, config, parts, own)


def check_only_own_blocks(package: EmulatorPackage) -> None:
    """Check that nothing of a dropped block is in any part of an emulator that is to be sent.

    Raises:
        EmulatorError: If a part has a tensor of another block than it is named after, or of one
            that the emulator does not keep.
    """
    manifest = package.manifest
    kept = {index: f"block {index}" for index in manifest.source_blocks}
    names = {part.sha256: part.name for part in manifest.parts}
    for sha256, content in package.parts.items():
        for tensor in tensor_names(content):
            index = manifest.blocks.locate(tensor)
            home = OUTSIDE if index is None else kept.get(index)
            if home is None or names[sha256] not in {home, UPDATE}:
                raise EmulatorError(
                    f"part {names[sha256]!r} of an emulator of blocks {list(kept)} must have "
                    f"tensors of its own alone, got {tensor}; nothing is sent"
                )


def _kept_hash(kept: Kept) -> str:
    return hashlib.sha256(json.dumps(dict(kept), sort_keys=True).encode()).hexdigest()


def identity(config: Mapping[str, Any], manifest: Manifest) -> str:
    """Return the hash that names an emulator: of its parts' hashes and of how to use them."""
    use = [
        dict(config),
        manifest.architecture,
        asdict(manifest.blocks),
        manifest.source_blocks,
        [asdict(spec) for spec in manifest.layers],
        manifest.kept_sha256,
        [asdict(part) for part in manifest.parts],
    ]
    return hashlib.sha256(json.dumps(use, sort_keys=True).encode()).hexdigest()


def _parts(state: Tensors, blocks: Blocks) -> tuple[tuple[Part, ...], dict[str, bytes]]:
    """Return the parts of a state as the manifest lists them, and their bytes by hash."""
    return _listed({n: part_bytes(tensors) for n, tensors in split(state, blocks).items()})


def _listed(contents: Mapping[str, bytes]) -> tuple[tuple[Part, ...], dict[str, bytes]]:
    """Return parts, given by name, as the manifest lists them, and by hash."""
    parts = tuple(Part(name, part_hash(c), len(c)) for name, c in contents.items())
    return parts, {part.sha256: contents[part.name] for part in parts}


def _stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor as it is stored: numbers with a point are rounded, and never widened."""
    rounds = tensor.is_floating_point() and tensor.dtype.itemsize >= dtype.itemsize
    return tensor.detach().to("cpu", dtype if rounds else tensor.dtype)


def _manifest_from_dict(data: Mapping[str, Any]) -> Manifest:
    if (schema := data.get("schema")) != SCHEMA:
        raise EmulatorError(f"emulator schema must be {SCHEMA}, got {schema!r}")
    lists = [BlockList(tuple(i["paths"]), int(i["num_blocks"])) for i in data["blocks"]["lists"]]
    blocks = Blocks(tuple(lists))
    if not 0 < blocks.num_blocks <= _MAX_BLOCKS:
        raise EmulatorError(f"an emulator must be of 1 to {_MAX_BLOCKS} blocks")
    parts = tuple(
        Part(str(p["name"]), str(p["sha256"]), int(p["num_bytes"])) for p in data["parts"]
    )
    source_blocks, layers = tuple(data["source_blocks"]), read_specs(data["layers"])
    read = {"blocks": blocks, "source_blocks": source_blocks, "layers": layers, "parts": parts}
    return Manifest(**{**data, **read})
