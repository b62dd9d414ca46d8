"""Fits curves of quality to logged federations, and measures them on policies they never saw."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from fedpeat.core.errors import CalibrationError, ConfigError
from fedpeat.core.run_folder import clean_json, storage_errors, write_atomically
from fedpeat.mec.quality import QualityModel, RoundWork

__all__ = ["FitError", "FitSettings", "RoundLog", "fit_quality", "load_quality", "save_quality"]

_SCHEMA = 2
_FILE = "quality.json"
_NUM_STARTS = 4
_NUM_STEPS = 500
_LEARNING_RATE = 0.1
_HUBER_WIDTH = 0.5  # beyond half a typical change, a round counts by its distance, not its square
_NOISE = 0.2  # what the prior takes for the noise of a round, in typical changes


@dataclass(frozen=True)
class RoundLog:
    """Rounds of real federations; those of a federation in order, though others may lie between.

    Attributes:
        federation: The run that a round belongs to.
        policy: The plan that this run followed; several may have followed the same.
        before: Held-out loss of the plugged-in model before the round [nat per token, or image].
        after: The same after the round.
        work: What the rounds' updates were made of.
    """

    federation: Int[np.ndarray, " rounds"]
    policy: Int[np.ndarray, " rounds"]
    before: Float[np.ndarray, " rounds"]
    after: Float[np.ndarray, " rounds"]
    work: RoundWork

    def __post_init__(self) -> None:
        losses = {name: getattr(self, name) for name in ("before", "after")}
        for name, values in {"policy": self.policy, **losses, **vars(self.work)}.items():
            if len(values) != len(self.federation):
                raise CalibrationError(
                    f"{name} of a log must have {len(self.federation)} rounds, got {len(values)}"
                )
            least = -math.inf if name in ("policy", *losses) else 0.0
            most = 1 + 1e-9 if name in ("rung_share", "server_share") else math.inf
            bad = ~(np.isfinite(values) & (values >= least) & (values <= most))
            if bad.any():
                raise CalibrationError(
                    f"{name} of a log must be finite and in [{least:g}, {most:g}], "
                    f"got {values[bad][0]}"
                )
        for federation in np.unique(self.federation):
            policies = np.unique(self.policy[self.federation == federation])
            if len(policies) > 1:
                raise CalibrationError(
                    f"federation {federation} must follow one policy, got {policies.tolist()}"
                )


@dataclass(frozen=True)
class FitSettings:
    """How curves are fitted, and when they may be used.

    Attributes:
        num_members: Size of the ensemble.
        num_folds: Parts of the policies, each held out once.
        max_error: Largest rollout error with which the fit may be used.
        min_policies: Fewest policies to fit to.
        min_rounds: Fewest rounds to fit to.
        seed: Seed of draws, folds and starts.
    """

    num_members: int = 8
    num_folds: int = 5
    max_error: float = 0.15
    min_policies: int = 10
    min_rounds: int = 60
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_members": 1, "num_folds": 2, "min_policies": self.num_folds, "min_rounds": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(
                    f"calibration.{name} must be at least {value}, got {getattr(self, name)}"
                )
        if not self.max_error > 0:
            raise ConfigError(f"calibration.max_error must be above 0, got {self.max_error}")


@dataclass(frozen=True)
class FitError:
    """How far predictions are off in federations whose policies were held out.

    Attributes:
        step: Root mean square error of a round's change, over that of the change itself.
        rollout: Mean distance of the last loss, predicted from the first one, from the real last
            loss, over what the best federation gained: mean first loss - lowest last loss.
        baseline_rollout: The same where every round is predicted to bring the mean change.
        num_policies: Policies in the log.
        num_rounds: Rounds in the log.
    """

    step: float
    rollout: float
    baseline_rollout: float
    num_policies: int
    num_rounds: int

    def objection(self, max_error: float) -> str | None:
        """Return why no controller may be trained on the fit; None if one may."""
        if not self.rollout <= max_error:  # NaN neither
            return (
                f"the calibration's error on held-out policies must be at most {max_error:g}, "
                f"got {self.rollout:.3g}; log more federations or longer ones, or raise max_error"
            )
        if not self.rollout < self.baseline_rollout:
            return (
                "the calibration must predict held-out policies better than a mean change for "
                f"every round does, which is off by {self.baseline_rollout:.3g}, got "
                f"{self.rollout:.3g}; log more federations, or more unlike ones"
            )
        return None


def fit_quality(log: RoundLog, settings: FitSettings) -> tuple[QualityModel, FitError]:
    """Fit an ensemble to all rounds, and measure others like it on policies that they never saw.

    Each member is the best of several starts on another draw of the federations, with as many of
    them as there are. What counts is the loss after each round, predicted once from the measured
    loss before it and once from the federation's first loss.

    Raises:
        CalibrationError: If there are too few policies or rounds, or no federation learned.

    Source:
        Efron (1979), Bootstrap methods, for the draws; Chua et al. (2018), Deep reinforcement
        learning in a handful of trials, for an ensemble of them as a model to plan with; Huber
        (1964), Robust estimation of a location parameter, for how distances count.
    """
    num_policies, num_rounds = len(np.unique(log.policy)), len(log.policy)
    for name, number, least in (
        ("policies", num_policies, settings.min_policies),
        ("rounds", num_rounds, settings.min_rounds),
    ):
        if number < least:
            raise CalibrationError(f"a calibration must have at least {least} {name}, got {number}")
    table = _table(log)
    if table.gain <= 0:
        raise CalibrationError(
            "in some federation the last loss must be below where federations start, "
            f"got {table.gain:.4g} nat between them"
        )
    rng = np.random.default_rng(settings.seed)
    fold = _folds(table.policy, settings.num_folds, rng)
    training = [fold != held_out for held_out in range(settings.num_folds)]
    *trials, model = _fit(table, np.array([*training, fold >= 0]), settings.num_members, rng)
    step, rollout, baseline = _errors(table, fold, trials)
    return model, FitError(step, rollout, baseline, num_policies, num_rounds)


def save_quality(
    folder: Path,
    model: QualityModel,
    error: FitError,
    settings: FitSettings,
    rung_names: Sequence[str],
) -> None:
    """Write ``quality.json``: the constants, for which rungs, and how far they are to be trusted.

    Raises:
        StorageError: If it cannot be written.
    """
    record = {
        "schema": _SCHEMA,
        "rungs": list(rung_names),
        "constants": {name: value.tolist() for name, value in vars(model).items()},
        "error": asdict(error),
        "max_error": settings.max_error,
    }
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _FILE, clean_json(record) + "\n")


def load_quality(
    folder: Path, rung_names: Sequence[str], max_error: float | None = None
) -> tuple[QualityModel, FitError]:
    """Read what ``save_quality`` wrote.

    Args:
        folder: Where it is.
        rung_names: Rungs that it must be for, in order.
        max_error: Largest rollout error that will do; the one it was saved with if None.

    Raises:
        CalibrationError: If it is missing or damaged, of another schema, for other rungs, or
            predicts policies that it never saw too badly, or no better than a mean change would.
    """
    path = folder / _FILE
    try:
        record = json.loads(path.read_text())
        schema = record["schema"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as damage:
        raise CalibrationError(f"cannot read calibration {path}: {damage!r}") from damage
    if schema != _SCHEMA:
        raise CalibrationError(f"calibration {path} must have schema {_SCHEMA}, got {schema!r}")
    if record.get("rungs") != list(rung_names):
        raise CalibrationError(
            f"calibration {path} must be for rungs {list(rung_names)}, got {record.get('rungs')}"
        )
    try:
        arrays = {name: np.array(v, dtype=float) for name, v in record["constants"].items()}
        _check_shapes(arrays, len(rung_names))
        model, error = QualityModel(**arrays), FitError(**record["error"])
        allowed = float(record["max_error"] if max_error is None else max_error)
        objection = error.objection(allowed)
    except (ValueError, KeyError, TypeError, AttributeError) as damage:
        raise CalibrationError(f"calibration {path} is damaged: {damage!r}") from damage
    if objection is not None:
        raise CalibrationError(objection)
    return model, error


def _check_shapes(arrays: dict[str, np.ndarray], num_rungs: int) -> None:
    """Check that constants are of as many members as there are floors, and rungs as wanted.

    Raises:
        ValueError: If not.
    """
    members = arrays["floor"].shape
    for name, array in arrays.items():
        wanted = (*members, num_rungs) if name in ("speed", "excess") else members
        if array.shape != wanted or len(members) != 1 or array.size == 0:
            raise ValueError(f"{name} has shape {array.shape}, not {wanted}")


@dataclass(frozen=True)
class _Table:
    """Rounds by federation; a shorter one ends with rounds in which nobody does anything.

    Attributes:
        policy: Policy of each federation.
        real: Which rounds there were.
        before: Loss before each round [nat]; where there was none, that of the last one.
        after: Loss after it [nat]; likewise.
        work: Work of each round, federation after federation.
    """

    policy: Int[np.ndarray, " federations"]
    real: Bool[np.ndarray, "federations rounds"]
    before: Float[np.ndarray, "federations rounds"]
    after: Float[np.ndarray, "federations rounds"]
    work: RoundWork

    @property
    def gain(self) -> float:
        """Mean first loss less the lowest last loss [nat]."""
        return float(self.before[:, 0].mean() - self.after[:, -1].min())


def _table(log: RoundLog) -> _Table:
    """Return the rounds of a log by federation."""
    _, federation, counts = np.unique(log.federation, return_inverse=True, return_counts=True)
    order = np.argsort(federation, kind="stable")  # federation after federation
    nth = np.arange(counts.max())
    real = nth < counts[:, None]
    firsts = np.cumsum(counts) - counts
    rows = order[firsts[:, None] + np.minimum(nth, counts[:, None] - 1)]
    flat = rows.ravel()
    work = {
        name: np.where(real.reshape(-1, *[1] * (values.ndim - 1)), values[flat], 0.0)
        for name, values in vars(log.work).items()
    }
    return _Table(
        log.policy[rows[:, 0]], real, log.before[rows], log.after[rows], RoundWork(**work)
    )


def _folds(
    policy: Int[np.ndarray, " federations"], num_folds: int, rng: np.random.Generator
) -> Int[np.ndarray, " federations"]:
    """Return the fold of each federation; those of one policy share it."""
    names, index = np.unique(policy, return_inverse=True)
    return rng.permutation(len(names))[index] % num_folds


def _errors(
    table: _Table, fold: Int[np.ndarray, " federations"], trials: Sequence[QualityModel]
) -> tuple[float, float, float]:
    """Return step, rollout and baseline error, each federation's by the trial without its fold."""
    first, last, real = table.before[:, 0], table.after[:, -1], table.real
    change = table.after - table.before
    predictions = [_predict(trial, table) for trial in trials]
    own = fold, np.arange(len(fold))
    one_round, rolled = (np.stack(part)[own] for part in zip(*predictions, strict=True))
    means = [change[fold != out][real[fold != out]].mean() for out in range(len(trials))]
    baseline = first + real.sum(1) * np.array(means)[fold]
    off = (one_round - table.after)[real]
    step = math.sqrt(np.square(off).mean() / np.square(change[real]).mean())
    rollout, trivial = (np.abs(end - last).mean() / table.gain for end in (rolled, baseline))
    return step, float(rollout), float(trivial)


