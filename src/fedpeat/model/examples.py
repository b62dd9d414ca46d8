"""Random inputs for a network, to see how it works inside; nothing is learnt from them."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from fedpeat.core.errors import ModelError

__all__ = ["bound_inputs", "random_inputs"]

BATCH_SIZE = 2
LENGTH = 16
IMAGE_SIZE = 64  # where a configuration names none


def random_inputs(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """Return random token ids or pixels, the same at every call, by the names the network has.

    Raises:
        ModelError: If it takes something else.
    """
    accepted = signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)
    name = model.main_input_name
    if name == "pixel_values":
        inputs: dict[str, Any] = {name: _pixels(model.config, generator)}
    elif name == "input_ids":
        ids = _token_ids(model.config, generator)
        inputs = {name: ids}
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(ids)
        if model.config.is_encoder_decoder and "decoder_input_ids" in accepted:
            inputs["decoder_input_ids"] = ids
    else:
        raise ModelError(
            f"random inputs are text or images; {type(model).__name__} takes {name}; from Python, "
            "fedpeat.inspect(model, inputs) takes any"
        )
    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in inputs.items()}
    return inputs | ({"use_cache": False} if "use_cache" in accepted else {})


def bound_inputs(model: nn.Module, inputs: object) -> dict[str, Any]:
    """Return a network's inputs by the names that its ``forward`` gives them.

    Args:
        model: The network.
        inputs: One tensor, several in order, or arguments by name.

    Raises:
        ModelError: If ``forward`` does not take them.
    """
    if isinstance(inputs, Mapping):
        return dict(inputs)
    given = inputs if isinstance(inputs, list | tuple) else (inputs,)
    try:
        bound = signature(model.forward).bind(*given)
    except TypeError as error:
        raise ModelError(f"{type(model).__name__} does not take these inputs: {error}") from error
    unnamed = [p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_POSITIONAL]
    if unnamed:
        raise ModelError(
            f"forward of {type(model).__name__} must name its inputs, got *{unnamed[0]}; wrap it "
            "in a module that does"
        )
    return dict(bound.arguments)


def _token_ids(config: transformers.PretrainedConfig, generator: torch.Generator) -> Tensor:
    """Return ids that are no special tokens, (batch, length), with the end's at the end."""
    text = config.get_text_config()
    special = {
        number
        for part in (config, text)
        for key, value in part.to_dict().items()
        if key.endswith(("_token_id", "_token_index"))
        for number in (value if isinstance(value, list) else [value])
    }
    ordinary = torch.tensor([i for i in range(text.vocab_size) if i not in special])
    ids = ordinary[torch.randint(len(ordinary), (BATCH_SIZE, LENGTH), generator=generator)]
    if isinstance(eos := getattr(text, "eos_token_id", None), int) and eos < text.vocab_size:
        ids[:, -1] = eos
    return ids


def _pixels(config: transformers.PretrainedConfig, generator: torch.Generator) -> Tensor:
    """Return images of the configuration's size, (batch, channels, height, width)."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", IMAGE_SIZE)
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", 3)
    return torch.randn(BATCH_SIZE, channels, height, width, generator=generator)
