"""Defences against poisoned updates, end to end on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpeat.config.loading import override
from fedpeat.config.schema import Config
from fedpeat.core.errors import ConfigError
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.experiments.methods import METHODS
from fedpeat.experiments.run import run
from fedpeat.federated.participant import Participant
from outcomes import assert_resumes_to, config_of, folder_of, lines_of

CLIENTS = 6  # the corpus in equal parts
DEFENCES: dict[str, dict[str, Any]] = {
    "median": {"robust_rule": "median"},
    "trimmed_mean, rolora": {"robust_rule": "trimmed_mean", "lora_aggregation": "rolora"},
    "multi_krum, ffa": {"robust_rule": "multi_krum", "lora_aggregation": "ffa"},
    "clipped, svd": {"clip_to_median": True, "lora_aggregation": "svd", "client_ranks": [2, 1]},
}


PARTS: dict[str, Any] = {"data": {"partition": "iid", "num_clients": CLIENTS, "key_field": None}}


@pytest.fixture
def config(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Config:
    return config_of(model_dir, corpus_file, tmp_path, PARTS)


@pytest.mark.parametrize("name", DEFENCES)
def test_every_defence_tunes(name: str, config: Config) -> None:
    longer = {"federated": {"num_rounds": 2, **DEFENCES[name]}, "local": {"local_steps": 4}}
    summary = run(override(config, longer))
    quality = summary["quality"]
    assert quality["plug_in"] < 0.99 * quality["full_zero_shot"]
    assert summary["set_aside"] == []
    lines = lines_of(folder_of(config))[1:]
    assert {p["status"] for line in lines for p in line["participants"]} == {"accepted"}
    assert [line["warnings"] for line in lines] == [[]] * 2
    assert "Set aside" not in (folder_of(config) / "report.html").read_text()


def test_the_settings_reach_the_round(config: Config) -> None:
    run(override(config, {"federated": {"num_rounds": 1, "clip_norm": 1e-3}}))
    line = lines_of(folder_of(config))[1]
    on_devices = [p["clip_ratio"] for p in line["participants"] if p["role"] == "device"]
    assert all(0 < ratio < 1 for ratio in on_devices)
    assert [p["clip_ratio"] for p in line["participants"] if p["role"] == "server"] == [None]

    run(
        override(config, {"name": "halved", "federated": {"num_rounds": 1, "clip_to_median": True}})
    )
    halved = lines_of(folder_of(config).parent / "halved")[1]["participants"]
    ratios = [p["clip_ratio"] for p in halved if p["role"] == "device"]
    assert sum(ratio < 1 for ratio in ratios) == CLIENTS // 2

    krum = {"robust_rule": "multi_krum", "assumed_attackers_ratio": 0.2}
    run(override(config, {"name": "krum", "federated": {"num_rounds": 1, **krum}}))
    weights = [p["weight"] for p in lines_of(folder_of(config).parent / "krum")[1]["participants"]]
    assert weights.count(0.0) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"robust_rule": "multi_krum", "fraction_train": 0.5}, "with 3: multi_krum against 1 of 3"),
        (
            {"robust_rule": "multi_krum", "assumed_attackers_ratio": 0.4},
            "with 6: multi_krum against 2 of 6 needs at least 7",
        ),
    ],
)
def test_a_rule_that_no_round_can_satisfy_is_refused_before_anything_is_made(
    changes: dict[str, Any], message: str, config: Config
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(override(config, {"federated": changes}))
    assert not (folder_of(config) / "emulator").exists()


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_in_which_no_device_has_others_beside_it_ignore_the_rule(
    method: str, config: Config
) -> None:
    defended = override(config, {"federated": {"robust_rule": "multi_krum"}})
    rule = METHODS[method].settings(defended).federated.robust_rule
    assert rule == ("mean" if method in {"local", "centralized"} else "multi_krum")


# --- devices set aside --------------------------------------------------------------------------

SET_ASIDE = {"max_rejections": 2, "num_rounds": 3, "max_update_norm": 100.0}


@pytest.fixture(scope="module")
def one_that_lies() -> Iterator[str]:
    """Let one device claim examples that it cannot have, from here on."""
    honest, name = Participant.handle, "client-03"

    def handle(self: Participant, kind: str, content: bytes) -> bytes:
        reply = decode(honest(self, kind, content))
        if kind != "train" or self.client_id != name:
            return encode(reply)
        return encode(Payload(reply.arrays, {**reply.record, "num_examples": 10**9}))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Participant, "handle", handle)
        yield name


@pytest.fixture(scope="module")
def whole(
    one_that_lies: str,
    model_dir: Path,
    corpus_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Config:
    """Return the settings of a run with such a device, which is there."""
    changes = {**PARTS, "federated": SET_ASIDE}
    config = config_of(model_dir, corpus_file, tmp_path_factory.mktemp("whole"), changes)
    run(config)
    return config


def test_a_device_set_aside_is_named_in_summary_and_report(
    whole: Config, one_that_lies: str
) -> None:
    summary = json.loads((folder_of(whole) / "summary.json").read_text())
    assert summary["set_aside"] == [one_that_lies]
    lines = lines_of(folder_of(whole))
    taking_part = [one_that_lies in {p["client_id"] for p in x["participants"]} for x in lines]
    assert taking_part == [False, True, True, False]
    warned = [w for line in lines for w in line["warnings"] if "is set aside" in w]
    assert len(warned) == 1
    page = (folder_of(whole) / "report.html").read_text()
    assert f"Set aside after too many rejected updates: {one_that_lies}." in page


def test_a_resumed_run_knows_whose_updates_were_rejected(
    whole: Config, one_that_lies: str, tmp_path: Path
) -> None:
    config = override(whole, {"output_dir": str(tmp_path)})
    assert_resumes_to(folder_of(whole), config, interrupted_after=1)
    last = lines_of(folder_of(config))[-1]
    assert last["set_aside"] == [one_that_lies]
