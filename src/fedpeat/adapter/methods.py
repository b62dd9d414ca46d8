"""How each PEFT method is put onto a network: one function each, one line in the table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import constants as peft_defaults
from peft.utils import transformers_weight_conversion as peft_conversion
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from fedpeat.config.schema import AdapterConfig
from fedpeat.core.errors import AdapterError
from fedpeat.model.blocks import Blocks
from fedpeat.model.layers import FewBits

__all__ = ["METHODS", "AttachMethod"]

AttachMethod = Callable[[nn.Module, Blocks, Sequence[int], AdapterConfig], nn.Module]


def attach_lora(
    model: nn.Module, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig
) -> nn.Module:
    """Put LoRA (or DoRA) onto linear layers of the tuned blocks.

    Source:
        Hu et al. (2022), LoRA; Kalajdzievski (2023), rsLoRA; Liu et al. (2024), DoRA.
    """
    names = _matching(model, blocks, tuned, config.target_modules) or _linear_layers(
        model, blocks, tuned
    )
    if not names:
        kinds = {type(m).__name__ for _, m in _modules_in(model, blocks, tuned)}
        raise AdapterError(
            "LoRA needs linear layers or plain convolutions; the tuned blocks of "
            f"{type(model).__name__} have only {', '.join(sorted(kinds))}; adapter.method none "
            "tunes whole blocks"
        )
    settings = peft.LoraConfig(
        task_type=_task(model),
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
    model: nn.Module, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig
) -> nn.Module:
    """Put IA3 onto the tuned blocks.

    Source:
        Liu et al. (2022), Few-shot parameter-efficient fine-tuning is better and cheaper than
        in-context learning.
    """
    kind = _model_type(model)
    table = peft_defaults.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    wanted = config.target_modules or tuple(table.get(kind, ()))
    if not wanted:
        raise AdapterError(
            f"IA3 has no default modules for {kind!r} models; set adapter.target_modules"
        )
    feedforward = peft_defaults.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])
    names = _matching(model, blocks, tuned, wanted)
    settings = peft.IA3Config(
        task_type=_task(model),
        target_modules=names,
        feedforward_modules=[n for n in names if any(n.endswith("." + f) for f in feedforward)],
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
    )
    return _put_on(model, settings)


def attach_prompt(
    model: nn.Module, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig
) -> nn.Module:
    """Put a soft prompt before the input; no block is changed.

    Source:
        Lester, Al-Rfou, Constant (2021), The power of scale for parameter-efficient prompt tuning.
    """
    del blocks, tuned
    settings = peft.PromptTuningConfig(
        task_type=_task(model), num_virtual_tokens=config.num_virtual_tokens
    )
    return _put_on(model, settings)


def attach_blocks(
    model: nn.Module, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig
) -> nn.Module:
    """Tune whole blocks (EAT), kept in float32 so that small steps are not rounded away."""
    del config
    for index in tuned:
        for name, part in blocks.parts(model, index):
            if any(isinstance(module, FewBits) for module in part.modules()):
                raise AdapterError(
                    f"adapter.method none tunes whole blocks, and {name} is stored in few bits; "
                    "lora works on top of int8 and int4"
                )
            part.float().requires_grad_(True)
    return model


def attach_everything(
    model: nn.Module, blocks: Blocks, tuned: Sequence[int], config: AdapterConfig
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


_EXPERTS_LIKE: dict[str, str] = peft_conversion._MODEL_TO_CONVERSION_PATTERN  # type: ignore[attr-defined] # noqa: SLF001


def _task(model: nn.Module) -> peft.TaskType | None:
    """Return PEFT's name for what a network does, where PEFT needs to know."""
    for task, classes in (
        (peft.TaskType.CAUSAL_LM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (peft.TaskType.SEQ_2_SEQ_LM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ):
        if any(type(model).__name__ in _names(value) for value in classes.values()):
            return task
    return None


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", None))


def _names(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


def _put_on(model: nn.Module, settings: peft.PeftConfig) -> nn.Module:
    with warnings.catch_warnings():  # nothing a user can change
        warnings.filterwarnings(  # peft 0.21 asks transformers 5.23 by an old name
            "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
        )
        warnings.filterwarnings(  # peft sets it right for each layer of a mixed network
            "ignore", message="fan_in_fan_out is set to", category=UserWarning
        )
        tuned = peft.get_peft_model(model, settings)
    _show_settings(tuned)
    return tuned


def _show_settings(tuned: nn.Module) -> None:
    """Let networks that read a layer's settings, such as a convolution's stride, still find them.

    PEFT puts a layer of its own around the tuned one.
    """
    for module in tuned.modules():
        if isinstance(module, BaseTunerLayer):
            for name, value in vars(module.get_base_layer()).items():
                if not name.startswith("_") and not hasattr(module, name):
                    setattr(module, name, value)


def _modules_in(
    model: nn.Module, blocks: Blocks, tuned: Sequence[int]
) -> list[tuple[str, nn.Module]]:
    return [
        (f"{part_name}.{name}" if name else part_name, module)
        for index in tuned
        for part_name, part in blocks.parts(model, index)
        for name, module in part.named_modules()
        if not isinstance(part.get_submodule(name.rpartition(".")[0]), nn.Linear | Conv1D)
    ]


def _linear_layers(model: nn.Module, blocks: Blocks, tuned: Sequence[int]) -> list[str]:
    """Return the layers that PEFT can put LoRA onto: linear ones, or convolutions if none is."""
    refused = _refused_by_peft(model)
    modules = [
        (name, module)
        for name, module in _modules_in(model, blocks, tuned)
        if name.rpartition(".")[2] not in refused
    ]
    return [name for name, module in modules if _is_linear(module)] or [
        name
        for name, module in modules
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1
    ]


def _is_linear(module: nn.Module) -> bool:
    """Say whether a layer maps vectors to vectors; routers are subclasses that return more."""
    if type(module).forward in {nn.Linear.forward, Conv1D.forward}:
        return True
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    weight = module.weight
    width = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
    vector = torch.zeros(1, width, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        try:
            return isinstance(module(vector), torch.Tensor)
        except (RuntimeError, TypeError, ValueError):  # it wants something else than a vector
            return False


def _refused_by_peft(model: nn.Module) -> set[str]:
    """Return names of layers that PEFT 0.21 would not tune where they are.

    Names that mixtures of experts used in transformers 4 it moves to the experts of every block,
    and two of Mamba's it rejects.
    """
    kind = _model_type(model)
    experts = _EXPERTS_LIKE.get(kind, "")
    moved = peft_conversion._MOE_TARGET_MODULE_MAPPING.get(experts, {})  # noqa: SLF001
    mamba = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}
    return {*moved, *({"out_proj", "conv1d"} if kind in mamba else ())}


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
