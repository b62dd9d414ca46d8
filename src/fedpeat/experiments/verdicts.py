"""What an audit's numbers mean, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeat.config.schema import AuditPlan

__all__ = ["privacy_verdicts", "verdicts"]

_RECOVERED = (
    (0.9, "the emulator gives nearly all of the model's ability away"),
    (0.5, "the emulator gives most of the model's ability away"),
    (0.1, "the emulator gives part of the model's ability away"),
    (-float("inf"), "this attacker gains little from the emulator"),
)
_DEFENCES = {
    "none": "no defence",
    "example_level": "noise on the device",
    "secure_aggregation": "only the sum is seen",
    "client_level": "clipped sum with noise",
    "run": "as the run made it",
}
_NAMES = {"fine_tune": "fine-tuning the emulator", "reinsert": "re-inserting the missing blocks"}


def verdicts(record: Mapping[str, Any], plan: AuditPlan) -> list[str]:
    """Return what an emulator gives away, one sentence each, from its entry in audit.json."""
    verbatim, capability = record["verbatim"], record["capability"]
    return [
        f"{_percent(verbatim['equal_ratio'])} of the full model's parameters are in the emulator "
        f"bit for bit, {_percent(verbatim['near_ratio'])} up to a relative distance of "
        f"{verbatim['near_distance']:g}.",
        f"Untouched, the emulator covers {_percent(capability['leaked_ratio'])} of the way from a "
        "random network to the full model (log perplexity).",
        _attacked(record, plan),
    ]


def _attacked(record: Mapping[str, Any], plan: AuditPlan) -> str:
    recovered, attacks = record["recovered_ratio"], record["attacks"]
    if recovered is None:
        return (
            "Text alone trains a network as good as the full model, or a quality is not finite: "
            "what an attack recovers cannot be told."
        )
    attack = next(n for n in _NAMES if attacks[n] and attacks[n]["recovered_ratio"] == recovered)
    best = attacks[attack]
    num_tokens = best["curve"][-1]["num_tokens"]
    meaning = next(text for least, text in _RECOVERED if recovered >= least)
    return (
        f"With up to {num_tokens:,} tokens of public text ({plan.public_text}), {_NAMES[attack]} "
        f"reaches perplexity {best['perplexity']:.2f}, against "
        f"{attacks['from_scratch']['perplexity']:.2f} from scratch and "
        f"{record['capability']['full']:.2f} of the full model: {_percent(recovered)} of the way "
        f"is recovered, {_regained(best['regained_ratio'])}; {meaning}."
    )


def _regained(ratio: float | None) -> str:
    if ratio is None:
        return "where compression had taken next to nothing"
    return f"and {_percent(ratio)} of what compression had taken"


def _percent(ratio: float | None) -> str:
    return "an unknown share" if ratio is None else f"{100 * ratio:.0f} %"


def privacy_verdicts(result: Mapping[str, Any]) -> list[str]:
    """Return what updates give away, one sentence each, from privacy_audit.json."""
    lines = []
    for item in result["membership"]:
        name, best = max(item["attacks"].items(), key=lambda pair: pair[1]["auc"])
        lines.append(
            f"Membership, {item['training']}, {_DEFENCES[item['defence']]}: AUC {best['auc']:.2f} "
            f"[{best['low']:.2f}, {best['high']:.2f}] by {name}, {_percent(best['tpr'])} found at "
            f"1 % of false alarms{_promised(item['epsilon'])}."
        )
    lines += [
        f"Inversion, {item['training']}, {_DEFENCES[item['defence']]}: ROUGE-1 "
        f"{item['rouge_1']:.2f}, ROUGE-L {item['rouge_l']:.2f}, where another text of the same "
        f"device has {item['baseline_rouge_1']:.2f} and {item['baseline_rouge_l']:.2f}"
        f"{_promised(item['epsilon'])}."
        for item in result["inversion"]
    ]
    return lines


def _promised(epsilon: float | None) -> str:
    return "" if epsilon is None else f" (epsilon {epsilon:.3g} for this round)"