def _predict(
    model: QualityModel, table: _Table
) -> tuple[Float[np.ndarray, "federations rounds"], Float[np.ndarray, " federations"]]:
    """Return the members' mean loss after each round, and at the end of a rollout."""
    number, (size, length) = model.num_members, table.before.shape
    member = np.repeat(np.arange(number), size)
    one_round, rolled = np.empty(table.before.shape), np.tile(table.before[:, 0], number)
    for now in range(length):
        rows = np.tile(np.arange(size) * length + now, number)
        work = RoundWork(**{name: values[rows] for name, values in vars(table.work).items()})
        after = model.next_loss(np.tile(table.before[:, now], number), work, member)
        one_round[:, now] = after.reshape(number, size).mean(0)
        rolled = model.next_loss(rolled, work, member)
    return one_round, rolled.reshape(number, size).mean(0)


@dataclass(frozen=True)
class _Scales:
    """What is typical of the federations that a fit is made to; it gives the priors their units.

    Attributes:
        lowest: Lowest loss [nat].
        gain: Mean first loss less the lowest one [nat].
        change: Root mean square change of a round [nat].
        speed: Progress of a step that would explain the mean change, were both powers 1/2.
    """

    lowest: Float[Tensor, " fits"]
    gain: Float[Tensor, " fits"]
    change: Float[Tensor, " fits"]
    speed: Float[Tensor, " fits"]

    def repeated(self, times: int) -> _Scales:
        return _Scales(**{n: value.repeat_interleave(times) for n, value in vars(self).items()})


