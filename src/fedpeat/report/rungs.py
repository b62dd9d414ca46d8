"""What each rung of a ladder did and cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fedpeat.report.markup import Html, element
from fedpeat.report.quantities import bytes_text
from fedpeat.report.records import Participation, RoundRecord

__all__ = ["NUM_SHADES", "by_size", "rungs_of", "rungs_table", "shade_of"]

NUM_SHADES = 4
"""Shades of rungs in the style, the strongest first."""

_HEADS = ("Devices", "Updates", "Accepted", "Down", "of that emulators", "Up")


def rungs_of(items: Iterable[Participation]) -> list[str]:
    """Return the rungs that somebody held, each once, in the order of the rounds."""
    return list(dict.fromkeys(item.rung for item in items if item.rung))


def by_size(rungs: Iterable[str]) -> list[str]:
    """Return rungs named by the share of blocks that they keep, the largest first.

    Names that are no numbers stay in their order, behind.
    """
    return sorted(rungs, key=lambda rung: -_share(rung))


def _share(rung: str) -> float:
    try:
        share = float(rung)
    except ValueError:
        return -math.inf
    return share if math.isfinite(share) else -math.inf


def shade_of(place: int, count: int) -> str:
    """Return the class of a shade, the strongest for place 0 of so many."""
    return f"r-{place if count <= NUM_SHADES else place * NUM_SHADES // count}"


def rungs_table(rounds: Sequence[RoundRecord]) -> Html:
    """Return a row for each rung, or nothing where all devices hold the same."""
    items = [item for record in rounds for item in record.participants]
    rungs = rungs_of(items)
    if len(rungs) < 2:
        return Html()
    rows = [_row(rung, [item for item in items if item.rung == rung]) for rung in rungs]
    heads = [element("th", text, scope="col", class_="n") for text in _HEADS]
    head = element("thead", element("tr", element("th", "Rung", scope="col"), *heads))
    caption = element("caption", f"{len(rungs)} rungs: the share of blocks that an emulator keeps")
    return element(
        "div", element("table", caption, head, element("tbody", *rows)), class_="scroll", tabindex=0
    )


def _row(rung: str, items: Sequence[Participation]) -> Html:
    texts = (
        f"{len({item.key for item in items}):,}",
        f"{len(items):,}",
        f"{sum(item.status == 'accepted' for item in items):,}",
        *(
            bytes_text(sum(getattr(item, name) or 0 for item in items))
            for name in ("bytes_down", "bytes_emulator", "bytes_up")
        ),
    )
    cells = [element("td", text, class_="n") for text in texts]
    return element("tr", element("th", rung, scope="row"), *cells)
