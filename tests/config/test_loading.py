"""Settings from YAML: what is there is understood, or one line says what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpeat.config.loading import (
    config_from_dict,
    config_to_dict,
    config_to_yaml,
    load_config,
    load_plan,
    override,
    setting_types,
)
from fedpeat.config.schema import Config, DataConfig, EmulatorConfig, LocalConfig
from fedpeat.core.errors import ConfigError

ODD = {
    "name": "résumé: #1",
    "output_dir": "~/no",
    "method": "fed_eat",
    "seed": 2**63,
    "num_threads": 3,
    "model": {
        "name": "null",
        "task": "image_classification",
        "revision": "1e5",
        "dtype": "float16",
        "device": "cuda:1",
        "trust_remote_code": True,
        "cut": "decoder",
    },
    "data": {
        "source": "data/[a-z]*.jsonl",
        "subset": "2024-11-05",
        "split": "train[:1%]",
        "validation_source": "yes",
        "test_source": "0x10",
        "text_field": "no",
        "prompt_field": "",
        "context_field": " ",
        "key_field": "~",
        "label_field": "'\"",
        "image_field": "#",
        "partition": "dirichlet",
        "alpha": 1e-05,
        "num_clients": 7,
        "server_ratio": 0.0,
        "validation_ratio": 1 / 3,
        "test_ratio": 0.05,
        "block_size": 17,
        "max_tokens_per_client": 170,
        "max_examples_per_client": 11,
        "max_eval_blocks": 9,
    },
    "emulator": {
        "recipe": "greedy:0.5+distill:10",
        "lower_rungs": [0.25],
        "calibration_tokens": 7,
        "dtype": "bfloat16",
        "distill_lm_weight": 0.0,
        "distill_hidden_weight": 1e22,
        "distill_logit_weight": 0.5,
        "distill_block_weight": 2.0,
        "distill_learning_rate": 5e-324,
        "distill_batch_size": 3,
        "taken_from": "runs/other",
    },
    "adapter": {
        "method": "ia3",
        "placement": "all",
        "num_bottom": 0,
        "num_top": 0,
        "target_modules": ["q_proj", "on"],
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.1,
        "use_dora": True,
        "use_rslora": True,
        "num_virtual_tokens": 4,
    },
    "local": {
        "local_steps": 3,
        "local_batch_size": 5,
        "local_learning_rate": 1e-4,
        "warmup_steps": 6,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "proximal_mu": 0.5,
    },
    "server": {
        "participates": False,
        "server_steps": 4,
        "weight_ratio": 0.25,
        "realign_every": 3,
        "realign_tokens": 999,
        "realign_rank": 2,
    },
    "federated": {
        "num_rounds": 0,
        "fraction_train": 0.3,
        "client_rungs": [0.5, 0.25],
        "client_weighting": "examples",
        "min_clients": 2,
        "dropout_ratio": 0.2,
        "round_quorum_ratio": 0.8,
        "round_deadline_seconds": 9.5,
        "max_update_norm": 12.0,
        "max_examples_per_client": 100,
        "max_rejections": 3,
        "clip_norm": 0.75,
        "update_codec": "int8",
        "update_kept_ratio": 0.25,
        "robust_rule": "trimmed_mean",
        "assumed_attackers_ratio": 0.25,
        "server_optimizer": "fedyogi",
        "server_learning_rate": 0.01,
        "server_momentum": 0.8,
        "server_beta2": 0.98,
        "server_tau": 1e-4,
    },
    "privacy": {
        "example_noise_multiplier": 0.7,
        "example_clip_norm": 0.3,
        "delta": 1e-6,
        "noise": "seed",
    },
    "evaluation": {"every": 2, "batch_size": 4, "full_tuned": False},
}
FOR_LORA_ALONE = {
    "federated": {"lora_aggregation": "svd", "client_ranks": [4, 2], "clip_to_median": True},
    "privacy": {"example_target_epsilon": 3.0},
}
IN_SECRET = {
    "federated": {
        "secure_aggregation": True,
        "secure_threshold_ratio": 0.75,
        "secure_min_devices": 4,
        "secure_neighbours": 8,
        "secure_clip_range": 0.5,
        "secure_bits": 20,
    }
}
FOR_A_MEAN_ALONE = {
    "federated": {"clip_norm": 0.75},
    "privacy": {"client_noise_multiplier": 1.5},
}
FOR_A_FOUND_NOISE = {"privacy": {"client_target_epsilon": 8.0}}
IN_A_WORLD = {
    "world": {
        "preset": "iot",
        "radius_m": 77.5,
        "down_bandwidth_hz": 1e6,
        "up_bandwidth_hz": 2e6,
        "deadline_s": 1.5,
        "server_flops_per_s": 1e12,
        "server_power_w": 99.0,
        "workload_scale": 1e3,
        "adapter_scale": 30.0,
    },
    "controller": {
        "kind": "sabppo",
        "policy": "yes",
        "local_steps": [3],
        "server_steps": [1, 2],
        "realigns": True,
        "bandwidth": "branch",
        "time_weight": 0.0,
        "energy_weight": 1e-5,
        "bytes_weight": 3.0,
        "network": "mlp",
        "ratio": "joint",
        "total_steps": 7,
        "num_envs": 3,
        "num_policies": 2,
    },
    "calibration": {"num_federations": 5, "num_rounds": 4, "num_members": 3, "max_error": 1e-3},
    "fleet": {
        "keys": "elsewhere",
        "host": "::1",
        "port": 443,
        "wait_for": 2,
        "status_host": "::1",
        "status_port": 9000,
        "max_emulator_bytes": 1000,
    },
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def read(file: Path, content: str | bytes) -> Config:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return load_config(file)


def refused(file: Path, content: str | bytes) -> str:
    """Return the message with which a file is refused, without the file's name in front."""
    with pytest.raises(ConfigError) as caught:
        read(file, content)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message.removeprefix(f"{file}: ")


