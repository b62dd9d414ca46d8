"""Curves fitted to logs that a known curve made: what is found again, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeat.control.quality_fit import (
    FitError,
    FitSettings,
    RoundLog,
    _constants,
    _errors,
    _fit,
    _predict,
    _pull,
    _Rounds,
    _scales,
    _table,
    fit_quality,
    load_quality,
    save_quality,
)
from fedpeat.core.errors import CalibrationError, ConfigError
from fedpeat.mec.quality import QualityModel, RoundWork

RUNGS = ["largest", "large", "medium", "small"]
SMALL = FitSettings(num_members=2, num_folds=3)
GOOD = FitError(0.1, 0.05, 0.3, 20, 320)


def truth(**changes: Any) -> QualityModel:
    """Return one member for four rungs, each slower and with a higher floor than the one before."""
    constants: dict[str, Any] = {
        "speed": [0.03, 0.026, 0.02, 0.012],
        "excess": [0.0, 0.02, 0.06, 0.15],
        "skew": 0.1,
        "server_speed": 0.04,
        "steps_power": 0.6,
        "devices_power": 0.35,
        "staleness_decay": 0.1,
        "floor": 2.2,
    }
    return QualityModel(**{n: np.array([value]) for n, value in (constants | changes).items()})


def worked(rng: np.random.Generator, num_rounds: int, rungs: Sequence[int]) -> RoundWork:
    """Return the work of one federation of up to ten devices; its plan is drawn too."""
    num_devices, alpha = rng.integers(2, 11), rng.dirichlet(np.ones(len(rungs)))
    share = rng.choice([0.0, 0.2, 0.5])
    interval = rng.choice([2, 4, 8])
    examples = rng.integers(20, 100, (num_rounds, num_devices))
    rung = rng.choice(rungs, (num_rounds, num_devices, 1), p=alpha)
    held = (rung == np.arange(4)) * examples[..., None]
    return RoundWork(
        rung_share=held.sum(1) / examples.sum(1, keepdims=True),
        num_effective=examples.sum(1) ** 2 / (examples**2).sum(1),
        local_steps=np.full(num_rounds, float(rng.choice([2, 4, 8, 16]))),
        server_share=np.full(num_rounds, share),
        server_steps=np.full(num_rounds, 8.0 * (share > 0)),
        staleness=np.arange(num_rounds) % interval * 1.0,
        num_recent=num_devices * rng.uniform(0.3, 1, num_rounds),
    )


@cache
def logged(
    noise: float = 0.005,
    seed: int = 0,
    rungs: tuple[int, ...] = (0, 1, 2, 3),
    decay: float = 0.1,
    num_policies: int = 20,
    skew: float = 0.1,
) -> RoundLog:
    """Return two federations of 8 rounds for each policy, which start at 3 nat."""
    rng, model = np.random.default_rng(seed), truth(staleness_decay=decay, skew=skew)
    works, losses = [], []
    for _ in range(num_policies):
        plan = rng.integers(2**32)
        for _ in range(2):
            work = worked(np.random.default_rng(plan), 8, rungs)
            loss = [np.array([3.0])]
            for now in range(8):
                row = RoundWork(**{n: value[now : now + 1] for n, value in vars(work).items()})
                after = model.next_loss(loss[-1], row, np.array([0]))
                loss.append(after + noise * rng.standard_normal(1))
            works.append(work)
            losses.append(np.concatenate(loss))
    return RoundLog(
        federation=np.repeat(np.arange(2 * num_policies), 8),
        policy=np.repeat(np.arange(num_policies), 16),
        before=np.concatenate([loss[:-1] for loss in losses]),
        after=np.concatenate([loss[1:] for loss in losses]),
        work=RoundWork(
            **{
                name: np.concatenate([vars(work)[name] for work in works])
                for name in vars(works[0])
            }
        ),
    )


@cache
def fitted(**changes: Any) -> tuple[QualityModel, FitError]:
    return fit_quality(logged(**changes), SMALL)


def test_curves_while_fitting_are_those_of_the_quality_model() -> None:
    work = {name: value.copy() for name, value in vars(logged().work).items()}
    for nth, name in enumerate(("num_effective", "rung_share", "local_steps")):
        work[name][nth::7] = 0.0
    table = _table(replace(logged(), work=RoundWork(**work)))
    every = np.ones((3, len(table.policy)), dtype=bool)
    latent = torch.randn((3, 14), generator=torch.manual_seed(0), dtype=torch.float64)
    constants = _constants(latent, _scales(table, every))
    pull, floor = _pull(constants, _Rounds.of(table))
    before = torch.from_numpy(table.before)
    ours = (before + pull * (before - floor)).numpy().reshape(3, -1)
    model = QualityModel(**{name: value.numpy() for name, value in constants.items()})
    for member in range(3):
        index = np.full(table.before.size, member)
        theirs = model.next_loss(table.before.ravel(), table.work, index)
        np.testing.assert_allclose(ours[member], theirs, rtol=0, atol=1e-9)


def test_policies_never_seen_are_predicted_and_far_better_than_by_the_mean_change() -> None:
    model, error = fitted()
    assert (error.num_policies, error.num_rounds) == (20, 320)
    assert error.step < 0.15
    assert error.rollout < 0.04
    assert error.baseline_rollout > 0.12
    fresh = _table(logged(noise=0.0, seed=1))
    one_round, last = _predict(model, fresh)
    change = fresh.after - fresh.before
    assert np.square(one_round - fresh.after).mean() < 0.1**2 * np.square(change).mean()
    assert np.abs(last - fresh.after[:, -1]).mean() < 0.04 * fresh.gain


def test_the_error_is_that_of_policies_and_not_of_federations_held_out() -> None:
    log, nth = logged(num_policies=10), np.arange(160) % 8
    pace = np.random.default_rng(0).uniform(0.0, 0.1, 10)[log.policy]
    own_rung = replace(log.work, rung_share=np.eye(10)[log.policy])
    own_pace = replace(log, before=3 - pace * nth, after=3 - pace * (nth + 1), work=own_rung)
    model, error = fit_quality(own_pace, SMALL)
    table = _table(own_pace)
    assert np.abs(_predict(model, table)[1] - table.after[:, -1]).mean() < 0.15 * table.gain
    assert error.rollout > 0.35  # about 0.2 if federations of one policy were told apart


def test_federations_that_are_held_out_leave_no_trace_in_a_fit() -> None:
    log = logged()
    table, training = _table(log), np.ones((1, 40), dtype=bool)
    training[0, ::3] = False
    other = replace(table, before=table.before.copy(), after=table.after.copy())
    for losses in (other.before, other.after):
        losses[~training[0]] = 1.0
    one, same = (_fit(t, training, 1, np.random.default_rng(0))[0] for t in (table, other))
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, vars(same)[name])


def test_errors_worked_by_hand() -> None:
    none, ones = np.zeros(6), np.ones(6)
    server_alone = RoundWork(np.zeros((6, 4)), none, none, ones, ones, none, ones)
    names = np.array([0, 0, 1, 1, 1, 2])
    before, after = np.array([[3.0, 2.6, 3.0, 2.9, 2.7, 3.0], [2.6, 2.4, 2.9, 2.7, 2.6, 2.3]])
    table = _table(RoundLog(names, names, before, after, server_alone))
    still, at_its_floor = truth(server_speed=0.0), truth(server_speed=99.0, floor=2.2)
    errors = _errors(table, np.array([0, 1, 1]), [still, at_its_floor])
    step = np.linalg.norm([0.4, 0.2, 0.7, 0.5, 0.4, 0.1]) / np.linalg.norm(before - after)
    gain, others_mean = 3.0 - 2.3, np.array([-(0.1 + 0.2 + 0.1 + 0.7) / 4, -(0.4 + 0.2) / 2])
    ends = 3.0 + np.array([2, 3, 1]) * others_mean[[0, 1, 1]]
    baseline = np.abs(ends - [2.4, 2.6, 2.3]).mean() / gain
    assert errors == pytest.approx((step, (0.6 + 0.4 + 0.1) / 3 / gain, baseline))


def test_rounds_of_federations_of_any_length_are_told_apart() -> None:
    work = RoundWork(np.full((5, 4), 0.25), *[np.arange(5) / 5.0] * 6)
    before = np.array([3.0, 4.0, 2.9, 2.8, 3.9])
    table = _table(
        RoundLog(np.array([7, 2, 7, 7, 2]), np.array([1, 0, 1, 1, 0]), before, before, work)
    )
    assert table.policy.tolist() == [0, 1]
    assert table.real.tolist() == [[True, True, False], [True, True, True]]
    assert table.before.tolist() == [[4.0, 3.9, 3.9], [3.0, 2.9, 2.8]]
    assert table.work.local_steps.tolist() == [0.2, 0.8, 0.0, 0.0, 0.4, 0.6]
    assert table.work.rung_share[:, 0].tolist() == [0.25, 0.25, 0.0, 0.25, 0.25, 0.25]


def test_shuffled_losses_give_a_large_error_and_may_not_be_used(tmp_path: Path) -> None:
    log = logged()
    lost = replace(log, after=np.random.default_rng(0).permutation(log.after))
    model, error = fit_quality(lost, SMALL)
    save_quality(tmp_path, model, error, SMALL, RUNGS)
    with pytest.raises(CalibrationError, match="held-out policies must be at most 0.15, got 0\\."):
        load_quality(tmp_path, RUNGS)
    assert load_quality(tmp_path, RUNGS, max_error=1.0)[1] == error


def test_the_slowing_by_staleness_is_found_where_there_is_some() -> None:
    slowed, _ = fitted()
    steady, _ = fitted(decay=0.0)
    assert slowed.staleness_decay == pytest.approx(0.1, rel=0.3)
    assert (steady.staleness_decay < 0.01).all()


def test_what_few_devices_cost_is_found() -> None:
    some, none = (fitted(skew=skew)[0].skew for skew in (0.4, 0.0))
    assert some == pytest.approx(0.4, rel=0.25)
    assert (none < 0.05).all()


def test_staleness_that_never_was_is_taken_to_slow_little() -> None:
    log = logged()
    fresh = replace(log, work=replace(log.work, staleness=np.zeros(320)))
    assert (fit_quality(fresh, SMALL)[0].staleness_decay < 0.02).all()


def test_a_rung_never_used_is_like_its_neighbours() -> None:
    model, error = fitted(rungs=(0, 1, 3))
    assert error.rollout < 0.05
    for constants in (model.speed, model.excess):
        around = np.sort(constants[:, [1, 3]], axis=1)
        assert (constants[:, 2] > 0.7 * around[:, 0]).all()
        assert (constants[:, 2] < 1.4 * around[:, 1]).all()


def test_a_small_rung_never_used_has_the_speed_of_the_next() -> None:
    model, _ = fitted(rungs=(0, 1, 2))
    np.testing.assert_allclose(model.speed[:, 3], model.speed[:, 2], rtol=0.05)


def test_the_same_seed_gives_the_same_fit_and_members_differ() -> None:
    log, quick = logged(num_policies=10), replace(SMALL, num_folds=2)
    (one, error), (same, its_error) = fit_quality(log, quick), fit_quality(log, quick)
    other, _ = fit_quality(log, replace(quick, seed=1))
    assert error == its_error
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, vars(same)[name])
    assert (one.speed != other.speed).all()
    assert (one.speed[0] != one.speed[1]).all()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (logged(num_policies=9), "a calibration must have at least 10 policies, got 9"),
        (
            replace(
                logged(num_policies=10),
                before=np.full(160, 2.0),
                after=np.linspace(2.0, 3.0, 160),
            ),
            "the last loss must be below where federations start, got -",
        ),
    ],
)
def test_logs_that_say_too_little_are_refused(log: RoundLog, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fit_quality(log, SMALL)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(CalibrationError, match="must have at least 321 rounds, got 320"):
        fit_quality(logged(), replace(SMALL, min_rounds=321))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"after": np.full(320, math.nan)}, r"after of a log must be finite and in \[-inf, inf\]"),
        ({"policy": np.arange(320)}, r"federation 0 must follow one policy, got \[0, 1, 2,"),
        ({"local_steps": np.full(320, -1.0)}, "local_steps of a log must be finite and in"),
        ({"server_share": np.full(320, 1.1)}, r"server_share .* in \[0, 1\], got 1.1"),
        ({"rung_share": np.full((320, 4), 2.0)}, r"rung_share .* in \[0, 1\], got 2"),
        ({"staleness": np.zeros(3)}, "staleness of a log must have 320 rounds, got 3"),
    ],
)
def test_logs_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    log = logged()
    of_work = {name: value for name, value in changes.items() if hasattr(log.work, name)}
    work = RoundWork.__new__(RoundWork)  # lengths that the type checker of tests would refuse
    vars(work).update(vars(log.work) | of_work)
    others = {name: value for name, value in changes.items() if name not in of_work}
    with pytest.raises(CalibrationError, match=message):
        replace(log, work=work, **others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_members": 0}, "calibration.num_members must be at least 1, got 0"),
        ({"num_folds": 1}, "calibration.num_folds must be at least 2, got 1"),
        ({"min_policies": 4}, "calibration.min_policies must be at least 5, got 4"),
        ({"min_rounds": 0}, "calibration.min_rounds must be at least 1, got 0"),
        ({"max_error": 0.0}, "calibration.max_error must be above 0, got 0"),
        ({"max_error": math.nan}, "calibration.max_error must be above 0, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitSettings(**changes)


def test_what_was_saved_is_read_bit_by_bit(tmp_path: Path) -> None:
    model, error = fitted()
    save_quality(tmp_path / "new", model, error, SMALL, RUNGS)
    same, its_error = load_quality(tmp_path / "new", RUNGS)
    assert its_error == error
    for name, value in vars(model).items():
        np.testing.assert_array_equal(value, vars(same)[name])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["quality.json"]


def test_a_fit_is_judged_by_the_threshold_it_was_saved_with_or_the_one_asked_for(
    tmp_path: Path,
) -> None:
    poor = replace(GOOD, rollout=0.31, baseline_rollout=0.35)
    save_quality(tmp_path, truth(), poor, replace(SMALL, max_error=0.4), RUNGS)
    load_quality(tmp_path, RUNGS)
    with pytest.raises(CalibrationError, match="must be at most 0.15, got 0.31; log more"):
        load_quality(tmp_path, RUNGS, max_error=0.15)


@pytest.mark.parametrize("rollout", [0.1, 0.101])
def test_a_fit_no_better_than_a_mean_change_is_refused(tmp_path: Path, rollout: float) -> None:
    useless = replace(GOOD, rollout=rollout, baseline_rollout=0.1)
    save_quality(tmp_path, truth(), useless, SMALL, RUNGS)
    with pytest.raises(CalibrationError, match=f"off by 0.1, got {rollout}; log more federations"):
        load_quality(tmp_path, RUNGS)
    save_quality(tmp_path, truth(), replace(useless, rollout=0.099), SMALL, RUNGS)
    load_quality(tmp_path, RUNGS)


def test_a_fit_for_other_rungs_is_refused(tmp_path: Path) -> None:
    save_quality(tmp_path, truth(), GOOD, SMALL, RUNGS)
    with pytest.raises(CalibrationError, match=r"must be for rungs \['small'.* got \['largest'"):
        load_quality(tmp_path, RUNGS[::-1])


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["schema"], 1, "must have schema 2, got 1"),
        (["constants", "floor"], [-math.inf], "is damaged: WorldError"),
        (["constants", "speed"], [[0.1, 0.1, 0.1]], r"is damaged: .*speed has shape \(1, 3\)"),
        (["constants", "floor"], [], "is damaged: "),
        (["constants", "floor"], "low", "is damaged: ValueError"),
        (["constants"], {}, "is damaged: KeyError"),
        (["constants"], [], "is damaged: AttributeError"),
        (["error"], {}, "is damaged: TypeError"),
        (["error", "rollout"], None, "is damaged: Type"),
        (["error", "rollout"], math.nan, "must be at most 0.15, got nan"),
        (["max_error"], None, "is damaged: TypeError"),
    ],
)
def test_a_fit_that_cannot_be_is_refused(
    tmp_path: Path, keys: list[str], value: Any, message: str
) -> None:
    save_quality(tmp_path, truth(), GOOD, SMALL, RUNGS)
    record = json.loads((tmp_path / "quality.json").read_text())
    place = record
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "quality.json").write_text(json.dumps(record))
    with pytest.raises(CalibrationError, match=message):
        load_quality(tmp_path, RUNGS)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "{"])
def test_a_file_that_is_missing_or_torn_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "quality.json").write_text(content)
    with pytest.raises(CalibrationError, match="cannot read calibration .*quality.json"):
        load_quality(tmp_path, RUNGS)
