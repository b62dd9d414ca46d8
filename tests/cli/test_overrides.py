"""Settings on the command line: understood, or refused in one line."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest

from fedpeat.cli.overrides import with_overrides
from fedpeat.config.loading import override
from fedpeat.config.schema import Config, LocalConfig
from fedpeat.core.errors import ConfigError


def changed(*args: str, base: Config | None = None) -> Config:
    return with_overrides(base or Config(), args, prog="fedpeat run config.yaml")


@pytest.mark.parametrize(
    ("args", "changes"),
    [
        ("", {}),
        ("--local.local-steps 20", {"local": {"local_steps": 20}}),
        ("--local.local-steps=20", {"local": {"local_steps": 20}}),
        ("--local.local_steps 20", {"local": {"local_steps": 20}}),
        ("--local.local-learning-rate 1e-4", {"local": {"local_learning_rate": 1e-4}}),
        ("--local.weight-decay 1", {"local": {"weight_decay": 1.0}}),
        ("--name 3 --seed 4", {"name": "3", "seed": 4}),
        ("--method fed_eat", {"method": "fed_eat"}),
        ("--data.num-clients 3", {"data": {"num_clients": 3}}),
        ("--data.num-clients None", {"data": {"num_clients": None}}),
        ("--adapter.use-dora", {"adapter": {"use_dora": True}}),
        ("--evaluation.no-full-tuned", {"evaluation": {"full_tuned": False}}),
        ("--adapter.target-modules q v", {"adapter": {"target_modules": ["q", "v"]}}),
        ("--adapter.target-modules", {"adapter": {"target_modules": []}}),
        (
            "--emulator.lower-rungs 0.3 0.1 --federated.client-rungs 0.5 0.1",
            {"emulator": {"lower_rungs": [0.3, 0.1]}, "federated": {"client_rungs": [0.5, 0.1]}},
        ),
        (
            "--federated.lora-aggregation svd --federated.client-ranks 4 2",
            {"federated": {"lora_aggregation": "svd", "client_ranks": [4, 2]}},
        ),
    ],
)
def test_option_changes_the_setting_that_it_names(args: str, changes: dict[str, Any]) -> None:
    assert changed(*args.split()) == override(Config(), changes)


def test_settings_of_the_file_stay_where_no_option_names_them() -> None:
    base = Config(name="mine", local=LocalConfig(local_steps=3, warmup_steps=5))
    got = changed("--local.local-steps", "7", base=base)
    assert got == replace(base, local=LocalConfig(local_steps=7, warmup_steps=5))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "--local.local-stepz 3",
            "unknown option --local.local-stepz; did you mean --local.local-steps?",
        ),
        (
            "--local.local-stepz=3",
            "unknown option --local.local-stepz; did you mean --local.local-steps?",
        ),
        (
            "--local-steps 3",
            "unknown option --local-steps; did you mean --local.local-steps?",
        ),
        ("--xyzzy 3", "unknown option --xyzzy; fedpeat settings lists all"),
        ("--local.local-steps abc", "--local.local-steps must be a whole number, got 'abc'"),
        ("--local.local-steps=abc", "--local.local-steps must be a whole number, got 'abc'"),
        ("--local.local_steps abc", "--local.local-steps must be a whole number, got 'abc'"),
        ("--local.local-steps 1.5", "--local.local-steps must be a whole number, got '1.5'"),
        ("--local.local-steps", "--local.local-steps must be a whole number, got nothing"),
        (
            "--local.local-steps --seed 3",
            "--local.local-steps must be a whole number, got nothing",
        ),
        ("--data.alpha half", "--data.alpha must be a number, got 'half'"),
        ("--data.num-clients x", "--data.num-clients must be a whole number, or None, got 'x'"),
        (
            "--adapter.method lorra",
            "--adapter.method must be one of lora, ia3, prompt, none, full, got 'lorra'",
        ),
        (
            "--federated.client-ranks 4 x",
            "--federated.client-ranks must be one or more whole numbers, got '4' 'x'",
        ),
        ("--local.local-steps 0", "local.local_steps must be at least 1, got 0"),
        ("--seed -1", "seed must be 0 or more, got -1"),
        ("--data.alpha -1.5", "data.alpha must be greater than 0, got -1.5"),
        ("--data.alpha nan", "data.alpha must be greater than 0, got nan"),
        ("--name a--b/c", "name must be a plain folder name, got 'a--b/c'"),
        ("--name a/b", "name must be a plain folder name, got 'a/b'"),
        (
            "--data.server-ratio 0.5 --data.test-ratio 0.4",
            "data.server_ratio + validation_ratio + test_ratio must be below 1, got 1.0",
        ),
        (
            "--evaluation.full-tuned False",
            "--evaluation.full-tuned takes no value, got 'False'; "
            "--evaluation.full-tuned is true, --evaluation.no-full-tuned is false",
        ),
        (
            "--evaluation.full-tuned=False",
            "--evaluation.full-tuned takes no value, got 'False'; "
            "--evaluation.full-tuned is true, --evaluation.no-full-tuned is false",
        ),
        ("--local.local-steps 3 4", "--local.local-steps got one value too many: '4'"),
        (
            "resume",
            "unexpected argument 'resume'; settings are given as --local.local-steps 20",
        ),
    ],
)
def test_wrong_option_is_refused_with_what_is_allowed_and_what_it_got(
    args: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(*args.split())
    assert str(caught.value) == message


@pytest.mark.parametrize("columns", ["20", "40", "300"])
@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "ascii"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "--data.num-clients many",
            "--data.num-clients must be a whole number, or None, got 'many'",
        ),
        ("--adapter.r 0", "adapter.r must be at least 1, got 0"),
        ("--adapter.rank 1", "unknown option --adapter.rank; did you mean --adapter.r?"),
    ],
)
def test_refusal_does_not_depend_on_the_terminal(
    args: str, message: str, columns: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(ConfigError) as caught:
        changed(*args.split())
    assert str(caught.value) == message