# --- what is understood ---------------------------------------------------------------------------


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def test_the_odd_settings_name_every_setting_and_none_at_its_default() -> None:
    odd, default = (
        leaves(ODD)
        | leaves(FOR_LORA_ALONE)
        | leaves(FOR_A_FOUND_NOISE)
        | leaves(FOR_A_MEAN_ALONE)
        | leaves(IN_SECRET)
        | leaves(IN_A_WORLD),
        leaves(config_to_dict(Config())),
    )
    assert sorted(odd) == sorted(default) == sorted(setting_types())
    assert [name for name in odd if odd[name] == default[name]] == []


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        *map(config_from_dict, (ODD, FOR_LORA_ALONE, FOR_A_MEAN_ALONE, IN_SECRET, IN_A_WORLD)),
    ],
    ids=["default", "odd", "for LoRA alone", "for a mean alone", "in secret", "in a world"],
)
def test_settings_written_as_yaml_are_read_back_equal(config: Config, file: Path) -> None:
    assert read(file, config_to_yaml(config)) == config


def test_file_that_names_a_setting_leaves_the_others_at_their_defaults(file: Path) -> None:
    assert read(file, "local: {local_steps: 3}") == Config(local=LocalConfig(local_steps=3))


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "data:\nlocal:\n", "compare: {}"])
def test_empty_file_or_part_means_the_defaults(file: Path, content: str) -> None:
    assert read(file, content) == Config()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4", "'1e-4'"])
def test_small_number_is_read_however_it_is_written(file: Path, text: str) -> None:
    assert read(file, f"local: {{local_learning_rate: {text}}}").local.local_learning_rate == 1e-4


def test_whole_number_is_taken_for_a_float(file: Path) -> None:
    alpha = read(file, "data: {alpha: 1}").data.alpha
    assert (alpha, type(alpha)) == (1.0, float)


def test_list_becomes_a_tuple(file: Path) -> None:
    adapter = read(file, "adapter: {target_modules: [q_proj, v_proj]}").adapter
    assert adapter.target_modules == ("q_proj", "v_proj")


