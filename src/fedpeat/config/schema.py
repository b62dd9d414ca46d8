"""Every setting of a run: typed, frozen, checked where it is made, with a line of help each."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fedpeat.config.recipe import parse_recipe
from fedpeat.core.errors import ConfigError

__all__ = [
    "AdapterConfig",
    "AuditPlan",
    "CalibrationConfig",
    "ComparisonPlan",
    "Config",
    "ControllerConfig",
    "ControllerKind",
    "Cut",
    "DataConfig",
    "EmulatorConfig",
    "EvaluationConfig",
    "FederatedConfig",
    "LocalConfig",
    "Method",
    "ModelConfig",
    "Placement",
    "PrivacyAuditPlan",
    "PrivacyConfig",
    "ServerConfig",
    "Task",
    "WorldConfig",
]

Method = Literal["fedpeat", "fed_eat", "fed_peft", "fed_ft", "centralized", "local", "zero_shot"]
Placement = Literal["ends", "top", "all"]
PeftMethod = Literal["lora", "ia3", "prompt", "none", "full"]
Partition = Literal["natural", "iid", "dirichlet"]
Task = Literal["causal_lm", "image_classification"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
ServerOptimizer = Literal["fedavg", "fedavgm", "fedadam", "fedyogi"]
Cut = Literal["both", "encoder", "decoder"]
LoraAggregation = Literal["average", "ffa", "rolora", "svd"]
ClientWeighting = Literal["fidelity", "examples"]
UpdateCodecName = Literal["float32", "bf16", "int8", "topk"]
RobustRule = Literal["mean", "median", "trimmed_mean", "multi_krum"]
WorldPreset = Literal["iot", "phone", "laptop", "vehicular", "mixed"]
ControllerKind = Literal[
    "fixed", "tuned_fixed", "random", "round_robin", "channel", "deadline", "descent", "sabppo"
]
Bandwidth = Literal["optimal", "branch"]
Network = Literal["set", "mlp"]
Ratio = Literal["branch", "joint"]
NoiseOrigin = Literal["secret", "seed"]


def _require(condition: bool, name: str, allowed: str, got: object) -> None:  # noqa: FBT001
    if not condition:
        raise ConfigError(f"{name} must be {allowed}, got {got!r}")


def _require_choice(name: str, choices: object, got: object) -> None:
    allowed = get_args(choices)
    _require(got in allowed, name, "one of " + ", ".join(map(str, allowed)), got)


def _require_positive(name: str, got: float) -> None:
    _require(got > 0 and math.isfinite(got), name, "greater than 0", got)


def _require_not_negative(name: str, got: float) -> None:
    _require(got >= 0 and math.isfinite(got), name, "0 or more", got)


@dataclass(frozen=True)
class ModelConfig:
    """The full model, owned by the server."""

    name: str = "bundled"
    """Hub name (gpt2, facebook/opt-1.3b, ...), local folder, or "bundled" for the model that ships
    with fedpeat."""
    task: Task = "causal_lm"
    """What it does: causal_lm (next tokens of text, measured by perplexity) or image_classification
    (a class for each image, measured by accuracy; its head must know the classes)."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    dtype: DType = "auto"
    """Type to compute in; auto takes bfloat16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1, ..."""
    trust_remote_code: bool = False
    """Allow a Hub model to run its own Python code."""
    cut: Cut = "both"
    """Half of an encoder-decoder whose blocks are compressed and tuned: both, encoder or decoder;
    the other half is sent as it is."""

    def __post_init__(self) -> None:
        _require(bool(self.name), "model.name", "a Hub name, a folder or 'bundled'", self.name)
        _require_choice("model.task", Task, self.task)
        _require_choice("model.dtype", DType, self.dtype)
        _require_choice("model.cut", Cut, self.cut)


@dataclass(frozen=True)
class DataConfig:
    """Who owns which text or images."""

    source: str = "stdlib"
    """"stdlib" (this Python's own source, offline), a local .txt/.jsonl/.json/.csv/.parquet file,
    folder or glob, or the name of a Hub dataset. For images: a folder or archive (.tar.gz, .zip,
    ...) with a folder for each class, or a dataset with images."""
    subset: str | None = None
    """Configuration name of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset, or folder with folders of classes, to tune on."""
    validation_source: str | None = None
    """File or split for validation; without it, documents are held out by validation_ratio."""
    test_source: str | None = None
    """File or split for the test; without it, documents are held out by test_ratio."""
    text_field: str = "text"
    """Field with the text to learn (the answer, for instruction data)."""
    prompt_field: str | None = None
    """Field with a prompt, shown to the model but left out of the loss."""
    context_field: str | None = None
    """Field with further context, put after the prompt and left out of the loss."""
    key_field: str | None = None
    """Field naming the natural owner of a record (speaker, hospital, ...); a file name where there
    is none."""
    label_field: str | None = None
    """Field with the label that a Dirichlet partition skews, and the class of an image ("label" if
    not given)."""
    image_field: str = "image"
    """Column of a dataset with the images."""
    partition: Partition = "natural"
    """How documents are shared out: natural (by key), iid, or dirichlet (by label with alpha)."""
    alpha: float = 0.5
    """Concentration of the Dirichlet partition; smaller is more skewed."""
    num_clients: int | None = None
    """Number of devices; natural partitions take the owners with the most text, or all of them if
    not given."""
    server_ratio: float = 0.1
    """Share of documents that belong to the server, in [0, 1); the standard library source has its
    own."""
    validation_ratio: float = 0.1
    """Share of documents held out for validation, in [0, 1)."""
    test_ratio: float = 0.1
    """Share of documents held out for the test, in [0, 1)."""
    block_size: int = 128
    """Tokens in a training block."""
    max_tokens_per_client: int | None = None
    """Cap on each device's tokens of text."""
    max_examples_per_client: int | None = None
    """Cap on each device's examples: blocks of text, or images."""
    max_eval_blocks: int = 256
    """Most examples (blocks of text, images) of the validation and of the test split that are
    scored."""

    def __post_init__(self) -> None:
        _require(bool(self.source), "data.source", "stdlib, a path or a dataset name", self.source)
        _require_choice("data.partition", Partition, self.partition)
        _require_positive("data.alpha", self.alpha)
        _require(
            self.num_clients is None or self.num_clients > 0,
            "data.num_clients",
            "at least 1",
            self.num_clients,
        )
        for name in ("server_ratio", "validation_ratio", "test_ratio"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"data.{name}", "in [0, 1)", value)
        held_out = self.server_ratio + self.validation_ratio + self.test_ratio
        _require(
            held_out < 1, "data.server_ratio + validation_ratio + test_ratio", "below 1", held_out
        )
        _require(self.block_size >= 2, "data.block_size", "at least 2", self.block_size)
        cap = self.max_tokens_per_client
        _require(
            cap is None or cap >= self.block_size,
            "data.max_tokens_per_client",
            "at least one block",
            cap,
        )
        most = self.max_examples_per_client
        _require(most is None or most >= 1, "data.max_examples_per_client", "at least 1", most)
        _require(
            self.max_eval_blocks >= 1, "data.max_eval_blocks", "at least 1", self.max_eval_blocks
        )


