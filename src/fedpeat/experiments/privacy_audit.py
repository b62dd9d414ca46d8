"""Audit what a server sees of the devices' data: membership inference and inversion of updates."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fedpeat.adapter.lora import State
from fedpeat.adapter.tunable import Tunable, read_adapter
from fedpeat.config.loading import load_config
from fedpeat.config.schema import Config, PrivacyAuditPlan
from fedpeat.core.errors import ConfigError, DataError
from fedpeat.core.run_folder import RunFolder, clean_json, write_atomically
from fedpeat.core.seeds import generator
from fedpeat.data.packing import PackedText
from fedpeat.experiments.bench import Bench, local_settings, set_up
from fedpeat.experiments.methods import METHODS
from fedpeat.experiments.observer import Observer, Silent
from fedpeat.experiments.results import versions
from fedpeat.experiments.updates import Seen, Training, Victim, seen_by_server
from fedpeat.experiments.verdicts import privacy_verdicts
from fedpeat.federated.accounting import require_accountant
from fedpeat.report.page import write_report
from fedpeat.tuning.evaluation import example_losses
from fedpeat.tuning.inversion import Inversion, invert
from fedpeat.tuning.measures import rouge_1, rouge_l, separation, words

__all__ = ["audit_privacy"]

_AMPLIFICATION = 4.0
"""Of an update of one step, which alone moves the network too little to be heard."""

Scores = tuple[list[Float[np.ndarray, " _"]], list[Float[np.ndarray, " _"]]]
"""What an attack says of members and of others, from each update."""


def audit_privacy(
    path: Path,
    plan: PrivacyAuditPlan,
    *,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Attack updates as the server of a run sees them, with and without each defence.

    Updates are made anew, from the run's first adapter, with the data of its simulated devices:
    what real devices sent is not kept. The folder gets ``privacy_audit.json``, whose content is
    returned, and its report anew.

    Args:
        path: The run folder.
        plan: How to attack.
        overwrite: Audit again what was audited with the same settings.
        observer: Is told how it goes.

    Raises:
        FedPEATError: One clear line where the folder or the data do not fit.
    """
    observer = observer or Silent()
    config = _config(path)
    require_accountant()
    target = path / "privacy_audit.json"
    earlier = None if overwrite else _earlier(target, plan)
    if earlier is not None:
        observer.message(f"{target} is there already, with these settings")
        return earlier
    start = time.perf_counter()
    bench = set_up(config, RunFolder(path), observer, None, pools_data=False)
    result = {
        "schema": 1,
        "model": config.model.name,
        "method": config.method,
        "settings": asdict(plan),
        **_audited(bench, path, plan, observer),
    }
    result |= {"wall_seconds": time.perf_counter() - start, "versions": versions()}
    result["verdicts"] = privacy_verdicts(result)
    write_atomically(target, json.dumps(json.loads(clean_json(result)), indent=1) + "\n")
    write_report(path)
    return result


def _config(path: Path) -> Config:
    if not (path / "config.yaml").exists():
        got = "none" if path.is_dir() else "no such folder"
        raise ConfigError(f"{path} must be a run folder with a config.yaml, got {got}")
    config = load_config(path / "config.yaml")
    config = METHODS[config.method].settings(config)
    if config.method in {"centralized", "zero_shot"}:
        raise ConfigError(f"{path}: method {config.method} has no devices whose updates are sent")
    if config.model.task != "causal_lm":
        raise ConfigError(
            f"{path}: only updates of language models can be audited; model.task must be "
            f"causal_lm, got {config.model.task}"
        )
    return config


def _earlier(path: Path, plan: PrivacyAuditPlan) -> dict[str, Any] | None:
    """Return an earlier audit with the same settings."""
    try:
        earlier: dict[str, Any] = json.loads(path.read_text())
        same = earlier["settings"] == json.loads(clean_json(asdict(plan)))
    except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        return None
    return earlier if same else None


