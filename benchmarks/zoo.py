"""A small random network of every architecture that transformers can build.

Everything is made from configurations, with random weights: nothing is downloaded. A network has
about six blocks, and where an architecture mixes kinds of blocks, those six show the mix. What
takes part beside, such as the vision tower of a causal LM, has four.

    python benchmarks/zoo.py [FAMILY ...] [--only TYPE ...] [--seconds 60]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zoo_sizes import (
    ALWAYS_TRAINING,
    CANNOT,
    COMMON_IDS,
    COUNTS,
    LARGE,
    LENGTH,
    LISTS,
    MORE,
    NUM_SIDE_BLOCKS,
    SMALL,
    SMALL_FOR_NONE,
    VOCAB_SIZE,
)

BATCH_SIZE = 2
NUM_LABELS = 3


class ZooError(ValueError):
    """An architecture cannot be built or run here; the text says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Networks with the same kind of head.

    Attributes:
        auto: The class that builds them from a configuration.
        class_names: The class, or the classes, of every architecture that has this head.
    """

    auto: Any
    class_names: Mapping[str, Sequence[str]]


FAMILIES: dict[str, Family] = {
    "causal_lm": Family(
        transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ),
    "masked_lm": Family(
        transformers.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    ),
    "sequence_classification": Family(
        transformers.AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "seq2seq_lm": Family(
        transformers.AutoModelForSeq2SeqLM,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ),
    "image_classification": Family(
        transformers.AutoModelForImageClassification,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
}


def tiny_config(model_type: str, family: str) -> transformers.PretrainedConfig:
    """Return the configuration of a small network of some architecture.

    Raises:
        ZooError: If the family has no such architecture, or it cannot work here.
    """
    if family not in FAMILIES:
        raise ZooError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    names = FAMILIES[family].class_names
    if model_type not in names:
        raise ZooError(f"transformers has no {family} of type {model_type!r}")
    if model_type in CANNOT:
        raise ZooError(f"{model_type}: {CANNOT[model_type]}")
    more: dict[str, Any] = {"num_labels": NUM_LABELS}
    if not isinstance(names[model_type], str):  # then the configuration says which of them
        more["architectures"] = [names[model_type][0]]
    with _in_one_line(f"{model_type}: no configuration"):
        config: transformers.PretrainedConfig = _Maker(family).make(
            CONFIG_MAPPING[model_type], **more
        )
    return config


def build(model_type: str, family: str, seed: int = 0) -> transformers.PreTrainedModel:
    """Return a small random network in float32, in evaluation mode where it can be tuned in it.

    Raises:
        ZooError: If it cannot be built here.
    """
    config = tiny_config(model_type, family)
    with _in_one_line(f"{model_type}: not built"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = FAMILIES[family].auto.from_config(
            config, dtype=torch.float32
        )
        _liven(model.eval())
    model.train(model_type in ALWAYS_TRAINING)
    return model


@torch.no_grad()
def _liven(model: transformers.PreTrainedModel) -> None:
    """Make every block matter, as in a trained network.

    Weights that start at zero are drawn, and batch norms get the statistics of a batch: with those
    that they start with, a deep stack of them fades to zero.
    """
    for matrix in [p for p in model.parameters() if p.ndim > 1 and not p.any()]:
        nn.init.normal_(matrix, std=LARGE["initializer_range"])
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    if model.main_input_name != "pixel_values" or not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(pixel_values=_pixels(model.config, torch.Generator().manual_seed(1), batch_size=32))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def tiny_batch(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Return two examples with labels, the same at every call."""
    config, name = model.config, type(model).__name__
    generator = torch.Generator().manual_seed(0)
    if "ImageClassification" in name and model.main_input_name != "input_ids":
        batch = {"pixel_values": _pixels(config, generator)}
    else:
        batch = _text(model, generator)
    batch |= EXTRA_INPUTS.get(config.model_type, _nothing)(config, generator)
    classifies = "Classification" in name
    batch["labels"] = torch.arange(BATCH_SIZE) if classifies else batch["input_ids"].clone()
    return batch