@dataclass(frozen=True)
class EmulatorConfig:
    """The compact stand-in for the frozen part of the model."""

    recipe: str = "layer_drop:0.5"
    """How it is made: steps joined by "+". First which share of the frozen middle blocks is kept
    (with placement "all": of all blocks): layer_drop, influence, greedy or cka and a
    ratio in (0, 1], or full for every block; then width or heads and the share of the neurons or
    attention heads to keep; then distill:TOKENS of
    the server's own text (each of its images counts as one); then int8 or int4. For example
    greedy:0.5+distill:200000+int8."""
    lower_rungs: tuple[float, ...] = ()
    """Shares of the blocks that smaller emulators keep, falling, each below the recipe's, e.g.
    [0.5, 0.33]. With the recipe's own they form a ladder, on which federated.client_rungs places
    the devices; the blocks of a rung are among those of the one above it. The recipe's other steps
    hold for every rung; distill trains all of them on the same tokens."""
    calibration_tokens: int = 16384
    """Tokens of the server's own text, or images, that a choice of blocks, width and
    heads look at."""
    dtype: DType = "auto"
    """Type in which the emulator is stored and sent; auto takes the type of the model's own
    file."""
    distill_lm_weight: float = 1.0
    """Weight of the task's own loss (language modelling, or classes) in distillation."""
    distill_hidden_weight: float = 30.0
    """Weight of the normalised hidden-state error, at the end of the middle, in distillation."""
    distill_logit_weight: float = 10.0
    """Weight of the divergence of the two distributions of tokens, or classes, in distillation."""
    distill_block_weight: float = 0.0
    """Weight of the mean of the hidden-state errors after each kept block in distillation."""
    distill_learning_rate: float = 1e-4
    """Peak learning rate of distillation."""
    distill_batch_size: int = 8
    """Blocks of text, or images, in a distillation batch."""
    taken_from: str = ""
    """Folder of a run or calibration whose emulators are taken over instead of made anew; model,
    data, emulator, adapter, local steps and seed must be set as there."""

    def __post_init__(self) -> None:
        recipe = parse_recipe(self.recipe)
        self._check_rungs()
        _require(
            self.calibration_tokens >= 1,
            "emulator.calibration_tokens",
            "at least 1",
            self.calibration_tokens,
        )
        _require_choice("emulator.dtype", DType, self.dtype)
        weights = 0.0
        for term in ("lm", "hidden", "logit", "block"):
            name = f"distill_{term}_weight"
            _require_not_negative(f"emulator.{name}", getattr(self, name))
            weights += getattr(self, name)
        _require(
            not recipe.has("distill") or weights > 0,
            "emulator.distill_*_weight",
            "above 0 for one of them",
            weights,
        )
        _require_positive("emulator.distill_learning_rate", self.distill_learning_rate)
        _require(
            self.distill_batch_size >= 1,
            "emulator.distill_batch_size",
            "at least 1",
            self.distill_batch_size,
        )

    def _check_rungs(self) -> None:
        recipe = parse_recipe(self.recipe)
        _require(
            not self.lower_rungs or recipe.selection.name != "full",
            "emulator.lower_rungs",
            "empty for a recipe that chooses no blocks",
            self.lower_rungs,
        )
        rungs = (recipe.ratio, *self.lower_rungs)
        _require(
            all(high > low > 0 for high, low in itertools.pairwise(rungs)),
            "emulator.lower_rungs",
            f"falling, below {recipe.ratio:g} and above 0",
            self.lower_rungs,
        )

    @property
    def rungs(self) -> tuple[float, ...]:
        """Shares of the blocks that the emulators keep, falling."""
        return (parse_recipe(self.recipe).ratio, *self.lower_rungs)