def _scales(table: _Table, training: Bool[np.ndarray, "fits federations"]) -> _Scales:
    work = table.work
    devices = (1 - work.server_share) * np.sqrt(work.num_effective * work.local_steps)
    units = (devices + work.server_share * np.sqrt(work.server_steps)).reshape(table.real.shape)
    found = []
    for chosen in training:
        before, after = table.before[chosen], table.after[chosen]
        real = table.real[chosen]
        change = (after - before)[real]
        lowest = min(before.min(), after.min())
        gain = max(before[:, 0].mean() - lowest, 1e-9)
        size = max(math.sqrt(np.square(change).mean()), 1e-9)
        speed = max(-change.mean() / gain, 1e-3) / max(units[chosen][real].mean(), 1e-9)
        found.append((lowest, gain, size, speed))
    return _Scales(*torch.tensor(found, dtype=torch.float64).T)


@dataclass(frozen=True)
class _Rounds:
    """A table as tensors; the fields are those of ``_Table`` and ``RoundWork``."""

    real: Bool[Tensor, "federations rounds"]
    before: Float[Tensor, "federations rounds"]
    after: Float[Tensor, "federations rounds"]
    rung_share: Float[Tensor, "federations rounds rungs"]
    num_effective: Float[Tensor, "federations rounds"]
    local_steps: Float[Tensor, "federations rounds"]
    server_share: Float[Tensor, "federations rounds"]
    server_steps: Float[Tensor, "federations rounds"]
    staleness: Float[Tensor, "federations rounds"]
    num_recent: Float[Tensor, "federations rounds"]

    @classmethod
    def of(cls, table: _Table) -> _Rounds:
        work = {
            name: torch.from_numpy(value).view(*table.real.shape, *value.shape[1:])
            for name, value in vars(table.work).items()
        }
        losses = {name: torch.from_numpy(getattr(table, name)) for name in ("before", "after")}
        return cls(real=torch.from_numpy(table.real), **losses, **work)