def test_null_switches_an_optional_setting_off(file: Path) -> None:
    assert read(file, "data: {num_clients: null}").data.num_clients is None


def test_file_with_a_byte_order_mark_or_windows_line_ends_is_read(file: Path) -> None:
    assert read(file, b"\xef\xbb\xbfname: x\r\nseed: 3\r\n") == Config(name="x", seed=3)


# --- what is not ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lcoal: {}", "unknown config key lcoal; did you mean local?"),
        ("metod: fedpeat", "unknown config key metod; did you mean method?"),
        (
            "local: {local_stepz: 3}",
            "unknown config key local.local_stepz; did you mean local.local_steps?",
        ),
        (
            "data: {server-ratio: 0.1}",
            "unknown config key data.server-ratio; did you mean data.server_ratio?",
        ),
        ("local_steps: 3", "unknown config key local_steps; did you mean local.local_steps?"),
        (
            "federated: {local_steps: 3}",
            "unknown config key federated.local_steps; did you mean local.local_steps?",
        ),
        (
            "server: {xyzzy: 3}",
            "unknown config key server.xyzzy; allowed: participates, server_steps, weight_ratio, "
            "realign_every, realign_tokens, realign_rank",
        ),
        ("3: 4", None),
        ("null: 4", None),
    ],
)
def test_unknown_key_is_refused_with_the_one_that_was_meant(
    file: Path, content: str, message: str | None
) -> None:
    got = refused(file, content)
    assert got == message or (message is None and got.startswith("unknown config key"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: true", "seed must be a whole number, got True"),
        ("seed: '3'", "seed must be a whole number, got '3'"),
        ("seed: 1e3", "seed must be a whole number, got '1e3'"),
        ("seed: 3.0", "seed must be a whole number, got 3.0"),
        ("seed: null", "seed must be a whole number, got None"),
        ("seed: [3]", "seed must be a whole number, got [3]"),
        ("name: 3", "name must be text, got 3"),
        ("name: on", "name must be text, got True"),
        ("name: null", "name must be text, got None"),
        ("name: 2024-11-05", "name must be text, got datetime.date(2024, 11, 5)"),
        ("data: {key_field: 3}", "data.key_field must be text, got 3"),
        ("data: {num_clients: many}", "data.num_clients must be a whole number, got 'many'"),
        ("data: {alpha: half}", "data.alpha must be a number, got 'half'"),
        ("data: {alpha: true}", "data.alpha must be a number, got True"),
        ("data: {alpha: 50%}", "data.alpha must be a number, got '50%'"),
        ("data: {alpha: '0,5'}", "data.alpha must be a number, got '0,5'"),
        ("server: {participates: 1}", "server.participates must be true or false, got 1"),
        ("server: {participates: 'no'}", "server.participates must be true or false, got 'no'"),
        ("adapter: {target_modules: q}", "adapter.target_modules must be a list, got 'q'"),
        (
            "adapter: {target_modules: {q: 1}}",
            "adapter.target_modules must be a list, got {'q': 1}",
        ),
        ("adapter: {target_modules: [q, 1]}", "adapter.target_modules[1] must be text, got 1"),
        (
            "adapter: {method: lorra}",
            "adapter.method must be one of lora, ia3, prompt, none, full, got 'lorra'; "
            "did you mean lora?",
        ),
        (
            "adapter: {placement: [top]}",
            "adapter.placement must be one of ends, top, all, got ['top']; did you mean top?",
        ),
        ("local: 3", "local must be a mapping, got 3"),
        ("local: [local_steps]", "local must be a mapping, got ['local_steps']"),
        ("local: {local_steps: 0}", "local.local_steps must be at least 1, got 0"),
    ],
)
def test_value_of_the_wrong_type_is_refused_with_what_is_allowed_and_what_it_got(
    file: Path, content: str, message: str
) -> None:
    assert refused(file, content) == message


def test_number_too_large_for_a_float_is_refused(file: Path) -> None:
    message = refused(file, f"data: {{alpha: 1{'0' * 400}}}")
    assert message.startswith("data.alpha must be a number, got 1000")