@dataclass(frozen=True)
class AdapterConfig:
    """The part of the model that is tuned and travels."""

    method: PeftMethod = "lora"
    """PEFT method: lora, ia3, prompt; none (whole adapter blocks, EAT); full (every weight)."""
    placement: Placement = "ends"
    """Blocks that are tuned: ends (first num_bottom, last num_top), top (last num_top), all (every
    kept block)."""
    num_bottom: int = 2
    """Blocks tuned at the bottom, for placement "ends"."""
    num_top: int = 2
    """Blocks tuned at the top, for placements "ends" and "top"."""
    target_modules: tuple[str, ...] = ()
    """Names of the modules inside a block that LoRA or IA3 adapts; empty: every linear layer
    (LoRA), the architecture's defaults (IA3)."""
    r: int = 8
    """Rank of LoRA."""
    lora_alpha: int = 16
    """Scale of LoRA: its update is multiplied by lora_alpha / r (lora_alpha / sqrt(r) with
    rsLoRA)."""
    lora_dropout: float = 0.0
    """Dropout on the input of LoRA, in [0, 1)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (DoRA)."""
    use_rslora: bool = False
    """Rank-stabilised scaling (rsLoRA)."""
    num_virtual_tokens: int = 16
    """Length of the prompt, for method "prompt"."""

    def __post_init__(self) -> None:
        _require_choice("adapter.method", PeftMethod, self.method)
        _require_choice("adapter.placement", Placement, self.placement)
        _require_not_negative("adapter.num_bottom", self.num_bottom)
        _require_not_negative("adapter.num_top", self.num_top)
        if self.placement == "top":
            _require(
                self.num_top >= 1, "adapter.num_top", "at least 1 for placement 'top'", self.num_top
            )
        if self.placement == "ends":
            total = self.num_bottom + self.num_top
            _require(
                total >= 1, "adapter.num_bottom + num_top", "at least 1 for placement 'ends'", total
            )
        _require(self.r >= 1, "adapter.r", "at least 1", self.r)
        _require_positive("adapter.lora_alpha", self.lora_alpha)
        _require(0 <= self.lora_dropout < 1, "adapter.lora_dropout", "in [0, 1)", self.lora_dropout)
        _require(
            self.num_virtual_tokens >= 1,
            "adapter.num_virtual_tokens",
            "at least 1",
            self.num_virtual_tokens,
        )


@dataclass(frozen=True)
class LocalConfig:
    """What a participant does in a round."""

    local_steps: int = 10
    """Optimiser steps of a device in a round; exact."""
    local_batch_size: int = 8
    """Blocks of text, or images, in a batch."""
    local_learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps of linear warm-up, counted over a participant's whole run and not anew in each
    round."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 switches clipping off."""
    proximal_mu: float = 0.0
    """Weight of FedProx's term mu/2 ||w - w_round||^2; 0 switches it off."""

    def __post_init__(self) -> None:
        _require(self.local_steps >= 1, "local.local_steps", "at least 1", self.local_steps)
        _require(
            self.local_batch_size >= 1,
            "local.local_batch_size",
            "at least 1",
            self.local_batch_size,
        )
        _require_positive("local.local_learning_rate", self.local_learning_rate)
        _require_not_negative("local.warmup_steps", self.warmup_steps)
        _require_not_negative("local.weight_decay", self.weight_decay)
        _require_not_negative("local.max_grad_norm", self.max_grad_norm)
        _require_not_negative("local.proximal_mu", self.proximal_mu)


@dataclass(frozen=True)
class ServerConfig:
    """The server's own part in the tuning."""

    participates: bool = True
    """Whether the server tunes the adapter on its own data with the full model."""
    server_steps: int | None = None
    """Optimiser steps of the server in a round; as many as a device if not given."""
    weight_ratio: float | None = None
    """Share of the average that the server's update gets, in [0, 1); by its number of examples if
    not given."""
    realign_every: int = 0
    """Rounds after which the server distils every emulator anew, as emulator.distill_* say, against
    the full model with the tuned adapter plugged into both; 0 for never."""
    realign_tokens: int = 20000
    """Tokens of the server's own text, or images, for that, on each rung."""
    realign_rank: int = 8
    """Rank of the low-rank update of an emulator's middle that devices are then sent; 0 to send
    whole blocks."""

    def __post_init__(self) -> None:
        _require(
            self.server_steps is None or self.server_steps >= 1,
            "server.server_steps",
            "at least 1",
            self.server_steps,
        )
        ratio = self.weight_ratio
        _require(ratio is None or 0 <= ratio < 1, "server.weight_ratio", "in [0, 1)", ratio)
        _require_not_negative("server.realign_every", self.realign_every)
        _require(
            self.realign_tokens >= 1, "server.realign_tokens", "at least 1", self.realign_tokens
        )
        _require_not_negative("server.realign_rank", self.realign_rank)


