"""Emulators that are aligned anew between the rounds, end to end on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeat.config.loading import override
from fedpeat.config.schema import Config
from fedpeat.control.fixed import is_due
from fedpeat.core.errors import DataError
from fedpeat.core.run_folder import RunFolder
from fedpeat.experiments.bench import Bench, make_federation, set_up
from fedpeat.experiments.observer import Silent
from fedpeat.experiments.realign import realigned
from fedpeat.experiments.run import run
from fedpeat.experiments.steering import make_controller
from fedpeat.tuning.loss import batch_of
from outcomes import assert_resumes_to, config_of, folder_of, lines_of

SETTINGS: dict[str, Any] = {
    "emulator": {
        "recipe": "layer_drop:0.75", "lower_rungs": [0.5], "distill_batch_size": 4,
        "distill_learning_rate": 1e-3,
    },
    "server": {"realign_every": 2, "realign_tokens": 512, "realign_rank": 2},
    "federated": {"client_rungs": [0.75, 0.5]},
}  # fmt: skip
PLACES: dict[str, dict[str, Any]] = {
    "ends": {},
    "all": {"adapter": {"placement": "all"}},
    "whole blocks": {"method": "fed_eat"},
    "few bits": {"emulator": {"recipe": "layer_drop:0.75+width:0.5+int8"}},
    "prompt": {"adapter": {"method": "prompt", "num_virtual_tokens": 4}},
}


@pytest.fixture
def config(model_dir: Path, corpus_file: Path, tmp_path: Path) -> Config:
    return config_of(model_dir, corpus_file, tmp_path, SETTINGS)


def bench_of(config: Config, folder: Path) -> Bench:
    return set_up(config, RunFolder(folder), Silent(), None, pools_data=False)


def noisy(bench: Bench) -> dict[str, np.ndarray]:
    """Return an adapter that does something, so that to plug it in makes a difference."""
    rng = np.random.default_rng(0)
    return {
        n: (a + rng.normal(0, 0.05, a.shape)).astype(a.dtype)
        for n, a in bench.server.state().items()
    }


@pytest.mark.parametrize(
    ("every", "due"), [(0, []), (1, [2, 3, 4, 5, 6]), (2, [3, 5]), (3, [4]), (9, [])]
)
def test_alignment_comes_after_every_so_many_rounds(every: int, due: list[int]) -> None:
    assert [n for n in range(1, 7) if is_due(every, n)] == due


@pytest.mark.parametrize("rank", [2, 0])
def test_a_refresh_has_new_middle_blocks_and_nothing_else(
    rank: int, config: Config, tmp_path: Path
) -> None:
    bench = bench_of(override(config, {"server": {"realign_rank": rank}}), tmp_path / "run")
    new = realigned(bench, noisy(bench), 3)
    for name, package in new.items():
        old = bench.packages[name].parts
        changed = [part.name for part in package.manifest.parts if part.sha256 not in old]
        middle = [f"block {i}" for i in package.manifest.source_blocks if i not in (0, 5)]
        assert changed == (["update"] if rank else middle)
        package.verify()
    if rank == 0:
        large, small = new.values()
        assert small.parts.keys() < large.parts.keys()


def test_the_low_rank_refresh_is_small_and_replaces_the_last_one(
    config: Config, tmp_path: Path
) -> None:
    bench = bench_of(config, tmp_path / "run")
    base = dict(bench.packages)
    bench.packages.update(realigned(bench, noisy(bench), 3))
    first = dict(bench.packages)
    bench.packages.update(realigned(bench, noisy(bench), 5))
    for name, package in bench.packages.items():
        (update,) = package.parts.keys() - base[name].parts.keys()
        assert update not in first[name].parts
        assert len(package.parts[update]) < 0.35 * base[name].manifest.num_bytes


def test_an_alignment_goes_on_from_the_last_update(config: Config, tmp_path: Path) -> None:
    bench = bench_of(config, tmp_path / "run")
    first = realigned(bench, noisy(bench), 3)
    bench.packages.update(first)
    still = override(config, {"emulator": {"distill_learning_rate": 1e-30}})
    second = realigned(replace(bench, config=still), noisy(bench), 5)
    assert second == first
    assert all(len(package.update()) > 0 for package in first.values())


@pytest.mark.parametrize("rank", [2, 0])
@pytest.mark.parametrize("place", ["ends", "all", "prompt"])
def test_alignment_brings_every_rung_nearer_to_the_plugged_in_model(
    place: str, rank: int, config: Config, tmp_path: Path
) -> None:
    changes = {
        "server": {"realign_rank": rank, "realign_tokens": 1024},
        "emulator": {"distill_lm_weight": 0.0, "distill_learning_rate": 1e-2},
    }
    bench = bench_of(override(override(config, PLACES[place]), changes), tmp_path / "run")
    adapter = noisy(bench)
    before = errors(bench, adapter)
    bench.packages.update(realigned(bench, adapter, 3))
    after = errors(bench, adapter)
    assert all(after[name] < 0.97 * before[name] for name in before), (before, after)


def errors(bench: Bench, adapter: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the difference between the logits of each rung and the full model, adapter in both."""
    bench.server.load(adapter)
    data = bench.data.validation
    batch = batch_of(data, np.arange(data.num_examples), bench.server.device)
    with torch.inference_mode():
        want = batch.call(bench.server.model).log_softmax(-1)
        found = {}
        for name, rung in bench.rungs().items():
            tunable = bench.shelf.get(rung.sha256)
            tunable.load(rung.own(adapter))
            got = batch.call(tunable.model).log_softmax(-1)
            found[name] = float((want.exp() * (want - got)).sum(-1).mean())
    return found


