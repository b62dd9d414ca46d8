"""Every setting: checked where it is made, explained, frozen."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from fedpeat.config import schema
from fedpeat.config.loading import config_from_dict, override, setting_types
from fedpeat.config.schema import AuditPlan, ComparisonPlan, Config
from fedpeat.core.errors import ConfigError

DATACLASSES: list[type[Any]] = [
    v for v in vars(schema).values() if isinstance(v, type) and dataclasses.is_dataclass(v)
]

# Of each number: the nearest values that are refused, and the outermost that are allowed.
RANGES: dict[str, tuple[list[float], list[float | None]]] = {
    "seed": ([-1], [0]),
    "num_threads": ([0, -1], [1, None]),
    "data.alpha": ([0.0, -1.0], [1e-6, 1e6]),
    "data.num_clients": ([0, -3], [1, None]),
    "data.server_ratio": ([-0.1, 1.0], [0.0, 0.7]),
    "data.validation_ratio": ([-0.1, 1.0], [0.0, 0.7]),
    "data.test_ratio": ([-0.1, 1.0], [0.0, 0.7]),
    "data.block_size": ([1, 0], [2]),
    "data.max_tokens_per_client": ([0, 127], [128, None]),
    "data.max_examples_per_client": ([0, -1], [1, None]),
    "data.max_eval_blocks": ([0], [1]),
    "emulator.calibration_tokens": ([0, -1], [1]),
    "emulator.distill_lm_weight": ([-0.1], [0.0]),
    "emulator.distill_hidden_weight": ([-0.1], [0.0]),
    "emulator.distill_logit_weight": ([-0.1], [0.0]),
    "emulator.distill_block_weight": ([-0.1], [0.0]),
    "emulator.distill_learning_rate": ([0.0, -1.0], [1e-9]),
    "emulator.distill_batch_size": ([0], [1]),
    "adapter.num_bottom": ([-1], [0]),
    "adapter.num_top": ([-1], [0]),
    "adapter.r": ([0], [1]),
    "adapter.lora_alpha": ([0, -1], [1]),
    "adapter.lora_dropout": ([-0.1, 1.0], [0.0, 0.99]),
    "adapter.num_virtual_tokens": ([0], [1]),
    "local.local_steps": ([0, -1], [1]),
    "local.local_batch_size": ([0], [1]),
    "local.local_learning_rate": ([0.0, -1e-3], [1e-12]),
    "local.warmup_steps": ([-1], [0]),
    "local.weight_decay": ([-0.1], [0.0]),
    "local.max_grad_norm": ([-1.0], [0.0]),
    "local.proximal_mu": ([-0.1], [0.0]),
    "server.realign_every": ([-1], [0]),
    "server.realign_tokens": ([0], [1]),
    "server.realign_rank": ([-1], [0]),
    "server.server_steps": ([0], [1, None]),
    "server.weight_ratio": ([-0.1, 1.0], [0.0, 0.99, None]),
    "federated.num_rounds": ([-1], [0]),
    "federated.fraction_train": ([0.0, 1.01], [0.01, 1.0]),
    "federated.min_clients": ([0], [1]),
    "federated.dropout_ratio": ([-0.1, 1.0], [0.0, 0.99]),
    "federated.round_quorum_ratio": ([0.0, 1.01], [0.01, 1.0]),
    "federated.round_deadline_seconds": ([0.0, -1.0], [0.1, None]),
    "federated.max_update_norm": ([0.0, -1.0], [0.1, None]),
    "federated.max_rejections": ([0, -1], [1, None]),
    "federated.secure_threshold_ratio": ([0.5, 1.01], [0.51, 1.0]),
    "federated.secure_min_devices": ([1], [2]),
    "federated.secure_neighbours": ([0, 1, 3], [2, 4, None]),
    "federated.secure_clip_range": ([0.0, -1.0], [0.1]),
    "federated.secure_bits": ([7, 33], [8, 32]),
    "federated.clip_norm": ([0.0, -1.0], [0.1, None]),
    "federated.update_kept_ratio": ([0.0, 1.01], [1e-9, 1.0]),
    "federated.assumed_attackers_ratio": ([-0.1, 0.5], [0.0, 0.49]),
    "federated.max_examples_per_client": ([0], [1]),
    "federated.server_learning_rate": ([0.0, -1.0], [1e-6]),
    "federated.server_momentum": ([-0.1, 1.0], [0.0, 0.99]),
    "federated.server_beta2": ([-0.1, 1.0], [0.0, 0.999]),
    "federated.server_tau": ([0.0, -1.0], [1e-9]),
    "privacy.example_noise_multiplier": ([-0.1], [0.0, 1e-9]),
    "privacy.example_target_epsilon": ([0.0, -1.0], [1e-9, None]),
    "privacy.example_clip_norm": ([0.0, -1.0], [1e-9]),
    "privacy.client_noise_multiplier": ([-0.1], [0.0]),
    "privacy.client_target_epsilon": ([0.0, -1.0], [None]),
    "privacy.delta": ([0.0, 1.0], [1e-300, 0.999]),
    "evaluation.every": ([0], [1]),
    "evaluation.batch_size": ([0], [1]),
    "world.radius_m": ([0.0, -1.0], [1e-3]),
    "world.down_bandwidth_hz": ([0.0, -1.0], [1e-3]),
    "world.up_bandwidth_hz": ([0.0, -1.0], [1e-3]),
    "world.deadline_s": ([0.0, -1.0], [0.1, None]),
    "world.server_flops_per_s": ([0.0, -1.0], [1e-3]),
    "world.server_power_w": ([0.0, -1.0], [1e-3]),
    "world.workload_scale": ([0.0, -1.0], [1e-9]),
    "world.adapter_scale": ([0.0, -1.0], [1e-9, None]),
    "controller.time_weight": ([-0.1], [0.0]),
    "controller.energy_weight": ([-0.1], [0.0]),
    "controller.bytes_weight": ([-0.1], [0.0]),
    "controller.total_steps": ([0], [1]),
    "controller.num_envs": ([0], [1]),
    "controller.num_policies": ([0], [1]),
    "calibration.num_federations": ([0], [1]),
    "calibration.num_rounds": ([0], [1]),
    "calibration.num_members": ([0], [1]),
    "calibration.max_error": ([0.0, -1.0], [1e-9]),
    "fleet.port": ([0, 65536], [1, 65535]),
    "fleet.wait_for": ([0], [1, None]),
    "fleet.status_port": ([-1, 65536], [0, 65535, None]),
    "fleet.max_emulator_bytes": ([0], [1, None]),
}
REFUSED = [(name, value) for name, (refused, _) in RANGES.items() for value in refused]
ALLOWED = [(name, value) for name, (_, allowed) in RANGES.items() for value in allowed]


def kinds_of(hint: Any) -> set[Any]:
    return set(get_args(hint)) or {hint}


NUMBERS = [
    name
    for name, hint in setting_types().items()
    if kinds_of(hint) & {int, float} and get_origin(hint) is not tuple
]
FLOATS = [n for n, hint in setting_types().items() if float in kinds_of(hint)]
CHOICES = [n for n, hint in setting_types().items() if get_origin(hint) is Literal]


def settings(name: str, value: object) -> dict[str, Any]:
    part, _, field = name.rpartition(".")
    return {part: {field: value}} if part else {field: value}


def value_of(config: Config, name: str) -> Any:
    for field in name.split("."):
        config = getattr(config, field)
    return config


def test_the_table_of_ranges_covers_every_number() -> None:
    assert sorted(RANGES) == sorted(NUMBERS)


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_number_out_of_range_is_refused_with_what_is_allowed_and_what_it_got(
    name: str, value: float
) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(settings(name, value))
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert message.endswith(f", got {value!r}")


@pytest.mark.parametrize(("name", "value"), ALLOWED)
def test_number_at_the_edge_of_its_range_is_allowed(name: str, value: float | None) -> None:
    assert value_of(config_from_dict(settings(name, value)), name) == value


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}.* must be"):
        config_from_dict(settings(name, value))


@pytest.mark.parametrize("name", CHOICES)
def test_choice_that_is_not_offered_is_refused_with_those_that_are(name: str) -> None:
    offered = ", ".join(get_args(setting_types()[name]))
    with pytest.raises(ConfigError, match=f"{name} must be one of {offered}, got 'xyzzy'$"):
        config_from_dict(settings(name, "xyzzy"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name must be a plain folder name, got ''"),
        ({"name": ".."}, "name must be a plain folder name, got '..'"),
        ({"name": "a/b"}, "name must be a plain folder name, got 'a/b'"),
        ({"name": "a\x00b"}, r"name must be a plain folder name, got 'a\x00b'"),
        ({"model": {"name": ""}}, "model.name must be a Hub name, a folder or 'bundled', got ''"),
        ({"data": {"source": ""}}, "data.source must be stdlib, a path or a dataset name, got ''"),
        (
            {"data": {"server_ratio": 0.4, "validation_ratio": 0.3, "test_ratio": 0.3}},
            "data.server_ratio + validation_ratio + test_ratio must be below 1, got 1.0",
        ),
        (
            {"data": {"block_size": 64, "max_tokens_per_client": 63}},
            "data.max_tokens_per_client must be at least one block, got 63",
        ),
        (
            {
                "emulator": {
                    "recipe": "distill:9",
                    "distill_lm_weight": 0,
                    "distill_hidden_weight": 0,
                    "distill_logit_weight": 0,
                }
            },
            "emulator.distill_*_weight must be above 0 for one of them, got 0.0",
        ),
        (
            {"adapter": {"num_bottom": 0, "num_top": 0}},
            "adapter.num_bottom + num_top must be at least 1 for placement 'ends', got 0",
        ),
        (
            {"adapter": {"placement": "top", "num_top": 0}},
            "adapter.num_top must be at least 1 for placement 'top', got 0",
        ),
        *[
            (
                {"adapter": {"method": method}, "federated": {"lora_aggregation": rule}},
                f"adapter.method must be lora for federated.lora_aggregation '{rule}', "
                f"got '{method}'",
            )
            for method in ("ia3", "prompt", "none", "full")
            for rule in ("ffa", "rolora", "svd")
        ],
        *[
            (
                {"adapter": {"use_dora": True}, "federated": {"lora_aggregation": rule}},
                f"adapter.use_dora must be false for federated.lora_aggregation '{rule}', "
                "since a DoRA weight is not linear in BA, got True",
            )
            for rule in ("ffa", "rolora", "svd")
        ],
        (
            {"federated": {"client_weighting": "size"}},
            "federated.client_weighting must be one of fidelity, examples, got 'size'",
        ),
        (
            {"federated": {"lora_aggregation": "svd", "server_optimizer": "fedadam"}},
            "federated.server_optimizer must be fedavg for federated.lora_aggregation 'svd', "
            "got 'fedadam'",
        ),
        (
            {"federated": {"lora_aggregation": "svd", "server_learning_rate": 0.5}},
            "federated.server_learning_rate must be 1 for federated.lora_aggregation 'svd', "
            "got 0.5",
        ),
        (
            {"federated": {"lora_aggregation": "svd", "robust_rule": "median"}},
            "federated.robust_rule must be mean for federated.lora_aggregation 'svd', whose "
            "factors do not compare, got 'median'",
        ),
        *(
            (
                {"federated": {"secure_aggregation": True, name: value}},
                f"federated.{name} must be {allowed} with federated.secure_aggregation, which "
                f"shows no single update, got {value!r}",
            )
            for name, value, allowed in (
                ("robust_rule", "median", "mean"),
                ("clip_to_median", True, "False"),
                ("max_update_norm", 1.0, "None"),
                ("update_codec", "int8", "float32"),
                ("lora_aggregation", "svd", "average, ffa or rolora"),
            )
        ),
        *(
            (
                {"federated": {"secure_aggregation": True, "clip_norm": 1.0}, "privacy": privacy},
                f"privacy.{level}_* must be off with federated.secure_aggregation, under which "
                "nobody adds noise yet, got 'noise'",
            )
            for level, privacy in (
                ("example", {"example_noise_multiplier": 1.0}),
                ("client", {"client_noise_multiplier": 1.0}),
            )
        ),
        (
            {"federated": {"secure_aggregation": True}, "world": {"preset": "iot"}},
            "world.preset must be none with federated.secure_aggregation, which hides example "
            "counts, got 'iot'",
        ),
        (
            {
                "federated": {"secure_aggregation": True},
                "emulator": {"lower_rungs": [0.25]},
                "adapter": {"placement": "all"},
            },
            "emulator.lower_rungs must be empty with federated.secure_aggregation and "
            "adapter.placement all, where rungs tune other blocks, got (0.25,)",
        ),
        (
            {"federated": {"secure_aggregation": True}, "emulator": {"lower_rungs": [0.25]}},
            "federated.client_weighting must be examples with federated.secure_aggregation and "
            "emulator.lower_rungs, since devices weigh themselves, got 'fidelity'",
        ),
        (
            {"federated": {"clip_norm": 1.0, "clip_to_median": True}},
            "federated.clip_norm must be left out for federated.clip_to_median, got 1.0",
        ),
        (
            {"emulator": {"recipe": "layer_drop:0.5", "lower_rungs": [0.5]}},
            "emulator.lower_rungs must be falling, below 0.5 and above 0, got (0.5,)",
        ),
        (
            {"emulator": {"lower_rungs": [0.2, 0.3]}},
            "emulator.lower_rungs must be falling, below 0.5 and above 0, got (0.2, 0.3)",
        ),
        (
            {"emulator": {"lower_rungs": [0.0]}},
            "emulator.lower_rungs must be falling, below 0.5 and above 0, got (0.0,)",
        ),
        (
            {"emulator": {"recipe": "full", "lower_rungs": [0.5]}},
            "emulator.lower_rungs must be empty for a recipe that chooses no blocks, got (0.5,)",
        ),
        (
            {"emulator": {"lower_rungs": [0.25]}, "federated": {"client_rungs": [0.5, 0.3]}},
            "federated.client_rungs must be rungs of the ladder (0.5, 0.25), got 0.3",
        ),
        (
            {"adapter": {"method": "none", "placement": "all"}, "server": {"realign_every": 2}},
            "server.realign_every must be 0 for adapter.method 'none' with placement 'all', which "
            "leaves nothing to align, got 2",
        ),
        (
            {
                "adapter": {"method": "none", "placement": "all"},
                "emulator": {"recipe": "width:0.5"},
            },
            "adapter.method must be lora, ia3 or prompt for adapter.placement all with width in "
            "emulator.recipe, since whole weights would undo the step, got 'none'",
        ),
        (
            {
                "adapter": {"use_dora": True, "placement": "all"},
                "emulator": {"recipe": "heads:0.5"},
            },
            "adapter.use_dora must be false for adapter.placement all with heads in "
            "emulator.recipe, since a magnitude is the norm of a whole row, got True",
        ),
        (
            {
                "adapter": {"placement": "all"},
                "emulator": {"recipe": "width:0.5"},
                "federated": {"lora_aggregation": "svd"},
            },
            "federated.lora_aggregation must be average, ffa or rolora for adapter.placement all "
            "with width in emulator.recipe, which average entry by entry, got 'svd'",
        ),
        (
            {"server": {"realign_every": 1, "realign_tokens": 1000}},
            "server.realign_tokens must be at least 1024, a batch of emulator.distill_batch_size "
            "blocks, got 1000",
        ),
        (
            {
                "server": {"realign_every": 1},
                "emulator": {
                    "distill_lm_weight": 0.0,
                    "distill_hidden_weight": 0.0,
                    "distill_logit_weight": 0.0,
                },
            },
            "emulator.distill_*_weight must be above 0 for one of them, got 0.0",
        ),
        (
            {
                "server": {"realign_every": 1, "realign_rank": 0},
                "emulator": {"recipe": "layer_drop:0.5+int8"},
            },
            "server.realign_rank must be above 0 for a recipe with int8 or int4, whose weights "
            "cannot be trained, got 0",
        ),
        (
            {"privacy": {"client_noise_multiplier": 1.0}},
            "federated.clip_norm must be given for privacy.client_*, got None",
        ),
        *[
            (
                {"privacy": privacy, "federated": {"clip_norm": 1.0, "robust_rule": "median"}},
                "federated.robust_rule must be mean for privacy.client_*, since noise is for a "
                "sum, got 'median'",
            )
            for privacy in ({"client_noise_multiplier": 1.0}, {"client_target_epsilon": 8.0})
        ],
        (
            {
                "privacy": {"client_noise_multiplier": 1.0},
                "federated": {"clip_norm": 1.0, "lora_aggregation": "svd"},
            },
            "federated.lora_aggregation must be average, ffa or rolora for privacy.client_*, whose "
            "noise is on the factors, got 'svd'",
        ),
        (
            {
                "privacy": {"client_noise_multiplier": 1.0},
                "federated": {"clip_norm": 1.0},
                "adapter": {"placement": "all"},
                "emulator": {"lower_rungs": [0.25]},
            },
            "emulator.lower_rungs must be empty for privacy.client_* with adapter.placement all: "
            "devices must tune the same, got (0.25,)",
        ),
        (
            {"privacy": {"example_noise_multiplier": 1.0, "example_target_epsilon": 3.0}},
            "privacy.example_target_epsilon must be left out for "
            "privacy.example_noise_multiplier, got 3.0",
        ),
        (
            {
                "privacy": {"example_target_epsilon": 3.0},
                "controller": {"kind": "random"},
                "world": {"preset": "iot"},
            },
            "controller.kind must be fixed for privacy.example_target_epsilon, which needs to know "
            "all steps, got 'random'",
        ),
        (
            {"federated": {"lora_aggregation": "rolora", "client_ranks": [4]}},
            "federated.client_ranks must be empty for federated.lora_aggregation 'rolora', "
            "got (4,)",
        ),
        (
            {"federated": {"lora_aggregation": "svd", "client_ranks": [4, 0]}},
            "federated.client_ranks must be at least 1 each, got (4, 0)",
        ),
        (
            {"adapter": {"r": 4}, "federated": {"lora_aggregation": "svd", "client_ranks": [4, 5]}},
            "federated.client_ranks must be at most adapter.r = 4 each, got (4, 5)",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(changes)
    assert str(caught.value) == message


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_factors_that_are_tuned_by_themselves_go_with_any_server_optimizer(rule: str) -> None:
    changes = {"federated": {"lora_aggregation": rule, "server_optimizer": "fedadam"}}
    assert override(Config(), changes).federated.lora_aggregation == rule


def test_ranks_up_to_the_adapters_are_allowed() -> None:
    changes = {"federated": {"lora_aggregation": "svd", "client_ranks": [1, 8]}}
    assert override(Config(), changes).federated.client_ranks == (1, 8)


def test_adapter_on_all_blocks_needs_no_ends() -> None:
    changes = {"adapter": {"placement": "all", "num_bottom": 0, "num_top": 0}}
    assert override(Config(), changes).adapter.num_top == 0


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"methods": ()}, "compare.methods must be at least one method, got ()"),
        ({"seeds": ()}, "compare.seeds must be at least one seed, got ()"),
        ({"seeds": (0, -1)}, "compare.seeds must be 0 or more, got -1"),
    ],
)
def test_comparison_of_nothing_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ComparisonPlan(**plan)
    assert str(caught.value) == message


@pytest.mark.parametrize("kind", DATACLASSES, ids=[kind.__name__ for kind in DATACLASSES])
def test_settings_are_frozen(kind: Any) -> None:
    settings = kind(public_text="stdlib") if kind is AuditPlan else kind()
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, field.name, getattr(settings, field.name))


def test_every_setting_is_followed_by_a_line_of_help() -> None:
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert {c.name for c in classes} == {kind.__name__ for kind in DATACLASSES}
    for node in classes:
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert is_text, f"{node.name}.{ast.unparse(field.target)} has no line of help"