@dataclass(frozen=True)
class FederatedConfig:
    """The rounds."""

    num_rounds: int = 10
    """Rounds of the federation."""
    fraction_train: float = 1.0
    """Share of the devices drawn in each round, in (0, 1]."""
    min_clients: int = 1
    """Fewest accepted updates, the server's included, with which a round counts."""
    dropout_ratio: float = 0.0
    """Simulated: share of drawn devices that drop out of a round, in [0, 1)."""
    round_quorum_ratio: float = 1.0
    """Share of a round's devices, in (0, 1], whose updates end the round; the others are late."""
    round_deadline_seconds: float | None = None
    """Replies later than this are not waited for; none waits for everyone."""
    max_update_norm: float | None = None
    """Updates farther than this from the round's adapter (Euclidean norm) are rejected."""
    max_examples_per_client: int = 10_000_000
    """Updates that claim more examples than this are rejected."""
    update_codec: UpdateCodecName = "float32"
    """How devices send what training changed: float32 (as it is), bf16 (half of the bytes), int8 (a
    quarter) or topk (the largest entries alone). What int8 and topk leave out is added to the
    device's next update, except with lora_aggregation svd, whose factors turn."""
    update_kept_ratio: float = 0.1
    """Share of the entries that topk sends, in (0, 1]; each takes 4 bytes."""
    max_rejections: int | None = None
    """Rejected updates after which a device is set aside for good; none for never."""
    clip_norm: float | None = None
    """Updates of devices farther than this from what they were given (Euclidean norm) are scaled
    down to it."""
    clip_to_median: bool = False
    """Scale the updates of devices down to the median of their distances in the round instead."""
    robust_rule: RobustRule = "mean"
    """How updates of devices become one: mean (by examples), or, each device alike, median and
    trimmed_mean (entry by entry) or multi_krum (the mean of those nearest to each other)."""
    assumed_attackers_ratio: float = 0.2
    """Share of a round's devices that robust_rule assumes hostile, in [0, 0.5)."""
    secure_aggregation: bool = False
    """Devices mask their updates (SecAgg+), so that the server sees the sum of them alone, and
    neither examples, tokens nor losses of any; needs cryptography and pycryptodome, which the extra
    "flower" brings."""
    secure_threshold_ratio: float = 0.6
    """Share of a device's neighbours, above 0.5, whose help opens the sum: a round survives the
    loss of the others, and holds against as many colluding devices as the share is above a half,
    twice."""
    secure_min_devices: int = 3
    """Fewest devices in a sum; a device of a fleet refuses a round with fewer than its own setting
    says."""
    secure_neighbours: int | None = None
    """Devices with which each shares masks and keys, an even number; as many as is safe (all but in
    cohorts of hundreds) if not given. Fewer than all is for a server that follows the protocol."""
    secure_clip_range: float = 1.0
    """Changes of single values of the adapter beyond this are clipped on the device."""
    secure_bits: int = 24
    """Bits to which changes are rounded, in [8, 32]: the average is off by at most
    secure_clip_range / 2^secure_bits."""
    lora_aggregation: LoraAggregation = "average"
    """How LoRA's factors A and B are averaged: average (each by itself, which is nearly right), ffa
    (B alone is tuned), rolora (B and A in turn, one a round), svd (the products BA, cut to the
    rank)."""
    client_rungs: tuple[float, ...] = ()
    """Rungs of the devices, as the shares of blocks that their emulators keep, given out over and
    over in the order of their names, each that of emulator.recipe or in emulator.lower_rungs;
    empty: the recipe's for all."""
    client_weighting: ClientWeighting = "fidelity"
    """What an example of a device counts in the average: fidelity (the squared cosine between the
    adapter's gradients on the device's rung and on the full model), examples (the same on all
    rungs)."""
    client_ranks: tuple[int, ...] = ()
    """Ranks of LoRA on the devices, given out over and over in the order of their names, each in
    [1, adapter.r], for lora_aggregation svd; empty: adapter.r for all."""
    server_optimizer: ServerOptimizer = "fedavg"
    """Rule that applies the averaged update: fedavg, fedavgm, fedadam, fedyogi."""
    server_learning_rate: float = 1.0
    """Step size of the server optimiser (try 0.01 with fedadam and fedyogi)."""
    server_momentum: float = 0.9
    """Momentum of fedavgm, beta_1 of fedadam and fedyogi."""
    server_beta2: float = 0.99
    """beta_2 of fedadam and fedyogi."""
    server_tau: float = 1e-3
    """Adaptivity tau of fedadam and fedyogi."""

    def __post_init__(self) -> None:
        _require_not_negative("federated.num_rounds", self.num_rounds)
        _require(
            0 < self.fraction_train <= 1,
            "federated.fraction_train",
            "in (0, 1]",
            self.fraction_train,
        )
        _require(self.min_clients >= 1, "federated.min_clients", "at least 1", self.min_clients)
        _require(
            0 <= self.dropout_ratio < 1, "federated.dropout_ratio", "in [0, 1)", self.dropout_ratio
        )
        _require(
            0 < self.round_quorum_ratio <= 1,
            "federated.round_quorum_ratio",
            "in (0, 1]",
            self.round_quorum_ratio,
        )
        for name in ("round_deadline_seconds", "max_update_norm", "clip_norm"):
            if getattr(self, name) is not None:
                _require_positive(f"federated.{name}", getattr(self, name))
        _require(
            self.max_examples_per_client >= 1,
            "federated.max_examples_per_client",
            "at least 1",
            self.max_examples_per_client,
        )
        _require_choice("federated.update_codec", UpdateCodecName, self.update_codec)
        ratio = self.update_kept_ratio
        _require(0 < ratio <= 1, "federated.update_kept_ratio", "in (0, 1]", ratio)
        _require_choice("federated.server_optimizer", ServerOptimizer, self.server_optimizer)
        _require_choice("federated.client_weighting", ClientWeighting, self.client_weighting)
        _require_positive("federated.server_learning_rate", self.server_learning_rate)
        _require(
            0 <= self.server_momentum < 1,
            "federated.server_momentum",
            "in [0, 1)",
            self.server_momentum,
        )
        _require(
            0 <= self.server_beta2 < 1, "federated.server_beta2", "in [0, 1)", self.server_beta2
        )
        _require_positive("federated.server_tau", self.server_tau)
        self._check_defence()
        self._check_lora()
        self._check_secure()

    def _check_secure(self) -> None:
        ratio, least = self.secure_threshold_ratio, self.secure_min_devices
        near, bits = self.secure_neighbours, self.secure_bits
        _require(0.5 < ratio <= 1, "federated.secure_threshold_ratio", "in (0.5, 1]", ratio)
        _require(least >= 2, "federated.secure_min_devices", "at least 2", least)
        _require(
            near is None or (near >= 2 and near % 2 == 0),
            "federated.secure_neighbours",
            "an even number, at least 2",
            near,
        )
        _require_positive("federated.secure_clip_range", self.secure_clip_range)
        _require(8 <= bits <= 32, "federated.secure_bits", "in [8, 32]", bits)
        if not self.secure_aggregation:
            return
        sees_each = "with federated.secure_aggregation, which shows no single update"
        for name, plain in (
            ("robust_rule", "mean"),
            ("clip_to_median", False),
            ("max_update_norm", None),
            ("update_codec", "float32"),
        ):
            got = getattr(self, name)
            _require(got == plain, f"federated.{name}", f"{plain} {sees_each}", got)
        _require(
            self.lora_aggregation != "svd",
            "federated.lora_aggregation",
            f"average, ffa or rolora {sees_each}",
            self.lora_aggregation,
        )

    def _check_defence(self) -> None:
        _require_choice("federated.robust_rule", RobustRule, self.robust_rule)
        ratio, limit = self.assumed_attackers_ratio, self.max_rejections
        _require(0 <= ratio < 0.5, "federated.assumed_attackers_ratio", "in [0, 0.5)", ratio)
        _require(limit is None or limit >= 1, "federated.max_rejections", "at least 1", limit)
        _require(
            not (self.clip_to_median and self.clip_norm is not None),
            "federated.clip_norm",
            "left out for federated.clip_to_median",
            self.clip_norm,
        )
        _require(
            self.lora_aggregation != "svd" or self.robust_rule == "mean",
            "federated.robust_rule",
            "mean for federated.lora_aggregation 'svd', whose factors do not compare",
            self.robust_rule,
        )
        _require(
            self.update_codec != "topk" or self.robust_rule in {"mean", "multi_krum"},
            "federated.robust_rule",
            "mean or multi_krum for federated.update_codec 'topk', of whose entries most are 0",
            self.robust_rule,
        )

    def _check_lora(self) -> None:
        rule = self.lora_aggregation
        _require_choice("federated.lora_aggregation", LoraAggregation, rule)
        if rule == "svd":  # its factors turn from round to round: no step or momentum adds to them
            where = " for federated.lora_aggregation 'svd'"
            optimizer, learning_rate = self.server_optimizer, self.server_learning_rate
            _require(
                optimizer == "fedavg", "federated.server_optimizer", "fedavg" + where, optimizer
            )
            _require(
                learning_rate == 1, "federated.server_learning_rate", "1" + where, learning_rate
            )
        _require(
            rule == "svd" or not self.client_ranks,
            "federated.client_ranks",
            f"empty for federated.lora_aggregation {rule!r}",
            self.client_ranks,
        )
        _require(
            all(rank >= 1 for rank in self.client_ranks),
            "federated.client_ranks",
            "at least 1 each",
            self.client_ranks,
        )


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of examples on their device, and of devices; needs fedpeat[privacy]."""

    example_noise_multiplier: float = 0.0
    """Noise on the sum of the gradients of a device's examples (blocks of text, or images), in
    units of example_clip_norm; 0 for none. In a device's own settings (fedpeat join) the least with
    which it tunes."""
    example_target_epsilon: float | None = None
    """Epsilon that a device's examples reach if it takes part in every round, instead of the
    noise, which is found for each device by its number of examples."""
    example_clip_norm: float = 1.0
    """Norm that the gradient of each example is clipped to, in place of local.max_grad_norm."""
    client_noise_multiplier: float = 0.0
    """Noise on the sum of the devices' updates, in units of federated.clip_norm, to which they are
    clipped; 0 for none. Devices then count alike, and with controller.kind fixed each is drawn by
    itself with the chance federated.fraction_train, so that rounds differ in size."""
    client_target_epsilon: float | None = None
    """Epsilon that devices reach in all rounds, instead of the noise."""
    delta: float = 1e-5
    """Chance with which the promise of epsilon may be broken; well below 1 / number of examples, or
    of devices."""
    noise: NoiseOrigin = "secret"
    """Where noise comes from: secret (noise.key in the run folder, drawn at its start; a device of
    a fleet has its own) or seed (the same noise for the same seed; for experiments alone, since who
    knows the seed can take the noise off)."""

    def __post_init__(self) -> None:
        for level in ("example", "client"):
            multiplier, target = f"{level}_noise_multiplier", f"{level}_target_epsilon"
            _require_not_negative(f"privacy.{multiplier}", getattr(self, multiplier))
            epsilon = getattr(self, target)
            if epsilon is not None:
                _require_positive(f"privacy.{target}", epsilon)
                other = f"left out for privacy.{multiplier}"
                _require(getattr(self, multiplier) == 0, f"privacy.{target}", other, epsilon)
        _require_positive("privacy.example_clip_norm", self.example_clip_norm)
        _require(0 < self.delta < 1, "privacy.delta", "in (0, 1)", self.delta)
        _require_choice("privacy.noise", NoiseOrigin, self.noise)

    @property
    def hides_examples(self) -> bool:
        return self.example_noise_multiplier > 0 or self.example_target_epsilon is not None

    @property
    def hides_clients(self) -> bool:
        return self.client_noise_multiplier > 0 or self.client_target_epsilon is not None


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured."""

    every: int = 1
    """Rounds between evaluations of the plug-in on the validation split; the last round is always
    evaluated."""
    batch_size: int = 16
    """Blocks of text, or images, scored at once."""
    full_tuned: bool = True
    """Also tune the full model itself with the same method and budget: the upper bound that
    gap_closed needs."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, "evaluation.every", "at least 1", self.every)
        _require(self.batch_size >= 1, "evaluation.batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True)
class WorldConfig:
    """The simulated cell that the devices are in: what a round costs there in time and energy."""

    preset: WorldPreset | None = None
    """Which devices there are: iot, phone, laptop, vehicular or mixed; no simulated world if not
    given."""
    radius_m: float = 500.0
    """Radius of the cell [m]."""
    down_bandwidth_hz: float = 20e6
    """Band from the base station to the devices [Hz]."""
    up_bandwidth_hz: float = 20e6
    """Band from the devices to the base station [Hz]."""
    deadline_s: float | None = None
    """Updates later than this on the simulated clock are lost [s]; none waits for everyone."""
    server_flops_per_s: float = 50e12
    """Operations that the server reaches [1/s]."""
    server_power_w: float = 400.0
    """Power that the server takes while it computes [W]."""
    workload_scale: float = 1.0
    """What the model's bytes, operations and memory are multiplied by on the way into the simulated
    world, so that a small model can stand in for a large one."""
    adapter_scale: float | None = None
    """What messages with LoRA, IA3 or a prompt are multiplied by, if not by workload_scale: these
    grow with the width of a network, its weights with the square of the width."""

    def __post_init__(self) -> None:
        if self.preset is not None:
            _require_choice("world.preset", WorldPreset, self.preset)
        for name in (
            "radius_m",
            "down_bandwidth_hz",
            "up_bandwidth_hz",
            "server_flops_per_s",
            "server_power_w",
            "workload_scale",
        ):
            _require_positive(f"world.{name}", getattr(self, name))
        for name in ("adapter_scale", "deadline_s"):
            if (value := getattr(self, name)) is not None:
                _require_positive(f"world.{name}", value)


@dataclass(frozen=True)
class ControllerConfig:
    """Who decides each round which devices take part, with which emulator and how much work."""

    kind: ControllerKind = "fixed"
    """fixed (federated.fraction_train, local.local_steps and server.server_steps, always);
    tuned_fixed (the best such plan in the simulated world); random; round_robin, channel and
    deadline (tuned plans that choose devices in turn, by channel, by speed); descent (the best
    round by itself); sabppo (the trained policy). All but fixed need world.preset."""
    policy: str = ""
    """Folder that "fedpeat learn" wrote, for every kind but fixed and random."""
    local_steps: tuple[int, ...] = (2, 4, 8, 16)
    """Numbers of local steps that controllers choose from."""
    server_steps: tuple[int, ...] = (0, 4, 8, 16)
    """Numbers of the server's own steps that they choose from."""
    realigns: bool = False
    """Whether they may have the emulators aligned anew."""
    bandwidth: Bandwidth = "optimal"
    """Shares of the band: optimal (all finish together) or branch (chosen by the controller)."""
    time_weight: float = 0.2
    """What a run's simulated time counts against its whole gain in quality, in units of as many
    rounds in which all tune on the smallest rung."""
    energy_weight: float = 0.1
    """The same for its energy."""
    bytes_weight: float = 0.1
    """The same for its bytes."""
    network: Network = "set"
    """Network of a policy: set (for any number of devices) or mlp (for the number trained with)."""
    ratio: Ratio = "branch"
    """Whose ratio PPO clips: that of each branch of an action, or the joint one."""
    total_steps: int = 1_000_000
    """Simulated rounds to train a policy on, and to tune each fixed plan on."""
    num_envs: int = 256
    """Worlds that are simulated side by side."""
    num_policies: int = 1
    """Policies to train, each from a seed of its own; the best in other worlds is kept."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("kind", ControllerKind),
            ("bandwidth", Bandwidth),
            ("network", Network),
            ("ratio", Ratio),
        ):
            _require_choice(f"controller.{name}", choices, getattr(self, name))
        for name, least in (("local_steps", 1), ("server_steps", 0)):
            steps = getattr(self, name)
            rising = all(low < high for low, high in itertools.pairwise(steps))
            fits = len(steps) > 0 and steps[0] >= least and rising
            _require(fits, f"controller.{name}", f"rising, from at least {least}", steps)
        for name in ("time_weight", "energy_weight", "bytes_weight"):
            _require_not_negative(f"controller.{name}", getattr(self, name))
        for name in ("total_steps", "num_envs", "num_policies"):
            value = getattr(self, name)
            _require(value >= 1, f"controller.{name}", "at least 1", value)


@dataclass(frozen=True)
class CalibrationConfig:
    """The real federations of "fedpeat calibrate", which show what a round does for quality."""

    num_federations: int = 32
    """Federations, each with a plan of its own for every round."""
    num_rounds: int = 8
    """Rounds of each."""
    num_members: int = 8
    """Curves that are fitted, each to other draws of the federations."""
    max_error: float = 0.15
    """Largest error on plans held out, as a share of the gain, with which controllers may be
    trained."""

    def __post_init__(self) -> None:
        for name in ("num_federations", "num_rounds", "num_members"):
            value = getattr(self, name)
            _require(value >= 1, f"calibration.{name}", "at least 1", value)
        _require_positive("calibration.max_error", self.max_error)


@dataclass(frozen=True)
class FleetConfig:
    """Devices on other machines, for ``fedpeat serve``; ``fedpeat run`` simulates them."""

    keys: str = "keys/server"
    """Folder with the server's keys, which ``fedpeat keys`` makes."""
    host: str = "127.0.0.1"
    """Address that devices reach; 0.0.0.0 for all of this machine's."""
    port: int = 8443
    """Port that devices reach."""
    wait_for: int | None = None
    """Devices that must be there before the first round; all that have a key if not given."""
    status_host: str = "127.0.0.1"
    """Address of the live page and the metrics for Prometheus. Where others than this machine can
    reach it, a token is needed: FEDPEAT_STATUS_TOKEN of the environment, or one that is made up and
    said."""
    status_port: int | None = 0
    """Port of the live page; 0 for any free one, which is said; no page if null."""
    max_emulator_bytes: int | None = None
    """On a device: largest emulator that it takes [byte]; any if not given. Offered a larger one,
    it says so and waits."""

    def __post_init__(self) -> None:
        _require(bool(self.host), "fleet.host", "an address of this machine", self.host)
        _require(1 <= self.port <= 65535, "fleet.port", "in [1, 65535]", self.port)
        status_port, most = self.status_port, self.max_emulator_bytes
        _require(
            bool(self.status_host),
            "fleet.status_host",
            "an address of this machine",
            self.status_host,
        )
        _require(
            status_port is None or 0 <= status_port <= 65535,
            "fleet.status_port",
            "in [0, 65535] or null",
            status_port,
        )
        _require(most is None or most >= 1, "fleet.max_emulator_bytes", "at least 1", most)
        _require(
            self.wait_for is None or self.wait_for >= 1,
            "fleet.wait_for",
            "at least 1",
            self.wait_for,
        )


