"""What stands below the first screen: facts, rounds, configuration, versions, glossary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from fedpeat.report.markup import Html, element, join
from fedpeat.report.overview import cost_of
from fedpeat.report.quantities import (
    bytes_text,
    count_text,
    joules_text,
    number_text,
    quality_text,
    ratio_text,
    seconds_text,
)
from fedpeat.report.records import UNITS, PrivacyFacts, RoundRecord, RunData, Summary

__all__ = [
    "config_section",
    "facts_section",
    "glossary_section",
    "rounds_section",
    "versions_section",
]

_GLOSSARY: Final = (
    ("Full model", "The model that the server owns and tunes for."),
    ("Adapter", "The small part that is tuned; it is all that travels up."),
    (
        "Emulator",
        "A compact stand-in for the frozen rest of the model, which devices hold instead of it.",
    ),
    ("Plug-in", "The tuned adapter put back into the full model."),
    ("Zero-shot", "Before any tuning."),
    (
        "Participant",
        "A device, or the server itself, which tunes the same adapter on its own data "
        "with the full model.",
    ),
    (
        "Round",
        "Participants tune the adapter on their own data; the server averages what they send back.",
    ),
    (
        "Gap closed",
        "Share of the distance from full zero-shot to full tuned that plug-in covers "
        "(in log perplexity, or in accuracy).",
    ),
    (
        "Perplexity",
        "How many tokens the model hesitates between, on average; lower is better. "
        "Comparable only between models with the same tokens.",
    ),
    (
        "Bits per byte",
        "The same, counted per byte of text, so that models with other tokens compare; "
        "lower is better.",
    ),
    ("Accuracy", "Share of examples whose class got the highest score; higher is better."),
    (
        "Cross-entropy",
        "Mean negative logarithm of the probability that the right class got [nat]; lower is "
        "better.",
    ),
    (
        "Gradient cosine",
        "How alike the adapter's gradients are on emulator and full model, 1 for the same "
        "direction: what a device learns on the one is then right for the other.",
    ),
    (
        "Epsilon",
        "How much better anybody can tell from the adapters whether a device, or one example of a "
        "device, took part: the smaller, the less; it fails with a chance of delta.",
    ),
    ("Update norm", "How far one round moved the adapter (Euclidean distance)."),
    (
        "Product error",
        "How far the product of LoRA's averaged factors is from the average of their products, "
        "as a share of the latter (Frobenius norms); 0 where one factor is frozen. With "
        "aggregation by SVD, what averaging the factors would have cost.",
    ),
    (
        "Accepted, rejected",
        "The update counted, or the server refused it (not finite, too large, malformed).",
    ),
    (
        "Dropped, late, failed",
        "The participant vanished, answered after the deadline, or reported an error.",
    ),
)

_FIDELITY: Final[tuple[tuple[str, str, Callable[[float | None], str]], ...]] = (
    ("hidden_relative_error", "Hidden states, relative error", ratio_text),
    ("hidden_cosine", "Hidden states, cosine", number_text),
    ("logit_kl", "Predictions, KL [nat]", number_text),
    ("top1_agreement", "Same first guess", ratio_text),
    ("gradient_cosine_tuned", "Gradient cosine, after some steps", number_text),
    ("gradient_cosine", "Gradient cosine, at the start", number_text),
)


def facts_section(run: RunData) -> Html:
    """Return the facts of the emulator, the adapter and the cost, side by side."""
    groups = [element("h3", "Cost"), _facts(_cost_facts(run))]
    if run.summary is None:
        return element("div", element("div", *groups), class_="groups")
    summary = run.summary
    return element(
        "div",
        element("div", element("h3", "Emulator"), _emulator(summary)),
        element("div", element("h3", "Adapter"), _adapter(summary)),
        element("div", *groups),
        element("div", element("h3", "Privacy"), _facts(_promises(summary.privacy)))
        if summary.privacy
        else "",
        class_="groups",
    )


def _facts(pairs: Iterable[tuple[str, str]]) -> Html:
    rows = [element("div", element("dt", name), element("dd", value)) for name, value in pairs]
    return element("dl", *rows, class_="facts")


def _emulator(summary: Summary) -> Html:
    emulator = summary.emulator
    if emulator is None:
        return element("p", "None: this method has no emulator.", class_="empty")
    return _facts(
        [
            ("Recipe", emulator.recipe or "not recorded"),
            ("Parameters", count_text(emulator.num_parameters)),
            (
                "Share of the full model",
                ratio_text(_share(emulator.num_parameters, summary.num_parameters)),
            ),
            ("Size", bytes_text(emulator.num_bytes)),
            *_fidelity(emulator.fidelity),
        ]
    )


def _fidelity(measured: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """Return how closely the emulator follows the full model, what was measured of it."""
    facts = [
        (label, wording(measured[name]))
        for name, label, wording in _FIDELITY
        if measured.get(name) is not None
    ]
    prefix = "gradient_cosine_block_"
    by_block = [
        f"{name.removeprefix(prefix)}: {number_text(value, 2)}"
        for name, value in measured.items()
        if name.startswith(prefix)
    ]
    return [*facts, *([("Of it, by block", ", ".join(by_block))] if by_block else [])]


def _adapter(summary: Summary) -> Html:
    adapter = summary.adapter
    if adapter is None:
        return element("p", "None: nothing was tuned.", class_="empty")
    return _facts(
        [
            ("Method", adapter.peft or "not recorded"),
            ("Parameters", count_text(adapter.num_parameters)),
            (
                "Share of the full model",
                ratio_text(_share(adapter.num_parameters, summary.num_parameters)),
            ),
            ("Size", bytes_text(adapter.num_bytes)),
        ]
    )


def _promises(privacy: PrivacyFacts) -> list[tuple[str, str]]:
    """Return what was promised to each kind of unit, and where the noise came from."""
    pairs = []
    for promise in privacy.promises:
        noise = promise.noise_multiplier
        told = "by device" if noise is None else number_text(noise, 3)
        pairs += [
            (f"Epsilon of a {promise.unit}", number_text(promise.epsilon, 3)),
            ("Noise multiplier", told),
            ("Clipped to", number_text(promise.clip_norm, 3)),
        ]
        if promise.sample_rate is not None:
            drawn = promise.sample_rate < 1
            rate = f"with chance {number_text(promise.sample_rate, 3)}" if drawn else "no"
            pairs.append(("Drawn in secret", rate))
    origin = "a secret key" if privacy.is_secret else "the run's seed: for experiments alone"
    return [*pairs, ("Delta", number_text(privacy.delta, 2)), ("Noise from", origin)]


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _cost_facts(run: RunData) -> list[tuple[str, str]]:
    cost = cost_of(run)
    pairs = [
        ("Sent to devices", bytes_text(cost.bytes_down)),
        ("Sent by devices", bytes_text(cost.bytes_up)),
        ("Wall time", seconds_text(cost.wall_seconds)),
        ("Peak memory", bytes_text(cost.peak_rss_bytes)),
        (f"{UNITS[run.metric].capitalize()} per second", count_text(cost.tokens_per_second)),
    ]
    if cost.simulated_seconds is not None:
        pairs.append(("Simulated time", seconds_text(cost.simulated_seconds)))
    if cost.simulated_joules is not None:
        pairs.append(("Simulated energy", joules_text(cost.simulated_joules)))
    if cost.simulated_bytes is not None:
        pairs.append(("Simulated bytes", bytes_text(cost.simulated_bytes)))
    return pairs


def rounds_section(run: RunData) -> Html:
    """Return the collapsible table of all rounds."""
    if not run.rounds:
        return element("p", "No round has been recorded.", class_="empty")
    names = [
        "Round",
        f"Plug-in {run.metric}",
        "Train loss",
        "Update norm",
        "Product error",
        "Accepted",
        UNITS[run.metric].capitalize(),
        "Down",
        "Up",
        "Time",
    ]
    head = [
        element("th", name, scope="col", class_="n") for name in [*names, "Elapsed", "Peak memory"]
    ]
    rows = [_round_row(record, run.metric) for record in run.rounds]
    table = element("table", element("thead", element("tr", *head)), element("tbody", *rows))
    return element(
        "details",
        element("summary", f"All {len(run.rounds):,} lines, one per round"),
        element(
            "div", table, class_="scroll tall", tabindex=0, role="region", aria_label="All rounds"
        ),
    )


def _round_row(record: RoundRecord, metric: str) -> Html:
    accepted = sum(item.status == "accepted" for item in record.participants)
    is_tuning = record.server_round > 0
    texts = (
        quality_text(record.plug_in, metric) if record.is_evaluated else "-",
        number_text(record.train_loss) if is_tuning else "-",
        number_text(record.update_norm, 3) if is_tuning else "-",
        number_text(record.product_error, 3) if record.product_error is not None else "-",
        f"{accepted} of {len(record.participants)}" if is_tuning else "-",
        *(
            count_text(record.num_tokens),
            bytes_text(record.bytes_down),
            bytes_text(record.bytes_up),
        ),
        *(
            seconds_text(record.seconds),
            seconds_text(record.elapsed_seconds),
            bytes_text(record.peak_rss_bytes),
        ),
    )
    cells = [element("td", text, class_="n") for text in texts]
    return element("tr", element("th", record.server_round, scope="row", class_="n"), *cells)


def config_section(run: RunData) -> Html:
    """Return the collapsible text of config.yaml."""
    if not run.config_text or not run.config_text.strip():
        return element("p", "config.yaml is not recorded.", class_="empty")
    text = element("pre", run.config_text.strip("\n"), tabindex=0)
    return element(
        "details", element("summary", "config.yaml, every setting as it was resolved"), text
    )


def versions_section(run: RunData) -> Html:
    """Return the versions that made the run."""
    versions = run.summary.versions if run.summary else {}
    if not versions:
        return element("p", "Versions are not recorded.", class_="empty")
    return element(
        "dl",
        *[element("div", element("dt", k), element("dd", v)) for k, v in versions.items()],
        class_="facts columns",
    )


def glossary_section() -> Html:
    """Return the words of the report."""
    return element(
        "dl",
        join(
            element("div", element("dt", word), element("dd", meaning))
            for word, meaning in _GLOSSARY
        ),
        class_="glossary",
    )
