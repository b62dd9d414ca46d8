"""What a person sees of a run that is looked at from outside."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeat.report.headline import latest_plug_in
from fedpeat.report.markup import clean
from fedpeat.report.overview import cost_of
from fedpeat.report.quantities import bytes_text, number_text, quality_text, seconds_text
from fedpeat.report.standing import ParticipantStanding, Standing
from fedpeat.report.status_server import StatusServer

__all__ = ["show", "watch"]

_LIVES = {
    "running": ("running", "bold green"),
    "finished": ("finished", "bold blue"),
    "stopped": ("stopped: no process works on it; go on with fedpeat run ... --resume", "bold red"),
    "unknown": ("not known whether it runs: there is no lock file", "bold"),
}
_STYLES = {"accepted": "green", "rejected": "red", "failed": "red", "late": "magenta"}
_MOST_ROWS = 100
_MOST_EVENTS = 8


def show(standing: Standing, console: Console | None = None) -> None:
    """Print where a run stands."""
    console = console or Console(highlight=False)
    life, style = _LIVES[standing.life]
    name = Text(_line(standing.run.name), "bold")
    console.print(Text.assemble(name, "  ", (life, style), "\n", _facts(standing)))
    if standing.participants:
        console.print(_participants(standing))
    for event in standing.events[:_MOST_EVENTS]:
        colour = "yellow" if event.kind == "warning" else "red"
        where = (f"round {event.server_round} ", "dim")
        text = Text.assemble(where, (event.kind, colour), " ", _line(event.text))
        console.print(text, soft_wrap=True)
    if standing.life == "running" and standing.last_log:
        console.print(Text(f"log: {_line(standing.last_log)}", "dim"), soft_wrap=True)
    for note in standing.run.notes:
        console.print(Text(_line(note), "yellow"), soft_wrap=True)


def watch(server: StatusServer) -> None:
    """Answer until Ctrl-C, after saying where."""
    with server, suppress(KeyboardInterrupt):
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        if server.is_open:
            print(
                "Others can reach it, and what is sent is not encrypted; who has the token sees "
                "everything.",
                flush=True,
            )
        threading.Event().wait()


def _facts(standing: Standing) -> str:
    run, cost = standing.run, cost_of(standing.run)
    whole = "" if standing.num_rounds is None else f" of {standing.num_rounds:,}"
    facts = [f"round {run.last_round:,}{whole}" if run.rounds else "no round yet"]
    if run.rounds:
        facts.append(f"plug-in {run.metric} {quality_text(latest_plug_in(run), run.metric)}")
        facts.append(f"{bytes_text(cost.bytes_down)} down, {bytes_text(cost.bytes_up)} up")
    if standing.changed_seconds is not None:
        ago = max(time.time() - standing.changed_seconds, 0.0)
        facts.append(f"last round written {seconds_text(ago)} ago")
    if standing.remaining_seconds is not None:
        facts.append(f"about {seconds_text(standing.remaining_seconds)} to go")
    stages = [f"{_line(s.name)} {s.life} at round {s.last_round:,}" for s in standing.stages]
    return ", ".join([*facts, *stages])


def _participants(standing: Standing) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("participant", overflow="fold", min_width=12)
    table.add_column("status", no_wrap=True)
    table.add_column("rung", overflow="fold")
    for name in ("last seen", "accepted", "loss", "down", "up"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in standing.participants[:_MOST_ROWS]:
        table.add_row(*_cells(item, is_aside=item.client_id in standing.set_aside))
    if len(standing.participants) > _MOST_ROWS:
        table.caption = f"the first {_MOST_ROWS} of {len(standing.participants):,}; --json has all"
    return table


def _cells(item: ParticipantStanding, *, is_aside: bool) -> list[Text]:
    label = " (server)" if item.role == "server" else " (set aside)" if is_aside else ""
    loss = "-" if item.last_loss is None else number_text(item.last_loss, 3)
    seen = "never" if item.last_seen_round is None else f"round {item.last_seen_round}"
    return [
        Text(_line(item.client_id) + label),
        Text(item.status, _STYLES.get(item.status, "yellow")),
        Text(_line(item.rung) or "-"),
        *(
            Text(text)
            for text in (
                seen,
                f"{item.statuses.get('accepted', 0)} of {item.num_drawn}",
                loss,
                bytes_text(item.bytes_down),
                bytes_text(item.bytes_up),
            )
        ),
    ]


def _line(text: str) -> str:
    """Return a text of a file as one line that cannot steer the terminal."""
    return " ".join(clean(text).split())[:240]