@dataclass(frozen=True)
class Config:
    """A run of fedpeat."""

    name: str = "run"
    """Name of the run's folder."""
    output_dir: str = "runs"
    """Folder that holds the run folders."""
    method: Method = "fedpeat"
    """What to run: fedpeat, or one of its rivals at the same token budget."""
    seed: int = 0
    """Seed of everything random."""
    num_threads: int | None = None
    """CPU threads for PyTorch; its own choice if not given."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The full model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Who owns which text or images."""
    emulator: EmulatorConfig = field(default_factory=EmulatorConfig)
    """The stand-in that devices hold."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """The part that is tuned and travels."""
    local: LocalConfig = field(default_factory=LocalConfig)
    """A participant's work in a round."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """The server's own part."""
    federated: FederatedConfig = field(default_factory=FederatedConfig)
    """The rounds."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """What is hidden by noise."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """The simulated cell."""
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    """Who plans the rounds."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """How quality is foretold."""
    fleet: FleetConfig = field(default_factory=FleetConfig)
    """Devices on other machines."""

    def __post_init__(self) -> None:
        bad = set(self.name) & set("/\\\0") or self.name in {"", ".", ".."}
        _require(not bad, "name", "a plain folder name", self.name)
        _require_choice("method", Method, self.method)
        _require_not_negative("seed", self.seed)
        _require(
            self.num_threads is None or self.num_threads >= 1,
            "num_threads",
            "at least 1",
            self.num_threads,
        )
        self._check_lora()
        self._check_ladder()
        self._check_narrow()
        self._check_controller()
        self._check_secure()
        self._check_privacy()

    def _check_secure(self) -> None:
        """Check that all devices' updates can be added as they are."""
        if not self.federated.secure_aggregation:
            return
        where = "with federated.secure_aggregation"
        preset, rungs = self.world.preset, self.emulator.lower_rungs
        for level, hides in (
            ("example", self.privacy.hides_examples),
            ("client", self.privacy.hides_clients),
        ):
            noise = f"off {where}, under which nobody adds noise yet"
            _require(not hides, f"privacy.{level}_*", noise, "noise")
        _require(
            preset is None, "world.preset", f"none {where}, which hides example counts", preset
        )
        _require(
            not rungs or self.adapter.placement != "all",
            "emulator.lower_rungs",
            f"empty {where} and adapter.placement all, where rungs tune other blocks",
            rungs,
        )
        _require(
            not rungs or self.federated.client_weighting == "examples",
            "federated.client_weighting",
            f"examples {where} and emulator.lower_rungs, since devices weigh themselves",
            self.federated.client_weighting,
        )

    def _check_privacy(self) -> None:
        privacy, fed, kind = self.privacy, self.federated, self.controller.kind
        if privacy.example_target_epsilon is not None:
            where = "fixed for privacy.example_target_epsilon, which needs to know all steps"
            _require(kind == "fixed", "controller.kind", where, kind)
        if not privacy.hides_clients:
            return
        where = " for privacy.client_*"
        _require(fed.clip_norm is not None, "federated.clip_norm", "given" + where, fed.clip_norm)
        rule = f"mean{where}, since noise is for a sum"
        _require(fed.robust_rule == "mean", "federated.robust_rule", rule, fed.robust_rule)
        factors = f"average, ffa or rolora{where}, whose noise is on the factors"
        lora = fed.lora_aggregation
        _require(lora != "svd", "federated.lora_aggregation", factors, lora)
        if self.adapter.placement == "all":
            alike = f"empty{where} with adapter.placement all: devices must tune the same"
            rungs = self.emulator.lower_rungs
            _require(not rungs, "emulator.lower_rungs", alike, rungs)

    def _check_controller(self) -> None:
        kind = self.controller.kind
        where = f"given for controller.kind {kind!r}"
        _require(
            kind == "fixed" or self.world.preset is not None,
            "world.preset",
            where,
            self.world.preset,
        )
        _require(
            kind in {"fixed", "random"} or bool(self.controller.policy),
            "controller.policy",
            where,
            self.controller.policy,
        )
        if self.world.preset is not None:
            _require(
                not self.federated.client_rungs,
                "federated.client_rungs",
                "empty in a simulated world, where the controller gives out rungs",
                self.federated.client_rungs,
            )

    def _check_ladder(self) -> None:
        whole_blocks = self.adapter.method == "none" and self.adapter.placement == "all"
        _require(
            not (self.server.realign_every and whole_blocks),
            "server.realign_every",
            "0 for adapter.method 'none' with placement 'all', which leaves nothing to align",
            self.server.realign_every,
        )
        if self.server.realign_every:
            is_text = self.model.task == "causal_lm"
            size, unit = (self.data.block_size, "blocks") if is_text else (1, "images")
            batch = self.emulator.distill_batch_size * size
            _require(
                self.server.realign_tokens >= batch,
                "server.realign_tokens",
                f"at least {batch}, a batch of emulator.distill_batch_size {unit}",
                self.server.realign_tokens,
            )
            terms = ("lm", "hidden", "logit", "block")
            weights = sum(getattr(self.emulator, f"distill_{term}_weight") for term in terms)
            _require(weights > 0, "emulator.distill_*_weight", "above 0 for one of them", weights)
            recipe = parse_recipe(self.emulator.recipe)
            _require(
                self.server.realign_rank > 0 or not (recipe.has("int8") or recipe.has("int4")),
                "server.realign_rank",
                "above 0 for a recipe with int8 or int4, whose weights cannot be trained",
                self.server.realign_rank,
            )
        for rung in self.federated.client_rungs:
            allowed = ", ".join(f"{ratio:g}" for ratio in self.emulator.rungs)
            _require(
                rung in self.emulator.rungs,
                "federated.client_rungs",
                f"rungs of the ladder ({allowed})",
                rung,
            )

    def _check_narrow(self) -> None:
        """Check that the adapter can be cut like the layers that it sits on."""
        recipe = parse_recipe(self.emulator.recipe)
        step = next((s for s in recipe.steps if s.name in {"width", "heads"}), None)
        if step is None or self.adapter.placement != "all":
            return
        where = f" for adapter.placement all with {step.name} in emulator.recipe"
        method, use_dora = self.adapter.method, self.adapter.use_dora
        whole = f"lora, ia3 or prompt{where}, since whole weights would undo the step"
        _require(method not in {"none", "full"}, "adapter.method", whole, method)
        norms = f"false{where}, since a magnitude is the norm of a whole row"
        _require(not use_dora, "adapter.use_dora", norms, use_dora)
        rule = self.federated.lora_aggregation
        factors = f"average, ffa or rolora{where}, which average entry by entry"
        _require(rule != "svd", "federated.lora_aggregation", factors, rule)

    def _check_lora(self) -> None:
        rule, ranks = self.federated.lora_aggregation, self.federated.client_ranks
        if rule != "average":
            where = f" for federated.lora_aggregation {rule!r}"
            method, use_dora = self.adapter.method, self.adapter.use_dora
            _require(method == "lora", "adapter.method", "lora" + where, method)
            allowed = f"false{where}, since a DoRA weight is not linear in BA"
            _require(not use_dora, "adapter.use_dora", allowed, use_dora)
        r = self.adapter.r
        _require(
            all(rank <= r for rank in ranks),
            "federated.client_ranks",
            f"at most adapter.r = {r} each",
            ranks,
        )


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison runs."""

    methods: tuple[str, ...] = ("zero_shot", "local", "fedpeat", "fed_peft")
    """Methods and variants, each at the same token budget."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each method runs once with each."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings that a method needs otherwise (a learning rate, say), by method, nested as in a
    config file."""
    variants: Mapping[str, Any] = field(default_factory=dict)
    """Methods with settings of their own under names of their own (another emulator, say), nested
    as in a config file, with a "method" where it is not the file's."""
    share_emulators: bool = False
    """Let a run take over the emulators of the first one with its seed that makes the same ones;
    the time that it takes is then without the making."""

    def __post_init__(self) -> None:
        _require(len(self.methods) > 0, "compare.methods", "at least one method", self.methods)
        names = [*get_args(Method), *self.variants]
        for place, method in enumerate(self.methods):
            allowed = f"one of {', '.join(names)}"
            _require(method in names, f"compare.methods[{place}]", allowed, method)
        for name in self.variants:
            fits = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+:-]*", name) is not None
            allowed = "letters, digits and . _ + : -, not the name of a method"
            _require(fits and name not in get_args(Method), "compare.variants", allowed, name)
        _require(len(self.seeds) > 0, "compare.seeds", "at least one seed", self.seeds)
        for seed in self.seeds:
            _require_not_negative("compare.seeds", seed)