def _fit(
    table: _Table,
    training: Bool[np.ndarray, "fits federations"],
    num_members: int,
    rng: np.random.Generator,
) -> list[QualityModel]:
    """Return an ensemble for each choice of federations; all curves of all are fitted at once."""
    num_curves, num_rungs = len(training) * num_members, table.work.rung_share.shape[1]
    chosen = training.repeat(num_members, axis=0)
    draws = torch.from_numpy(rng.multinomial(chosen.sum(1), chosen / chosen.sum(1, keepdims=True)))
    scales = _scales(table, training).repeated(num_members)
    starts = torch.from_numpy(rng.standard_normal((num_curves, _NUM_STARTS, 2 * num_rungs + 6)))
    starts[:, 0] = 0.0  # what the prior expects
    latent, cost = _minimise(
        _Rounds.of(table),
        draws.repeat_interleave(_NUM_STARTS, 0),
        scales.repeated(_NUM_STARTS),
        starts.flatten(0, 1),
    )
    best = cost.view(num_curves, _NUM_STARTS).argmin(1)
    latent = latent.view(starts.shape)[torch.arange(num_curves), best]
    constants = _constants(latent, scales)
    parts = {
        name: value.numpy().reshape(len(training), num_members, *value.shape[1:])
        for name, value in constants.items()
    }
    return [
        QualityModel(**{name: value[fit] for name, value in parts.items()})
        for fit in range(len(training))
    ]


def _minimise(
    rounds: _Rounds,
    draws: Int[Tensor, "curves federations"],
    scales: _Scales,
    latent: Float[Tensor, "curves latents"],
) -> tuple[Float[Tensor, "curves latents"], Float[Tensor, " curves"]]:
    """Return where Adam ends from each start, and what it costs there."""
    latent = latent.clone().requires_grad_()
    optimizer = torch.optim.Adam([latent], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _NUM_STEPS)
    for _ in range(_NUM_STEPS):
        optimizer.zero_grad()
        _cost(latent, rounds, draws, scales).sum().backward()  # no curve touches another's gradient
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return latent.detach(), _cost(latent, rounds, draws, scales)