@pytest.mark.parametrize(
    "content",
    [
        "name: 'x",
        "\tname: x",
        "name: x\x00",
        "a: *b",
        "name: x: y",
        "{",
        "? [1]\n: 2",
        "? {a: 1}\n: 2",
        "!!python/object/apply:os.system ['true']",
        "name: 2024-13-45",
        "[" * 400,
        "seed: " + "9" * 5000,
    ],
)
def test_file_that_is_not_yaml_is_refused(file: Path, content: str) -> None:
    assert "is not valid YAML: " in refused(file, content)


@pytest.mark.parametrize(
    ("content", "key", "line"),
    [
        ("seed: 1\nname: x\nseed: 2\n", "seed", 3),
        ("local: {local_steps: 3}\nlocal: {local_batch_size: 2}\n", "local", 2),
        ("local:\n  local_steps: 3\n  local_steps: 4\n", "local_steps", 3),
    ],
)
def test_key_given_twice_is_refused_and_not_silently_dropped(
    file: Path, content: str, key: str, line: int
) -> None:
    message = refused(file, content)
    assert f"key '{key}' is given twice" in message
    assert f"line {line}" in message


@pytest.mark.parametrize("content", ["- seed", "hello", "3", "true"])
def test_file_that_names_nothing_is_refused(file: Path, content: str) -> None:
    assert "must hold settings by name, got" in refused(file, content)


@pytest.mark.parametrize("content", ["name: x".encode("utf-16"), b"name: caf\xe9", b"\x80\x81"])
def test_file_in_another_encoding_is_refused(file: Path, content: bytes) -> None:
    assert "must be UTF-8 text" in refused(file, content)


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^no such config file: {tmp_path}/none.yaml$"):
        load_config(tmp_path / "none.yaml")


def test_folder_is_no_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^cannot read config file {tmp_path}: Is a directory$"):
        load_config(tmp_path)


@pytest.mark.parametrize("data", [[], "x", None, 3])
def test_settings_that_are_no_mapping_are_refused(data: object) -> None:
    with pytest.raises(ConfigError, match="the config must be a mapping, got"):
        config_from_dict(data)


# --- changes and comparisons ----------------------------------------------------------------------