@dataclass(frozen=True)
class AuditPlan:
    """How an emulator is attacked, to see how much of the model it gives away."""

    public_text: str | None = None
    """Text that the attacker has: stdlib, a path or a Hub dataset as in data.source, or "server"
    for the text that the run's server has."""
    public_subset: str | None = None
    """Configuration name of a Hub dataset."""
    public_split: str = "train"
    """Split of a Hub dataset."""
    public_field: str = "text"
    """Field with the text."""
    num_tokens: int = 200_000
    """Tokens that each attack trains on."""
    batch_size: int = 8
    """Blocks in a batch of an attack."""
    learning_rates: tuple[float, ...] = (3e-4, 3e-3)
    """Peak learning rates; each attack is made with each, and the best outcome counts."""
    seed: int = 0
    """Seed of batches and of random networks."""

    def __post_init__(self) -> None:
        _require(
            bool(self.public_text),
            "--public-text",
            "the attacker's text: a file, a folder, stdlib, a Hub dataset, or server for the text "
            "that the run's server has",
            self.public_text,
        )
        _require(self.num_tokens >= 1, "--budget", "at least 1", self.num_tokens)
        _require(self.batch_size >= 1, "--batch-size", "at least 1", self.batch_size)
        _require(len(self.learning_rates) > 0, "--learning-rates", "at least one", ())
        for rate in self.learning_rates:
            _require_positive("--learning-rates", rate)
        _require_not_negative("--seed", self.seed)