def test_alignment_leaves_adapter_and_full_model_as_they_are(
    config: Config, tmp_path: Path
) -> None:
    bench = bench_of(config, tmp_path / "run")
    adapter = noisy(bench)
    weights = {n: p.clone() for n, p in bench.server.network.named_parameters()}
    bench.server.load(adapter)
    weights |= {n: p.clone() for n, p in bench.server.network.named_parameters()}
    marked = {n: p.requires_grad for n, p in bench.server.network.named_parameters()}
    realigned(bench, adapter, 3)
    for name, parameter in bench.server.network.named_parameters():
        assert torch.equal(parameter, weights[name]), name
        assert parameter.requires_grad == marked[name], name
        assert parameter.grad is None, name


@pytest.mark.parametrize("place", PLACES)
def test_devices_are_sent_the_refresh_once_and_no_more(
    place: str, config: Config, tmp_path: Path
) -> None:
    run(override(config, {**PLACES[place], "federated": {"num_rounds": 4}}))
    lines = lines_of(tmp_path / "tiny")
    assert [sorted(line["refresh_bytes"]) for line in lines] == [[], [], [], ["0.5", "0.75"], []]
    for line in lines[1:]:
        assert {p["status"] for p in line["participants"]} == {"accepted"}
    sent = [[p["bytes_emulator"] for p in line["participants"]] for line in lines]
    first, refresh = sent[1][:4], sent[3][:4]
    assert sent[2][:4] == sent[4][:4] == [0] * 4
    new = lines[3]["refresh_bytes"]
    wanted = [new["0.75"], new["0.5"], new["0.75"], new["0.5"]]
    header = 14000 if place == "few bits" else 6000  # manifest, configuration and settings
    assert all(0 <= got - want < header for got, want in zip(refresh, wanted, strict=True))
    assert all(r < f for r, f in zip(refresh, first, strict=True))


@pytest.fixture(scope="module")
def never_interrupted(
    model_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], Config]:
    """Return a function that makes a run with alignments of a rank once; it gives its settings."""
    hard = {
        "adapter": {"placement": "all", "lora_dropout": 0.1},
        "federated": {"num_rounds": 5, "dropout_ratio": 0.3, "fraction_train": 0.7},
    }

    @cache
    def made(rank: int) -> Config:
        config = config_of(model_dir, corpus_file, tmp_path_factory.mktemp("whole"), SETTINGS)
        config = override(override(config, hard), {"server": {"realign_rank": rank}})
        run(config)
        return config

    return made


@pytest.mark.parametrize("rank", [2, 0], ids=["low rank", "whole blocks"])
@pytest.mark.parametrize("interrupted_after", [2, 3])
def test_a_run_that_is_resumed_ends_bit_identical(
    interrupted_after: int, rank: int, never_interrupted: Callable[[int], Config], tmp_path: Path
) -> None:
    whole = folder_of(never_interrupted(rank))
    config = override(never_interrupted(rank), {"output_dir": str(tmp_path)})
    assert_resumes_to(whole, config, interrupted_after)
    assert last_state(whole) == last_state(folder_of(config))


def last_state(folder: Path) -> dict[str, Any]:
    checkpoint = RunFolder(folder).latest_checkpoint(print)
    assert checkpoint is not None
    state = {k: v for k, v in checkpoint.state.items() if k != "history"}
    return {**state, **{n: a.tobytes() for n, a in checkpoint.arrays.items()}}


def test_alignment_without_text_of_the_server_is_refused_at_once(
    config: Config, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="server.realign_every needs data of the server"):
        run(override(config, {"data": {"server_ratio": 0.0}}))


def test_old_refreshes_do_not_stay_in_memory(config: Config, tmp_path: Path) -> None:
    bench = bench_of(config, tmp_path / "run")
    federation = make_federation(bench, make_controller(bench))
    shas = {rung.sha256 for rung in federation.rungs.values()}
    for server_round in (3, 5, 7):
        bench.packages.update(realigned(bench, noisy(bench), server_round))
        bench.rungs()
    assert len(bench.shelf.held) == 2
    assert not shas & set(bench.shelf.held)