def test_override_changes_what_it_names_and_nothing_else() -> None:
    base = Config(name="x", data=DataConfig(alpha=0.25), emulator=EmulatorConfig(recipe="cka:0.75"))
    changed = override(base, {"data": {"num_clients": 3}, "seed": 9})
    assert changed == Config(
        name="x", seed=9, data=DataConfig(alpha=0.25, num_clients=3), emulator=base.emulator
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": {"steps": 3}}, "unknown config key local.steps"),
        ({"local": 3}, "local must be a mapping, got 3"),
        ({"local": {"local_steps": "3"}}, "local.local_steps must be a whole number, got '3'"),
    ],
)
def test_override_is_as_strict_as_a_file(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        override(Config(), changes)


PLAN = """
compare:
  methods: [fedpeat, fed_peft]
  seeds: [3, 4]
  overrides:
    fed_peft: {local: {local_learning_rate: 1e-4}}
"""


def test_plan_is_read_from_the_compare_part(file: Path) -> None:
    file.write_text(PLAN)
    plan = load_plan(file)
    assert (plan.methods, plan.seeds) == (("fedpeat", "fed_peft"), (3, 4))
    changed = override(Config(), plan.overrides["fed_peft"])
    assert changed == Config(local=LocalConfig(local_learning_rate=1e-4))


def test_methods_and_seeds_of_the_caller_go_before_those_of_the_file(file: Path) -> None:
    file.write_text(PLAN)
    plan = load_plan(file, methods=["zero_shot"], seeds=[7])
    assert (plan.methods, plan.seeds) == (("zero_shot",), (7,))


@pytest.mark.parametrize("content", ["", "compare:\n", "compare: {}\n", "seed: 1\n"])
def test_file_without_a_compare_part_means_the_usual_comparison(file: Path, content: str) -> None:
    file.write_text(content)
    plan = load_plan(file)
    assert plan.methods == ("zero_shot", "local", "fedpeat", "fed_peft")
    assert plan.seeds == (0, 1, 2)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("3", "compare must be a mapping, got 3"),
        ("[fedpeat]", "compare must be a mapping, got ['fedpeat']"),
        ("false", "compare must be a mapping, got False"),
        ("{method: [fedpeat]}", "unknown config key compare.method; did you mean compare.methods?"),
        ("{methods: fedpeat}", "compare.methods must be a list, got 'fedpeat'"),
        ("{methods: []}", "compare.methods must be at least one method, got ()"),
        ("{methods: [fedpaet]}", "compare.methods[0] must be one of fedpeat, fed_eat, fed_peft, "
         "fed_ft, centralized, local, zero_shot, got 'fedpaet'; did you mean fedpeat?"),
        ("{seeds: 3}", "compare.seeds must be a list, got 3"),
        ("{seeds: []}", "compare.seeds must be at least one seed, got ()"),
        ("{seeds: [0, x]}", "compare.seeds[1] must be a whole number, got 'x'"),
        ("{seeds: [true]}", "compare.seeds[0] must be a whole number, got True"),
        ("{seeds: [-1]}", "compare.seeds must be 0 or more, got -1"),
        ("{overrides: [fedpeat]}", "compare.overrides must be a mapping, got ['fedpeat']"),
        ("{overrides: 0}", "compare.overrides must be a mapping, got 0"),
        ("{overrides: {fedpaet: {}}}",
         "unknown config key compare.overrides.fedpaet; did you mean compare.overrides.fedpeat?"),
        ("{overrides: {fedpeat: null}}",
         "compare.overrides.fedpeat: an override must be a mapping, got None"),
        ("{overrides: {fedpeat: {local: {local_stepz: 1}}}}", "compare.overrides.fedpeat: unknown "
         "config key local.local_stepz; did you mean local.local_steps?"),
        ("{overrides: {fedpeat: {local: {local_steps: 0}}}}",
         "compare.overrides.fedpeat: local.local_steps must be at least 1, got 0"),
        ("{methods: [slimm], variants: {slim: {}}}", "compare.methods[0] must be one of fedpeat, "
         "fed_eat, fed_peft, fed_ft, centralized, local, zero_shot, slim, got 'slimm'; did you "
         "mean slim?"),
        ("{variants: [small]}", "compare.variants must be a mapping, got ['small']"),
        ("{variants: {fedpeat: {}}}", "compare.variants must be letters, digits and . _ + : -, not "
         "the name of a method, got 'fedpeat'"),
        ("{variants: {a/b: {}}}", "compare.variants must be letters, digits and . _ + : -, not "
         "the name of a method, got 'a/b'"),
        ("{variants: {small: {emulator: {recipe: cka:2}}}}", "compare.variants.small: "
         "emulator.recipe 'cka:2', character 5: cka needs a ratio in (0, 1], got '2'"),
    ],
)  # fmt: skip
def test_comparison_that_cannot_run_to_its_end_is_refused_at_its_start(
    file: Path, part: str, message: str
) -> None:
    file.write_text(f"compare: {part}\n")
    with pytest.raises(ConfigError) as caught:
        load_plan(file)
    assert str(caught.value) == f"{file}: {message}"


def test_override_is_checked_against_the_settings_of_the_file(file: Path) -> None:
    part = {"overrides": {"local": {"data": {"max_tokens_per_client": 200}}}}
    file.write_text(yaml.safe_dump({"data": {"block_size": 256}, "compare": part}))
    with pytest.raises(ConfigError, match="at least one block, got 200"):
        load_plan(file)


def test_a_variant_is_a_method_under_a_name_of_its_own(file: Path) -> None:
    variants = {"small": {"emulator": {"recipe": "cka:0.25"}}}
    part = {"methods": ["fedpeat", "small"], "variants": variants}
    file.write_text(yaml.safe_dump({"compare": part}))
    assert load_plan(file).variants == variants
    assert load_plan(file, methods=["small"]).methods == ("small",)