@dataclass(frozen=True)
class PrivacyAuditPlan:
    """How updates are attacked, to see how much of the devices' data they give away."""

    num_devices: int = 4
    """Most devices whose updates are made and attacked."""
    num_examples: int = 256
    """Most members, and most others, that membership is told of."""
    overfit_blocks: int = 8
    """Blocks of a device that trains on few for long: there attacks must work, or they prove
    nothing."""
    overfit_steps: int = 32
    """Steps of such a device."""
    inversion_tokens: int = 32
    """Tokens of the texts that are read back."""
    num_texts: int = 4
    """Texts, each of a device of its own, that are read back from each kind of update."""
    beam_width: int = 32
    """Beams of each text."""
    example_noise: float = 1.0
    """Noise multiplier at example level, where the run has none of its own."""
    client_noise: float = 1.0
    """Noise multiplier at client level, where the run has none of its own."""
    seed: int = 0
    """Seed of batches, noise and intervals."""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_devices", 2),
            ("num_examples", 2),
            ("overfit_blocks", 1),
            ("overfit_steps", 1),
            ("inversion_tokens", 3),
            ("num_texts", 1),
            ("beam_width", 1),
        ):
            value = getattr(self, name)
            _require(value >= least, f"--{name.replace('_', '-')}", f"at least {least}", value)
        _require_positive("--example-noise", self.example_noise)
        _require_positive("--client-noise", self.client_noise)
        _require_not_negative("--seed", self.seed)
