"""Who took part when: a row per participant, a mark per round, by shape and colour.

Where devices hold different rungs, an accepted update is a bar: the larger the rung, the higher and
the stronger in colour.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from fedpeat.report.markup import Html, element, join
from fedpeat.report.quantities import bytes_text, count_text, number_text, seconds_text
from fedpeat.report.records import STATUSES, UNITS, Participation, RoundRecord, RunData
from fedpeat.report.rungs import by_size, rungs_of, rungs_table, shade_of

__all__ = ["natural_order", "participation_section", "status_mark"]

_NOT_DRAWN = "not drawn"
_MOST_ROWS = 128
_MOST_ROUNDS = 400
_MOST_REASONS = 40
_MOST_NAME = 60
_MOST_RUNGS = 12
_MOST_ASIDE = 8
_MANY_ROWS = 24
"""From so many participants on, rows are low."""
_WIDEST, _WIDEST_OF_MANY, _NARROWEST, _ROOM = 22.0, 15.0, 9.0, 680.0

Key = tuple[str, str]


def participation_section(run: RunData) -> Html:
    """Return the grid with its legend, what went wrong and why, and a table per participant."""
    rounds = run.tuning_rounds
    by_key = _by_participant(rounds)
    if not by_key:
        return element("p", "No round with participants has been recorded.", class_="empty")
    counts = Counter(item.status for record in rounds for item in record.participants)
    keys = sorted(by_key, key=natural_order)
    shown, columns = keys[:_MOST_ROWS], rounds[-_MOST_ROUNDS:]
    rungs = by_size(rungs_of(item for record in rounds for item in record.participants))
    return join(
        [
            _legend(
                counts,
                is_anyone_left_out=sum(counts.values()) < len(keys) * len(rounds),
                is_plain=len(rungs) > 1,
            ),
            _rungs_legend(rungs),
            _cut_note(len(keys), len(rounds)),
            element(
                "div",
                _grid(shown, columns, by_key, rungs),
                class_="scroll",
                tabindex=0,
                role="region",
                aria_label="Who took part when",
            ),
            _set_aside(rounds),
            _reasons(rounds),
            rungs_table(rounds),
            element(
                "details",
                element("summary", "Totals per participant"),
                _totals(shown, by_key, UNITS[run.metric]),
            ),
        ]
    )


def _by_participant(rounds: Iterable[RoundRecord]) -> dict[Key, dict[int, Participation]]:
    table: dict[Key, dict[int, Participation]] = {}
    for record in rounds:
        for item in record.participants:
            table.setdefault(item.key, {})[record.server_round] = item
    return table


def natural_order(key: Key) -> tuple[bool, list[tuple[int, str]]]:
    """The server first, then by name with numbers in their own order: device 2 before device 10."""
    pieces = re.split(r"([0-9]{1,12})", key[1].casefold())
    return (
        key[0] != "server",
        [(int(piece) if index % 2 else 0, piece) for index, piece in enumerate(pieces)],
    )


def _name(key: Key) -> str:
    return key[1] if len(key[1]) <= _MOST_NAME else key[1][: _MOST_NAME - 3] + "..."


def _heading(key: Key) -> Html:
    badge = element("span", "server", class_="badge") if key[0] == "server" else ""
    return element(
        "th", element("span", _name(key) or "(no name)", class_="name"), badge, scope="row"
    )


def _set_aside(rounds: Sequence[RoundRecord]) -> Html:
    """Return who takes part no more, or nothing."""
    names = rounds[-1].set_aside
    if not names:
        return Html()
    more = f" and {len(names) - _MOST_ASIDE:,} more" if len(names) > _MOST_ASIDE else ""
    shown = ", ".join(_name(("", name)) for name in names[:_MOST_ASIDE])
    return element("p", f"Set aside after too many rejected updates: {shown}{more}.", class_="note")


def _cut_note(num_participants: int, num_rounds: int) -> Html:
    parts = []
    if num_participants > _MOST_ROWS:
        parts.append(f"the first {_MOST_ROWS} of {num_participants:,} participants")
    if num_rounds > _MOST_ROUNDS:
        parts.append(f"the last {_MOST_ROUNDS} of {num_rounds:,} rounds")
    return (
        element("p", f"Shown: {' and '.join(parts)}; metrics.jsonl has them all.", class_="note")
        if parts
        else Html()
    )


def _legend(counts: Counter[str], *, is_anyone_left_out: bool, is_plain: bool) -> Html:
    entries = [(status, f"{status} {counts[status]:,}") for status in STATUSES if counts[status]]
    if is_anyone_left_out:
        entries.append((_NOT_DRAWN, _NOT_DRAWN))
    items = [
        element(
            "li",
            element(
                "svg",
                status_mark(status, 0.0, 14.0, is_plain=is_plain),
                width=14,
                height=14,
                aria_hidden="true",
            ),
            label,
        )
        for status, label in entries
    ]
    return element("ul", *items, class_="legend")


def _rungs_legend(rungs: Sequence[str]) -> Html:
    """Return the bars of rungs, or nothing where all devices hold the same."""
    if len(rungs) < 2:
        return Html()
    items = [
        element(
            "li",
            element("svg", _bar(rung, rungs, 0.0, 14.0), width=14, height=14, aria_hidden="true"),
            f"on rung {_name(('', rung))}",
        )
        for rung in rungs[:_MOST_RUNGS]
    ]
    if len(rungs) > _MOST_RUNGS:
        items.append(element("li", f"and {len(rungs) - _MOST_RUNGS:,} more rungs"))
    return element("ul", *items, class_="legend")


def _grid(
    keys: Sequence[Key],
    rounds: Sequence[RoundRecord],
    by_key: dict[Key, dict[int, Participation]],
    rungs: Sequence[str],
) -> Html:
    widest = _WIDEST if len(keys) < _MANY_ROWS else _WIDEST_OF_MANY
    size = min(widest, max(_NARROWEST, _ROOM / len(rounds) // 1))
    head = element(
        "tr",
        element("th", "Participant", scope="col"),
        element("th", "Accepted", scope="col", class_="n"),
        element("th", _round_labels(rounds, size), scope="col"),
    )
    rows = [_row(key, by_key[key], rounds, size, rungs) for key in keys]
    style = "who many" if len(keys) >= _MANY_ROWS else "who"
    return element("table", element("thead", head), element("tbody", *rows), class_=style)


def _round_labels(rounds: Sequence[RoundRecord], size: float) -> Html:
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * size >= 26 or step == 100)
    labels = [
        element("text", record.server_round, x=(index + 0.5) * size, y=12, class_="x")
        for index, record in enumerate(rounds)
        if record.server_round % every == 0
        or (record.server_round == 1 and every > 2)
        or len(rounds) == 1
    ]
    return _strip(labels, len(rounds), size, 16.0, "Round")


def _strip(parts: Iterable[Html], num_rounds: int, size: float, height: float, label: str) -> Html:
    # room for a label that is wider than its column
    width = max(num_rounds * size, 22.0)
    return element(
        "svg",
        *parts,
        width=width,
        height=height,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
    )


def _row(
    key: Key,
    items: dict[int, Participation],
    rounds: Sequence[RoundRecord],
    size: float,
    rungs: Sequence[str],
) -> Html:
    marks = [
        _round_mark(record.server_round, items.get(record.server_round), index * size, size, rungs)
        for index, record in enumerate(rounds)
    ]
    accepted = sum(item.status == "accepted" for item in items.values())
    label = f"{_name(key)}: accepted in {accepted} of {len(items)} rounds drawn"
    return element(
        "tr",
        _heading(key),
        element("td", f"{accepted} of {len(items)}", class_="n"),
        element("td", _strip(marks, len(rounds), size, size, label)),
    )


def _round_mark(
    server_round: int, item: Participation | None, x: float, size: float, rungs: Sequence[str]
) -> Html:
    status = item.status if item else _NOT_DRAWN
    title = element("title", f"round {server_round}: {status}{_told(item)}")
    if item and status == "accepted" and item.rung and len(rungs) > 1:
        return _bar(item.rung, rungs, x, size, title)
    return status_mark(status, x, size, title, is_plain=len(rungs) > 1)


def _bar(rung: str, rungs: Sequence[str], x: float, size: float, *title: Html) -> Html:
    """Return an accepted update on a rung: as wide as any, and as high as the rung is large."""
    place, side = rungs.index(rung), size * 0.68
    height = side * (1 - 0.6 * place / (len(rungs) - 1))
    left, base = x + (size - side) / 2, (size + side) / 2
    return element(
        "path",
        *title,
        d=f"M{left:.1f} {base:.1f}v{-height:.1f}h{side:.1f}v{height:.1f}z",
        class_=f"s-accepted {shade_of(place, len(rungs))}",
    )


def _told(item: Participation | None) -> str:
    if item is None:
        return ""
    parts = [f"rung {item.rung}"] if item.rung else []
    parts += [_short(item.reason)] if item.reason else []
    if item.status == "accepted" and item.num_examples == 0:
        parts.append("hidden in the sum of devices")
    elif item.status == "accepted" and item.weight is not None:
        parts.append(f"weight {number_text(item.weight, 3)}")
    if item.first_loss is not None and item.last_loss is not None:
        parts.append(f"loss {number_text(item.first_loss, 3)} to {number_text(item.last_loss, 3)}")
    if item.seconds is not None:
        parts.append(seconds_text(item.seconds))
    return "".join(f", {part}" for part in parts)


def status_mark(status: str, x: float, size: float, *title: Html, is_plain: bool = False) -> Html:
    """Return the shape of a status, in a square of so many pixels.

    Where colours tell rungs, an accepted update without one is plain.
    """
    plain = " r-none" if is_plain and status == "accepted" else ""
    return element(
        "path",
        *title,
        d=_outline(status, x + size / 2, size / 2, size * 0.34),
        class_=_style(status) + plain,
    )


def _style(status: str) -> str:
    return "s-none" if status == _NOT_DRAWN else f"s-{status}"


def _outline(status: str, x: float, y: float, r: float) -> str:
    d = 2 * r
    if status == "accepted":
        return f"M{x - r:.1f} {y - r:.1f}h{d:.1f}v{d:.1f}h{-d:.1f}z"
    if status == "rejected":
        return f"M{x - r:.1f} {y - r:.1f}l{d:.1f} {d:.1f}m0 {-d:.1f}l{-d:.1f} {d:.1f}"
    if status == "failed":
        return f"M{x:.1f} {y - r:.1f}l{r:.1f} {d:.1f}h{-d:.1f}z"
    if status == "late":
        return f"M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f}l{-r:.1f} {r:.1f}l{-r:.1f} {-r:.1f}z"
    return _circle(x, y, r if status == "dropped" else r * 0.3)


def _circle(x: float, y: float, r: float) -> str:
    half = f"a{r:.1f} {r:.1f} 0 1 0"
    return f"M{x - r:.1f} {y:.1f}{half} {2 * r:.1f} 0{half} {-2 * r:.1f} 0z"


def _short(reason: str) -> str:
    return reason if len(reason) <= 120 else reason[:117] + "..."


def _reasons(rounds: Sequence[RoundRecord]) -> Html:
    """Return why updates did not count, the most frequent reason first."""
    lost = [
        (item.status, _short(item.reason) or "no reason given", item.client_id, record.server_round)
        for record in rounds
        for item in record.participants
        if item.status != "accepted"
    ]
    if not lost:
        return Html()
    counts = Counter((status, reason) for status, reason, _, _ in lost)
    firsts = {(status, reason): (name, number) for status, reason, name, number in reversed(lost)}
    rows = [
        element(
            "tr",
            element(
                "td",
                element(
                    "svg", status_mark(status, 0.0, 14.0), width=14, height=14, aria_hidden="true"
                ),
                " ",
                status,
            ),
            element("td", reason),
            element("td", f"{count:,}", class_="n"),
            element(
                "td", f"{_name(('', firsts[status, reason][0]))}, round {firsts[status, reason][1]}"
            ),
        )
        for (status, reason), count in counts.most_common(_MOST_REASONS)
    ]
    head = _head("Status", "Why it did not count", "#Times", "First")
    caption = element("caption", f"{len(lost):,} updates did not count")
    return element(
        "div", element("table", caption, head, element("tbody", *rows)), class_="scroll reasons"
    )


def _head(*names: str) -> Html:
    """Return a table's head; a name that begins with # heads a column of numbers."""
    cells = [
        element(
            "th", name.removeprefix("#"), scope="col", class_="n" if name.startswith("#") else None
        )
        for name in names
    ]
    return element("thead", element("tr", *cells))