def _audited(
    bench: Bench, path: Path, plan: PrivacyAuditPlan, observer: Observer
) -> dict[str, Any]:
    rung = next(iter(bench.rungs().values()))
    tunable = bench.shelf.get(rung.sha256)
    start = rung.own(bench.server.state())
    names = sorted(bench.data.clients)[: plan.num_devices]
    texts = {name: _text(bench, name) for name in names}
    membership = [
        *_membership_of_updates(tunable, start, texts, bench.config, plan, observer),
        *_membership_of_the_result(bench, path, plan, observer),
    ]
    inversion = _inversion(tunable, start, texts, bench, plan, observer)
    return {
        "num_devices": len(names),
        "recipe": bench.config.emulator.recipe,
        "membership": membership,
        "inversion": inversion,
    }


def _text(bench: Bench, name: str) -> PackedText:
    text = bench.data.clients[name]
    assert isinstance(text, PackedText), "the task is checked"
    return text


def _training(config: Config, plan: PrivacyAuditPlan, num_steps: int) -> Training:
    """Return how devices train, with the run's own noise where it has some."""
    privacy = config.privacy
    return Training(
        settings=local_settings(config),
        num_steps=num_steps,
        example_noise=privacy.example_noise_multiplier or plan.example_noise,
        example_clip_norm=privacy.example_clip_norm,
        client_noise=privacy.client_noise_multiplier or plan.client_noise,
        client_clip_norm=config.federated.clip_norm,
        delta=privacy.delta,
        seed=plan.seed,
    )


# --- membership -----------------------------------------------------------------------------------


def _membership_of_updates(
    tunable: Tunable,
    start: State,
    texts: Mapping[str, PackedText],
    config: Config,
    plan: PrivacyAuditPlan,
    observer: Observer,
) -> list[dict[str, Any]]:
    """Return how well members of updates are told, for each kind of training and each defence."""
    usual = _training(config, plan, config.local.local_steps)
    kinds = {
        "round": (usual, [_usual(name, text) for name, text in texts.items()]),
        "overfit": (
            replace(usual, num_steps=plan.overfit_steps),
            [_with_few_blocks(name, text, plan) for name, text in texts.items()],
        ),
    }
    found = []
    for kind, (training, victims) in kinds.items():
        observer.message(f"membership, {kind}")
        for defence, seen in seen_by_server(tunable, start, victims, training).items():
            scores = _scores(tunable, start, victims, seen, plan, config.evaluation.batch_size)
            epsilons = [s.epsilon for s in seen if s.epsilon is not None]
            found.append(
                {
                    "training": kind,
                    "defence": defence,
                    "epsilon": max(epsilons, default=None),
                    **_told(scores, plan),
                }
            )
    return found


def _usual(name: str, text: PackedText) -> Victim:
    return Victim(name, text, text)


