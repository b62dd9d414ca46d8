"""The report of a run as one self-contained HTML file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

from fedpeat.core.errors import StorageError
from fedpeat.report.audit import audit_lead, audit_section
from fedpeat.report.curves import curves_section
from fedpeat.report.details import (
    config_section,
    facts_section,
    glossary_section,
    rounds_section,
    versions_section,
)
from fedpeat.report.habits import habits_section
from fedpeat.report.headline import headline, remarks
from fedpeat.report.load import load_run
from fedpeat.report.markup import Html, element, join, literal
from fedpeat.report.overview import checks_section, key_figures, qualities_section
from fedpeat.report.participation import participation_section
from fedpeat.report.privacy_audit import privacy_audit_lead, privacy_audit_section
from fedpeat.report.quantities import count_text, seed_text
from fedpeat.report.records import RunData
from fedpeat.report.simulated import has_simulated, simulated_lead, simulated_section
from fedpeat.report.style import STYLE
from fedpeat.report.training import training_section

__all__ = ["document", "render_report", "section", "write_page", "write_report"]

# the page loads nothing and runs nothing, whatever a file of the run contains
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_TRAINED = (
    "In the simulated world, before this run. While it is trained, a policy still tries things "
    "out; the controllers are then compared by their means over simulated runs, with 95 % "
    "intervals."
)
_LEARNT = (
    "Mean probabilities of the policy in simulated runs, over bins of as many devices each. Rung "
    "and local steps count only for a device that takes part."
)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all.

    Args:
        run_dir: The run folder, ``runs/NAME``; the run may still be going on.

    Returns:
        Path of the report.

    Raises:
        DataError: If it is no run folder or a file in it is damaged.
        StorageError: If the report cannot be written.
    """
    run_dir = Path(run_dir)
    return write_page(run_dir / "report.html", render_report(load_run(run_dir)))


def write_page(path: Path, page: str) -> Path:
    """Write a page by replacing the file in one step, so that a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def render_report(run: RunData) -> str:
    """Return the report of a run as an HTML page that needs no other file."""
    sections = (
        section(
            "Quality",
            _quality_lead(run),
            element("div", qualities_section(run), class_="qualities"),
        ),
        section(
            "Is the emulator a good one?",
            "A good one helps tuning without giving the model away.",
            checks_section(run),
        ),
        section(
            "Progress",
            "Quality of the plug-in on the validation split, against what it cost.",
            curves_section(run),
        ),
        *(
            [
                section(
                    "What the emulator gives away", audit_lead(run.audit), audit_section(run.audit)
                )
            ]
            if run.audit
            else []
        ),
        *(
            [
                section(
                    "What updates give away",
                    privacy_audit_lead(run.privacy_audit),
                    privacy_audit_section(run.privacy_audit),
                )
            ]
            if run.privacy_audit
            else []
        ),
        section("Who took part when", "", participation_section(run)),
        *_simulated_sections(run),
        section("Sizes and cost", "", facts_section(run)),
        section("Rounds", "", rounds_section(run)),
        section("Configuration", "", config_section(run)),
        section("Versions", "", versions_section(run)),
        section("Glossary", "", glossary_section()),
    )
    notes = remarks(run)
    callout = element(
        "ul",
        *[element("li", note) for note in notes],
        class_="remarks single" if len(notes) == 1 else "remarks",
    )
    return document(
        f"{run.name} - fedpeat",
        join([_header(run), callout if notes else "", key_figures(run), *sections]),
    )


def section(title: str, lead: str, content: Html) -> Html:
    """Return a section with its heading and a line on what it shows."""
    return element(
        "section", element("h2", title), element("p", lead, class_="lead") if lead else "", content
    )


def document(title: str, content: Html) -> str:
    """Return a whole page around some content."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("title", title),
        element("style", literal(STYLE)),
    )
    footer = element(
        "footer", "Made by fedpeat from the files of the run folder; needs no network."
    )
    body = element("body", element("main", content, footer))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _simulated_sections(run: RunData) -> Iterator[Html]:
    """Yield what is only there in a simulated world, and where a controller was trained in it."""
    if has_simulated(run):
        title = "What it cost in the simulated world"
        yield section(title, simulated_lead(run), simulated_section(run))
    if run.trained:
        yield section("How the controllers were trained", _TRAINED, training_section(run.trained))
        if run.trained.habits:
            habits = habits_section(run.trained.habits)
            yield section("What the policy has learnt", _LEARNT, habits)


def _quality_lead(run: RunData) -> str:
    if run.summary is None:
        return "So far, on the validation split."
    return "Five measurements on the test split, which nobody trained on."


def _header(run: RunData) -> Html:
    return element(
        "header",
        element("p", "fedpeat report, run ", element("b", run.name), class_="over"),
        element("h1", headline(run).replace(" %", "\u00a0%")),
        element("p", _meta(run), class_="meta"),
    )


def _meta(run: RunData) -> str:
    summary = run.summary
    if summary is None:
        return f"{len(run.tuning_rounds):,} rounds recorded so far, no summary.json yet."
    parts = [
        f"model {summary.model or 'not recorded'}",
        f"{count_text(summary.num_parameters)} parameters",
        f"method {summary.method or 'not recorded'}",
        _counted(summary.num_rounds, "round"),
        _counted(summary.num_clients, "device"),
        f"seed {seed_text(summary.seed)}",
    ]
    if summary.best_round is not None and math.isfinite(summary.best_round):
        parts.append(
            f"adapter of round {summary.best_round:,.0f}, the best on the validation split"
        )
    return " \u00b7 ".join(parts)


def _counted(count: float | None, noun: str) -> str:
    return f"{count_text(count)} {noun}{'' if count == 1 else 's'}"