def loss_of(model: transformers.PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of a batch, with no cache.

    Raises:
        ZooError: If the network returns none.
    """
    accepted = inspect.signature(model.forward).parameters
    output = model(**batch, **({"use_cache": False} if "use_cache" in accepted else {}))
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ZooError(f"{model.config.model_type}: has no loss")
    return loss


class _Maker:
    """Makes the configuration of a network and of its parts.

    Attributes:
        family: The family of the network.
        special_ids: Where the ids of special tokens went, alike in all parts.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.special_ids: dict[str, int] = {}

    def make(self, config_class: Any, **more: Any) -> Any:
        """Return a configuration with small values wherever its class has their names."""
        defaults = _defaults(config_class)
        settings = _small(config_class, defaults) | self._moved_ids(defaults)
        settings |= {
            name: self._part(name, spec)
            for name, spec in config_class.sub_configs_defaults.items()
            if name in defaults
        }
        if "is_decoder" in defaults and self.family == "causal_lm":
            settings["is_decoder"] = True
        return config_class(**(settings | MORE.get(config_class.model_type, {}) | more))

    def _part(self, name: str, spec: Any) -> Any:
        """Return the configuration of a part; one that the family does not use has few blocks."""
        config_class = spec.config_class
        if not dataclasses.is_dataclass(config_class):
            config_class = CONFIG_MAPPING[spec.model_type]
        more = {k: v for k, v in spec.init_kwargs.items() if k in KEPT_OF_PARTS}
        if not self._uses(name):
            defaults = _defaults(config_class)
            more |= {k: NUM_SIDE_BLOCKS for k in COUNTS if _is_int(defaults.get(k))}
        return self.make(config_class, **more)

    def _uses(self, part: str) -> bool:
        if self.family == "image_classification":
            return part == "vision_config"
        return part in {"text_config", "encoder", "decoder", "global_config"}

    def _moved_ids(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return new ids for the special tokens that are not in the small vocabulary."""
        moved: dict[str, Any] = {}
        for name, value in defaults.items():
            largest = max(value, default=0) if isinstance(value, list | tuple) else value
            is_id = name.endswith(("_token_id", "_token_index"))
            if not is_id or not _is_int(largest) or largest < VOCAB_SIZE:
                continue
            unused = VOCAB_SIZE - 1 - len(self.special_ids)
            moved[name] = (
                COMMON_IDS[name]
                if name in COMMON_IDS
                else self.special_ids.setdefault(name.removesuffix("_index"), unused)
            )
        return moved


# Of the settings that a class gives to its parts, those that say what kind of part it is.
KEPT_OF_PARTS = ("is_decoder", "add_cross_attention")


def _small(config_class: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the small values of the settings that a class has, under the names it gives them."""
    own = {name: name for name in SMALL if name in defaults}
    mapped = {config_class.attribute_map.get(name): name for name in SMALL if name not in own}
    names = {k: v for k, v in (mapped | own).items() if _is_int(defaults.get(k))}
    small: dict[str, Any] = {target: SMALL[name] for target, name in names.items()}
    for name, default in defaults.items():
        if default is None and name in SMALL_FOR_NONE:
            small[name] = SMALL_FOR_NONE[name]
        elif isinstance(default, float) and default < LARGE.get(name, default):
            small[name] = LARGE[name]
        elif isinstance(default, tuple) and name in LISTS and len(default) <= len(LISTS[name]):
            small[name] = LISTS[name][: len(default)]
    if "kv_lora_rank" in defaults and "num_key_value_heads" in small:
        small["num_key_value_heads"] = SMALL["num_attention_heads"]  # latent attention: no groups
    return small


def _defaults(config_class: Any) -> dict[str, Any]:
    """Return the default of each setting of a configuration class."""
    return {
        f.name: f.default_factory() if callable(f.default_factory) else f.default
        for f in dataclasses.fields(config_class)
    }


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _text(model: transformers.PreTrainedModel, generator: torch.Generator) -> dict[str, Tensor]:
    """Return token ids that end as the architecture wants it, and a mask where it takes one."""
    ids = torch.randint(4, 100, (BATCH_SIZE, LENGTH), generator=generator)
    eos = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids[:, -1] = eos if isinstance(eos, int) else COMMON_IDS["eos_token_id"]
    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    return {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if takes_mask else {})}


def _pixels(
    config: transformers.PretrainedConfig, generator: torch.Generator, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Return images of the size in the configuration, (batch, channels, height, width)."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", SMALL["image_size"])
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", 3)
    return torch.randn(batch_size, channels, height, width, generator=generator)


def _patches(
    config: transformers.PretrainedConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return images cut into four by four patches."""
    width = config.vision_config.num_channels * config.vision_config.patch_size**2
    return {
        "pixel_values": torch.randn(BATCH_SIZE, 16, width, generator=generator),
        "pixel_attention_mask": torch.ones(BATCH_SIZE, 16, dtype=torch.long),
        "spatial_shapes": torch.full((BATCH_SIZE, 2), 4),
    }


def _sound(config: transformers.PretrainedConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a spectrogram that is as long as the text."""
    shape = (BATCH_SIZE, config.audio_config.num_mel_bins, LENGTH * config.audio_length_per_tok)
    return {"input_features": torch.randn(shape, generator=generator)}


def _nothing(*_: object) -> dict[str, Tensor]:
    return {}


# What an architecture does not run without.
EXTRA_INPUTS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "git": lambda config, generator: {"pixel_values": _pixels(config, generator)},
    "siglip2": _patches,
    "voxtral_realtime": _sound,
}


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turn any error into a ZooError of one line."""
    try:
        yield
    except ZooError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ZooError(f"{what}: {type(error).__name__}: {reason}") from error


def main() -> None:
    """Build every architecture, run it forwards and backwards, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("families", nargs="*", metavar="FAMILY", default=list(FAMILIES))
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="only these architectures")
    parser.add_argument(
        "--seconds", type=int, default=60, help="time limit of each (default: %(default)s)"
    )
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| family | architecture | result |\n|---|---|---|")
    totals = []
    for family in args.families:
        types = [t for t in FAMILIES[family].class_names if not args.only or t in args.only]
        results = [survey(model_type, family, args.seconds) for model_type in types]
        totals.append(f"{family}: {sum(results)} of {len(types)} ran")
    print("", *totals, sep="\n")


def survey(model_type: str, family: str, seconds: int) -> bool:
    """Print a line about one architecture, and return whether it ran forwards and backwards."""
    started = time.perf_counter()
    try:
        with _time_limit(seconds), _in_one_line(model_type):
            model = build(model_type, family)
            loss = loss_of(model, tiny_batch(model))
            loss.backward()
            if loss.ndim or not loss.isfinite():
                raise ZooError(f"{model_type}: loss is {loss}")
            tuned = sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
            if not tuned:
                raise ZooError(f"{model_type}: has no gradient")
    except ZooError as error:
        print(f"| {family} | {model_type} | {error} |", flush=True)
        return False
    size_mib = sum(p.nbytes for p in model.parameters()) / 2**20
    print(
        f"| {family} | {model_type} | loss {loss.item():.3f}, {size_mib:.2f} MiB, "
        f"{time.perf_counter() - started:.2f} s, "
        f"gradient in {tuned} of {len(list(model.parameters()))} tensors |",
        flush=True,
    )
    return True


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    main()