def _cost(
    latent: Float[Tensor, "curves latents"],
    rounds: _Rounds,
    draws: Int[Tensor, "curves federations"],
    scales: _Scales,
) -> Float[Tensor, " curves"]:
    """Return how far each curve is off in the federations it drew, and from the prior.

    Both the loss after one round and that after all rounds so far are compared with the real one,
    in typical changes; the prior weighs what it would in a posterior with noise ``_NOISE``.
    """
    pull, floor = _pull(_constants(latent, scales), rounds)
    one_round = rounds.before + pull * (rounds.before - floor)
    loss, rolled = rounds.before[:, 0].expand(len(latent), -1), []
    for now in range(pull.shape[-1]):
        loss = loss + pull[..., now] * (loss - floor[..., now])
        rolled.append(loss)
    counts = draws[..., None] * rounds.real
    unit = scales.change[:, None, None]
    off = (torch.stack([one_round, torch.stack(rolled, -1)]) - rounds.after) / unit
    nothing = torch.zeros_like(off)
    distance = functional.huber_loss(off, nothing, reduction="none", delta=_HUBER_WIDTH)
    prior = _NOISE**2 * latent.square().sum(1) / 2
    return ((distance.sum(0) * counts).sum((1, 2)) + prior) / counts.sum((1, 2))


def _pull(
    constants: dict[str, Tensor], rounds: _Rounds
) -> tuple[Float[Tensor, "curves federations rounds"], Float[Tensor, "curves federations rounds"]]:
    """Return exp(-p) - 1 and F of ``QualityModel``, with which L' = L + (exp(-p) - 1) (L - F)."""
    c = {name: v[:, None, None] if v.ndim == 1 else v for name, v in constants.items()}
    devices = 1 - rounds.server_share
    speed, excess = (
        torch.einsum("ftr,cr->cft", rounds.rung_share, c[name]) for name in ("speed", "excess")
    )
    crowd = torch.where(rounds.num_effective > 0, rounds.num_effective ** c["devices_power"], 0.0)
    faded = (-c["staleness_decay"] * rounds.staleness).exp()
    progress = devices * crowd * faded * speed * rounds.local_steps ** c["steps_power"]
    server = c["server_speed"] * rounds.server_steps ** c["steps_power"]
    excess = excess + c["skew"] / rounds.num_recent.clamp(min=1)
    return torch.expm1(-progress - rounds.server_share * server), c["floor"] + devices * excess


def _constants(latent: Float[Tensor, "curves latents"], scales: _Scales) -> dict[str, Tensor]:
    """Return the constants of curves from numbers that are standard normal under the prior.

    The prior is weak, and decides where the log says little. Speeds walk along the ladder, from the
    server over the largest rung to the smallest, by a factor of about 2 a step, as do excesses: a
    rung never used is like its neighbour. Powers are about 1/2 and seldom above 1, the decay of
    speed is near 0, skew costs little, and the floor lies below the lowest loss by about a third of
    the gain.
    """
    num_rungs = (latent.shape[1] - 6) // 2
    speeds, excess, rest = latent.split([num_rungs + 1, num_rungs, 5], dim=1)
    gain, (steps, devices, staleness, gap, skew) = scales.gain, rest.T
    walk = torch.full((num_rungs + 1,), 0.7, dtype=latent.dtype)
    walk[0] = 1.5
    speeds = scales.speed[:, None] * (speeds * walk).cumsum(1).exp()
    return {
        "speed": speeds[:, 1:],
        "excess": gain[:, None] * functional.softplus((excess * walk[:-1]).cumsum(1) - 3),
        "skew": gain * functional.softplus(1.5 * skew - 3),
        "server_speed": speeds[:, 0],
        "steps_power": functional.softplus(0.7 * steps - 0.4),
        "devices_power": functional.softplus(0.7 * devices - 0.4),
        "staleness_decay": 0.3 * functional.softplus(2 * staleness - 4),
        "floor": scales.lowest - gain * functional.softplus(1.5 * gap - 1),
    }
