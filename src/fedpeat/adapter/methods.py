"""How each PEFT method is put onto a network: one function each, one line in the table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import peft
import transformers
from peft.utils import constants as peft_defaults
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError
from fedpeat.model.blocks import Blocks

__all__ = ["METHODS", "AttachMethod"]

AttachMethod = Callable[
    [transformers.PreTrainedModel, Blocks, Sequence[int], AdapterConfig], nn.Module
]


def attach_lora(
    model: transformers.PreTrainedModel, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig
) -> nn.Module:
    """Put LoRA (or DoRA) onto linear layers of the tuned blocks.

    Source:
        Hu et al. (2022), LoRA; Kalajdzievski (2023), rsLoRA; Liu et al. (2024), DoRA.
    """
    names = _matching(model, blocks, tuned, config.target_modules) or _linear_layers(
        model, blocks, tuned
    )
    settings = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        target_modules=names,
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
    )
    return _put_on(model, settings)


def attach_ia3(
    model: transformers.PreTrainedModel, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig
) -> nn.Module:
    """Put IA3 onto the tuned blocks.

    Source:
        Liu et al. (2022), Few-shot parameter-efficient fine-tuning is better and cheaper than
        in-context learning.
    """
    kind = model.config.model_type
    table = peft_defaults.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    wanted = config.target_modules or tuple(table.get(kind, ()))
    if not wanted:
        raise AdapterError(
            f"IA3 has no default modules for {kind!r} models; set adapter.target_modules"
        )
    feedforward = peft_defaults.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    names = _matching(model, blocks, tuned, wanted)
    settings = peft.IA3Config(
        task_type=peft.TaskType.CAUSAL_LM,
        target_modules=names,
        feedforward_modules=[n for n in names if any(n.endswith("." + f) for f in feedforward)],
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
    )
    return _put_on(model, settings)


def attach_prompt(
    model: transformers.PreTrainedModel, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig
) -> nn.Module:
    """Put a soft prompt before the input; no block is changed.

    Source:
        Lester, Al-Rfou, Constant (2021), The power of scale for parameter-efficient prompt tuning.
    """
    del blocks, tuned
    settings = peft.PromptTuningConfig(
        task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=config.num_virtual_tokens
    )
    return _put_on(model, settings)


def attach_blocks(
    model: transformers.PreTrainedModel, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig
) -> nn.Module:
    """Tune whole blocks (EAT), kept in float32 so that small steps are not rounded away."""
    del config
    for index in tuned:
        blocks.of(model)[index].float().requires_grad_(True)
    return model


def attach_everything(
    model: transformers.PreTrainedModel, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig
) -> nn.Module:
    """Tune every weight, embeddings included."""
    del blocks, tuned, config
    model.float().requires_grad_(True)
    return model


METHODS: dict[str, AttachMethod] = {
    "lora": attach_lora,
    "ia3": attach_ia3,
    "prompt": attach_prompt,
    "none": attach_blocks,
    "full": attach_everything,
}


def _put_on(model: transformers.PreTrainedModel, settings: peft.PeftConfig) -> nn.Module:
    with (
        warnings.catch_warnings()
    ):  # peft 0.21 asks transformers 5.23 by an old name; nothing a user can change
        warnings.filterwarnings(
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        return peft.get_peft_model(model, settings)


def _modules_in(
    model: nn.Module, blocks: Blocks, tuned: Sequence[int]
) -> list[tuple[str, nn.Module]]:
    return [
        (f"{blocks.prefix(index)}.{name}", module)
        for index in tuned
        for name, module in blocks.of(model)[index].named_modules()
        if name
    ]


def _linear_layers(model: nn.Module, blocks: Blocks, tuned: Sequence[int]) -> list[str]:
    return [
        name for name, m in _modules_in(model, blocks, tuned) if isinstance(m, nn.Linear | Conv1D)
    ]


def _matching(
    model: nn.Module, blocks: Blocks, tuned: Sequence[int], wanted: Sequence[str]
) -> list[str]:
    """Return full names of the modules that end in a wanted name.

    Raises:
        AdapterError: If a wanted name matches nothing.
    """
    names = [name for name, _ in _modules_in(model, blocks, tuned)]
    for suffix in wanted:
        if not any(name.endswith("." + suffix) for name in names):
            known = sorted({n.rsplit(".", 1)[-1] for n in _linear_layers(model, blocks, tuned)})
            raise AdapterError(
                f"adapter.target_modules has {suffix!r}, which no tuned block has; "
                f"allowed: {', '.join(known)}"
            )
    return [name for name in names if any(name.endswith("." + suffix) for suffix in wanted)]