def _totals(keys: Sequence[Key], by_key: dict[Key, dict[int, Participation]], unit: str) -> Html:
    rows = [element("tr", _heading(key), *_total_cells(list(by_key[key].values()))) for key in keys]
    head = _head(
        "Participant",
        "Rung",
        "#Drawn",
        "#Accepted",
        "#Own examples",
        f"#{unit.capitalize()} seen",
        "#First loss",
        "#Last loss",
        "#Down",
        "#Up",
        "#Time",
    )
    return element(
        "div", element("table", head, element("tbody", *rows)), class_="scroll", tabindex=0
    )


def _total_cells(items: Sequence[Participation]) -> Iterator[Html]:
    accepted = [item for item in items if item.status == "accepted"]
    texts = (
        f"{len(items):,}",
        f"{len(accepted):,}",
        count_text(items[-1].num_examples),
        count_text(_sum(item.num_tokens for item in items)),
        number_text(accepted[0].first_loss if accepted else None, 3),
        number_text(accepted[-1].last_loss if accepted else None, 3),
        bytes_text(_sum(item.bytes_down for item in items)),
        bytes_text(_sum(item.bytes_up for item in items)),
        seconds_text(_sum(item.seconds for item in items)),
    )
    yield element("td", _short(", ".join(rungs_of(items))))
    yield from (element("td", text, class_="n") for text in texts)


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
