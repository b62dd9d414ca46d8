"""What a person sees of a network that was inspected."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fedpeat.cli.terminal import size
from fedpeat.experiments.inspect import FoundList, Inspection

__all__ = ["show"]

MEANINGS = {
    "tuned": "tuned on devices",
    "needed": "the architecture needs it",
    "kept": "free to go",
    "dropped": "dropped",
}
STYLES = {"tuned": "bold green", "needed": "yellow", "kept": "cyan", "dropped": "dim"}
SIGNS = {"tuned": "█", "needed": "▣", "kept": "■", "dropped": "·"}
ASCII_SIGNS = {"tuned": "T", "needed": "N", "kept": "o", "dropped": "."}


def show(inspection: Inspection, console: Console | None = None) -> None:
    """Print what was found, what emulators would keep, and what was tried."""
    console = console or Console(highlight=False)
    signs = ASCII_SIGNS if console.options.ascii_only else SIGNS
    console.print(_title(inspection), "\n[bold]Blocks found[/]")
    console.print(_lists(inspection))
    console.print(Text("  ") + _map(inspection, range(inspection.num_blocks), signs))
    console.print(_legend(inspection, signs))
    for reason, indices in _by_reason(inspection).items():
        blocks = ", ".join(map(str, indices))
        console.print(f"   block {blocks}: {reason}", style=STYLES["needed"])
    console.print("\n[bold]What devices would hold[/], by the share kept of the blocks free to go")
    console.print(_rungs(inspection, signs))
    if inspection.lora_refused is not None:
        console.print(f"no LoRA: {inspection.lora_refused}", style="yellow", markup=False)
    console.print("[bold]Tried on this model[/]")
    for claim in inspection.checks:
        mark = "OK" if console.options.ascii_only else "✓"
        console.print(f"  [green]{mark}[/] {claim}")


def _title(inspection: Inspection) -> Panel:
    facts = (
        f"{_count(inspection.num_parameters)} parameters, {size(inspection.num_bytes)} as "
        f"{inspection.dtype}, {inspection.num_blocks} blocks"
    )
    title = Text.assemble((inspection.architecture, "bold"), f"  {inspection.name}")
    return Panel(Text(facts), title=title, title_align="left", expand=False, padding=(0, 2))


def _lists(inspection: Inspection) -> Table:
    table = Table("blocks in", "class", box=box.SIMPLE_HEAD)
    table.add_column("number", justify="right")
    table.add_column("parameters", justify="right")
    table.add_column("of model", justify="right")
    for item in inspection.lists:
        table.add_row(
            Text("\n".join(item.paths)),
            Text(_kinds(item)),
            str(item.num_blocks),
            _count(item.num_parameters),
            f"{item.num_parameters / inspection.num_parameters:.0%}".replace("%", " %"),
        )
    return table


def _kinds(item: FoundList) -> str:
    if len(item.kinds) == 1:
        return next(iter(item.kinds))
    return "\n".join(f"{number} {kind}" for kind, number in item.kinds.items())


def _rungs(inspection: Inspection, signs: Mapping[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer_drop", no_wrap=True)
    table.add_column("emulator keeps", overflow="fold")
    for name in ("params", "size", "of full", "LoRA", "a round"):
        table.add_column(name, justify="right", no_wrap=True)
    for rung in inspection.rungs:
        table.add_row(
            f"{rung.ratio:g}",
            _map(inspection, rung.kept, signs),
            _count(rung.num_parameters),
            size(rung.num_bytes),
            f"{rung.num_bytes / inspection.num_bytes:.0%}".replace("%", " %"),
            "-" if rung.adapter_parameters is None else _count(rung.adapter_parameters),
            "-" if rung.adapter_bytes is None else size(rung.adapter_bytes),
        )
    return table


def _map(inspection: Inspection, kept: Collection[int], signs: Mapping[str, str]) -> Text:
    """Draw a sign for each block, with a gap between lists."""
    drawing, index = Text(), 0
    for item in inspection.lists:
        drawing.append(" " if index else "")
        for _ in range(item.num_blocks):
            state = _state(inspection, kept, index)
            drawing.append(signs[state], STYLES[state])
            index += 1
    return drawing


def _state(inspection: Inspection, kept: Collection[int], index: int) -> str:
    if index not in kept:
        return "dropped"
    if inspection.placement != "all" and index in inspection.tuned:
        return "tuned"
    return "needed" if index in inspection.needed else "kept"


def _legend(inspection: Inspection, signs: Mapping[str, str]) -> Text:
    """Explain the signs that there are."""
    everything = range(inspection.num_blocks)
    states = {_state(inspection, everything, index) for index in everything} | {"dropped"}
    legend = Text()
    for state in [state for state in MEANINGS if state in states]:
        legend.append(f"   {signs[state]}", STYLES[state]).append(f" {MEANINGS[state]}")
    return legend


def _by_reason(inspection: Inspection) -> dict[str, list[int]]:
    reasons: dict[str, list[int]] = {}
    for index, reason in sorted(inspection.needed.items()):
        reasons.setdefault(reason, []).append(index)
    return reasons


def _count(number: int) -> str:
    for unit, least in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.9995 * least:  # what rounds up to it
            return f"{number / least:.3g} {unit}"
    return str(number)