def _with_few_blocks(name: str, text: PackedText, plan: PrivacyAuditPlan) -> Victim:
    """Return a device that has few blocks, drawn from a run's device, and the rest beside."""
    order = generator(plan.seed, "few blocks", name).permutation(text.num_examples)
    few = min(plan.overfit_blocks, text.num_examples // 2)
    if few == 0:
        raise DataError(f"{name} must have at least 2 blocks of text, got {text.num_examples}")
    return Victim(name, _taken(text, order[:few]), _taken(text, order[few:]))


def _taken(text: PackedText, rows: np.ndarray) -> PackedText:
    return PackedText(text.input_ids[rows], text.loss_mask[rows], text.token_bytes[rows])


def _scores(
    tunable: Tunable,
    start: State,
    victims: Sequence[Victim],
    seen: Sequence[Seen],
    plan: PrivacyAuditPlan,
    batch_size: int,
) -> dict[str, Scores]:
    """Return what each attack says of the examples of the devices.

    ``loss``: the lower its loss after the update, the more likely a member (Yeom et al. 2018).
    ``gain``: the more the update lowered it (Watson et al. 2022, calibrated by difficulty). To
    first order this is the product of the example's gradient and the update.
    ``others``: the gain beyond that by the other devices' updates, which are what an update looks
    like without the example (Carlini et al. 2022, offline, with one variance for all).
    """
    own = {v.name: v for v in victims}
    pools = [
        (name, *_pool(own[name], rows, plan, len(victims)))
        for one in seen
        for name, rows in one.members.items()
    ]
    ends = [
        {name: (start[name] + array).astype(np.float32) for name, array in one.update.items()}
        for one in seen
    ]
    before = _losses(tunable, start, pools, batch_size)
    after = [_losses(tunable, end, pools, batch_size) for end in ends]
    scores: dict[str, Scores] = {"loss": ([], []), "gain": ([], [])}
    if len(seen) > 2:
        scores["others"] = ([], [])
    for place in range(len(pools)):
        which = place if len(seen) > 1 else 0  # whose update has the examples in it
        for side in (0, 1):
            gains = np.stack([before[place][side] - end[place][side] for end in after])
            scores["loss"][side].append(-after[which][place][side])
            scores["gain"][side].append(gains[which])
            if len(seen) > 2:
                rest = np.delete(gains, which, axis=0)
                scores["others"][side].append(gains[which] - rest.mean(axis=0))
    return scores


def _pool(
    victim: Victim, rows: np.ndarray, plan: PrivacyAuditPlan, num_devices: int
) -> tuple[PackedText, PackedText]:
    """Return some of a device's members and as many of the others as there may be."""
    each = max(1, plan.num_examples // num_devices)
    rng = generator(plan.seed, "pool", victim.name)
    members = rng.permutation(rows)[:each]
    if victim.others is victim.text:
        outside = np.setdiff1d(np.arange(victim.text.num_examples), rows)
    else:
        outside = np.arange(victim.others.num_examples)
    return _taken(victim.text, members), _taken(victim.others, rng.permutation(outside)[:each])


def _losses(
    tunable: Tunable,
    state: State,
    pools: Sequence[tuple[str, PackedText, PackedText]],
    batch_size: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    tunable.load(state)
    return [
        (_of_all(tunable, members, batch_size), _of_all(tunable, others, batch_size))
        for _, members, others in pools
    ]


def _of_all(tunable: Tunable, text: PackedText, batch_size: int) -> np.ndarray:
    return example_losses(tunable.model, text, np.arange(text.num_examples), batch_size)


def _told(scores: Mapping[str, Scores], plan: PrivacyAuditPlan) -> dict[str, Any]:
    """Return how well each attack tells members from others."""
    attacks: dict[str, Any] = {}
    num_members = num_others = 0
    for name, sides in scores.items():
        members, others = (np.concatenate(side) for side in sides)
        num_members, num_others = len(members), len(others)
        if min(num_members, num_others) == 0:
            raise DataError(
                "the devices must have blocks of text that a round sees and others that it does "
                f"not, got {num_members} and {num_others}; try fewer local steps"
            )
        attacks[name] = asdict(separation(members, others, plan.seed))
    return {"num_members": num_members, "num_others": num_others, "attacks": attacks}


def _membership_of_the_result(
    bench: Bench, path: Path, plan: PrivacyAuditPlan, observer: Observer
) -> list[dict[str, Any]]:
    """Return how well the tuned model, if there is one, tells the devices' text from the test's.

    The two may differ for other reasons, which the gain over the untuned model leaves out in part.
    """
    if not (path / "adapter").exists():
        return []
    observer.message("membership, tuned model")
    fresh = bench.server.state()
    each = max(1, plan.num_examples // len(bench.data.clients))
    members = PackedText.concatenate([_text(bench, n).spread(each) for n in bench.data.clients])
    others = bench.data.test.spread(plan.num_examples)
    assert isinstance(others, PackedText), "the task is checked"
    pools = [("", members, others)]
    size = bench.config.evaluation.batch_size
    before = _losses(bench.server, fresh, pools, size)[0]
    after = _losses(bench.server, read_adapter(path / "adapter"), pools, size)[0]
    bench.server.load(fresh)
    scores: dict[str, Scores] = {
        "loss": ([-after[0]], [-after[1]]),
        "gain": ([before[0] - after[0]], [before[1] - after[1]]),
    }
    return [{"training": "tuned model", "defence": "run", "epsilon": None, **_told(scores, plan)}]


# --- inversion ------------------------------------------------------------------------------------


def _inversion(
    tunable: Tunable,
    start: State,
    texts: Mapping[str, PackedText],
    bench: Bench,
    plan: PrivacyAuditPlan,
    observer: Observer,
) -> list[dict[str, Any]]:
    """Return how much of one text each is read back from the updates of some devices."""
    names = list(texts)[: plan.num_texts]
    length = min(plan.inversion_tokens, bench.config.data.block_size)
    victims, guesses = [], []
    for name in names:
        cut = _cut(_counting(name, texts[name], plan), length)
        victims.append(Victim(name, _taken(cut, np.arange(1)), cut))
        guesses.append(cut.input_ids[-1].tolist())  # another text of the same device
    truth = [victim.text.input_ids[0].tolist() for victim in victims]
    usual = _training(bench.config, plan, bench.config.local.local_steps)
    usual = replace(usual, settings=replace(usual.settings, batch_size=1))
    baseline = _read(guesses, truth, bench)
    found = []
    for kind, training in {"one step": replace(usual, num_steps=1), "round": usual}.items():
        amplification = _AMPLIFICATION if training.num_steps == 1 else 1.0
        inversion = Inversion(length, plan.beam_width, amplification)
        for defence, seen in seen_by_server(tunable, start, victims, training).items():
            observer.message(f"inversion, {kind}, {defence}")
            texts_read = [
                invert(tunable, start, one.update, len(one.members), inversion) for one in seen
            ]
            if len(seen) > 1:
                scores = [
                    _read(t, [true], bench) for t, true in zip(texts_read, truth, strict=True)
                ]
                read = {key: float(np.mean([s[key] for s in scores])) for key in baseline}
            else:
                read = _read(texts_read[0], truth, bench)
            epsilons = [s.epsilon for s in seen if s.epsilon is not None]
            found.append(
                {
                    "training": kind,
                    "defence": defence,
                    "epsilon": max(epsilons, default=None),
                    "num_texts": len(truth),
                    **read,
                    **{f"baseline_{key}": value for key, value in baseline.items()},
                }
            )
    return found


def _counting(name: str, text: PackedText, plan: PrivacyAuditPlan) -> PackedText:
    """Return two blocks of a device in which tokens count, drawn by its name.

    Raises:
        DataError: If it has not two of them.
    """
    order = generator(plan.seed, "text", name).permutation(text.num_examples)
    rows = order[text.loss_mask[order, 1:].any(1)][:2]
    if len(rows) < 2:
        raise DataError(f"{name} must have 2 blocks of text that count in the loss")
    return _taken(text, rows)


def _cut(text: PackedText, length: int) -> PackedText:
    """Return of each block those tokens in a row of which most count; of equal ones the first.

    The first of them does not count: nothing comes before it.
    """
    ends = text.loss_mask.cumsum(1)
    first = (ends[:, length - 1 :] - ends[:, : ends.shape[1] - length + 1]).argmax(1)
    places = first[:, None] + np.arange(length)
    return PackedText(
        np.take_along_axis(text.input_ids, places, 1),
        np.take_along_axis(text.loss_mask, places, 1),
        np.take_along_axis(text.token_bytes, places, 1),
    )


def _read(
    found: Sequence[Sequence[int]], truth: Sequence[Sequence[int]], bench: Bench
) -> dict[str, float]:
    """Return the mean ROUGE of each true text with what is most like it of those found."""
    decode = bench.loaded.processor.decode
    attempts = [words(decode(tokens)) for tokens in found]
    scores = {"rouge_1": rouge_1, "rouge_l": rouge_l}
    return {
        name: float(
            np.mean([max(score(a, words(decode(true))) for a in attempts) for true in truth])
        )
        for name, score in scores.items()
    }
