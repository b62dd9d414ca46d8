"""Load a causal language model and its tokenizer, safetensors only and strictly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from fedpeat.core.errors import ModelError
from fedpeat.model.cut import frozen

__all__ = [
    "BUNDLED",
    "LoadedModel",
    "fingerprint",
    "load_model",
    "load_strictly",
    "load_tokenizer",
    "resolve_device",
    "resolve_dtype",
]

BUNDLED = "bundled"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A full model, ready to compute.

    Attributes:
        model: The causal LM, in evaluation mode, with every parameter frozen.
        tokenizer: Its tokenizer.
        name: What the user called it.
        location: Its Hub name or folder, for files that must name it.
        storage_dtype: Type of the weights in the model's own file.
        sha256: Fingerprint of the weights.
        num_parameters: Number of parameters, tied ones counted once.
    """

    model: transformers.PreTrainedModel
    tokenizer: Any
    name: str
    location: str
    storage_dtype: torch.dtype
    sha256: str
    num_parameters: int


def resolve_device(name: str) -> torch.device:
    """Return the device that "auto" or a name stands for.

    Raises:
        ModelError: If this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"model.device must be auto, cpu or a device of this machine, got {name!r}"
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type to compute in; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the tokenizer of a model.

    Raises:
        ModelError: If there is none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(
            _location(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load a tokenizer for {name!r}: {_first_line(error)}") from error


def load_model(
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal LM; its weights and those in its safetensors file must be the same set.

    Raises:
        ModelError: If the model is missing, damaged, not a causal LM, has no safetensors file, or
            if its file lacks weights or has some that the architecture does not know.
    """
    where = resolve_device(device)
    location = _location(name)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    model, storage = load_strictly(
        name,
        lambda _: transformers.AutoModelForCausalLM,
        revision=revision,
        dtype=dtype,
        device=where,
        trust_remote_code=trust_remote_code,
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    return LoadedModel(
        model, tokenizer, name, location, storage, fingerprint(model), num_parameters
    )


def load_strictly(
    name: str,
    kind_of: Callable[[Any], Any],
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: torch.device,
    trust_remote_code: bool = False,
) -> tuple[transformers.PreTrainedModel, torch.dtype]:
    """Load a network; its weights and those in its safetensors file must be the same set.

    Args:
        name: Hub name, folder, or "bundled".
        kind_of: Returns the class to load, given the configuration.
        revision: Branch, tag or commit.
        dtype: Type to compute in.
        device: Device to compute on.
        trust_remote_code: Whether the model may run code of its own.

    Returns:
        The network, frozen, and the type of the weights in its file.

    Raises:
        ModelError: If the model is missing, damaged, of another kind or has no safetensors file, or
            if its file lacks weights or has some that the architecture does not know.
    """
    location = _location(name)
    try:
        config = transformers.AutoConfig.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code
        )
        loaded: Any = kind_of(config).from_pretrained(
            location,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            dtype=resolve_dtype(dtype, device),
            output_loading_info=True,
        )
    except Exception as error:  # the Hub client, safetensors and transformers have their own kinds
        raise ModelError(
            f"cannot load model {name!r} (safetensors only): {_first_line(error)}"
        ) from error
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(problem) or ())):
            raise ModelError(f"model {name!r} has {problem.replace('_', ' ')}: {keys[:5]}")
    return frozen(model, device), getattr(config, "dtype", None) or torch.float32


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights, names included, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _location(name: str) -> str:
    if name == BUNDLED:
        return str(files("fedpeat") / "assets" / "base_model")
    looks_local = name.startswith((".", "/", "~")) or Path(name).is_dir()
    if looks_local:
        path = Path(name).expanduser()
        if not path.is_dir():
            raise ModelError(f"no such model folder: {name}")
        return str(path)
    return name


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
