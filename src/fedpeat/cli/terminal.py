"""What a person sees in the terminal while a run goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from fedpeat.control.quality_fit import FitError

__all__ = ["Terminal", "size"]

QUALITIES = {
    "full_zero_shot": "full model, untouched",
    "emulator_zero_shot": "emulator, untouched",
    "emulator_tuned": "emulator + tuned adapter",
    "plug_in": "full model + tuned adapter",
    "full_tuned": "full model, tuned itself",
}
BESIDE = {"bits_per_byte": "bits per byte", "cross_entropy": "cross-entropy"}
SHORT = {"perplexity": "ppl", "accuracy": "acc"}
ATTACKS = {
    "from_scratch": "from scratch",
    "fine_tune": "fine-tuned",
    "reinsert": "blocks put back",
}


class Terminal:
    """Shows progress bars and a row per round; an observer of runs, to be used in a ``with``."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("[dim]{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_round = 0

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def message(self, text: str) -> None:
        """Print it."""
        self._console.print(f"[dim]·[/] {escape(text)}", soft_wrap=True)
        self._last_round = 0

    def progress(self, task: str, done: float, total: float, note: str) -> None:
        """Move the bar of a long step."""
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total, note="")
        self._bars.update(self._tasks[task], completed=done, total=total, note=note)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(task))

    def round(self, line: Mapping[str, Any], num_rounds: int) -> None:
        """Print a row, and a header before the first."""
        if self._last_round == 0:
            self._console.print(f"[bold]{_header((line['quality'] or {}).get('metric', ''))}[/]")
        self._last_round = line["server_round"]
        self._console.print(_round_row(line, num_rounds))
        self.progress("rounds", line["server_round"], num_rounds, "")

    def summary(self, summary: Mapping[str, Any], folder: Path) -> None:
        """Print the five qualities and where to look further."""
        quality, metric = summary["quality"], summary["quality"]["metric"]
        table = Table(title=f"{metric} on the test split", title_justify="left")
        table.add_column("quality")
        table.add_column("per token" if metric == "perplexity" else metric, justify="right")
        beside = next(name for name in BESIDE if name in quality)
        table.add_column(BESIDE[beside], justify="right")
        for name, meaning in QUALITIES.items():
            style = "bold" if name == "plug_in" else ""
            table.add_row(
                meaning,
                _score(quality[name], metric),
                _number(quality[beside][name], 4),
                style=style,
            )
        self._console.print(table)
        if quality["gap_closed"] is not None:
            self._console.print(f"gap to full tuning closed: [bold]{quality['gap_closed']:.0%}[/]")
        self._console.print(f"report: {folder / 'report.html'}", markup=False, soft_wrap=True)

    def comparison(self, table: str, folder: Path) -> None:
        """Print a comparison."""
        self._console.print(table, markup=False, soft_wrap=True)
        self._console.print(f"page: {folder / 'comparison.html'}", markup=False, soft_wrap=True)

    def audit(self, results: Sequence[Mapping[str, Any]], page: Path | None) -> None:
        """Print what attackers reached, and what that means."""
        for result in results:
            for emulator in result["emulators"]:
                self._console.print(_audit_table(emulator))
                for line in emulator["verdicts"]:
                    self._console.print(f"- {line}", markup=False, soft_wrap=True)
        if page is not None:
            self._console.print(f"page: {page}", markup=False, soft_wrap=True)

    def privacy_audit(self, result: Mapping[str, Any]) -> None:
        """Print what attacks on updates reached."""
        for line in result["verdicts"]:
            self._console.print(f"- {line}", markup=False, soft_wrap=True)

    def calibration(self, error: FitError, max_error: float, folder: Path) -> None:
        """Print how far predictions are off, and whether controllers may be trained on them."""
        self._console.print(
            f"{error.num_rounds} rounds of {error.num_policies} plans; on plans held out the last "
            f"loss is off by {error.rollout:.1%} of the gain (by {error.baseline_rollout:.1%} if "
            f"every round is taken to bring the same), the change of a round by {error.step:.0%}"
        )
        objection = error.objection(max_error)
        if objection is None:
            self._console.print(f"next: fedpeat learn {folder}", markup=False, soft_wrap=True)
        else:
            self._console.print(objection, style="yellow", markup=False, soft_wrap=True)

    def learnt(self, found: Mapping[str, Any], folder: Path) -> None:
        """Print what each controller's episodes are worth, and how to use them."""
        table = Table(title="return in worlds that none was trained in", title_justify="left")
        table.add_column("controller")
        table.add_column("return, 95 % interval", justify="right")
        for kind, value in sorted(found["returns"].items(), key=lambda item: -item[1]["mean"]):
            table.add_row(kind, f"{value['mean']:.4f} ± {value['half_width']:.4f}")
        self._console.print(table)
        self._console.print(
            f"next: fedpeat run CONFIG --controller.kind sabppo --controller.policy {folder}",
            markup=False,
            soft_wrap=True,
        )


def _audit_table(emulator: Mapping[str, Any]) -> Table:
    capability = emulator["capability"]
    table = Table(
        title=f"perplexity of {emulator['recipe']}: full model {_number(capability['full'])}, "
        f"emulator untouched {_number(capability['emulator'])}",
        title_justify="left",
    )
    table.add_column("attack, after tokens")
    attacks = {name: found for name, found in emulator["attacks"].items() if found is not None}
    for point in attacks["from_scratch"]["curve"]:
        table.add_column(f"{point['num_tokens']:,}", justify="right")
    table.add_column("recovered", justify="right")
    for name, found in attacks.items():
        ratio = found["recovered_ratio"]
        table.add_row(
            ATTACKS[name],
            *[_number(point["perplexity"]) for point in found["curve"]],
            "-" if ratio is None else f"{ratio:.0%}",
        )
    return table


def _header(metric: str) -> str:
    return (
        f"{'round':>9}  {f'plug-in {SHORT.get(metric, metric)}':>11}  {'train loss':>10}  "
        f"{'accepted':>9}  {'down':>9}  {'up':>9}  {'time':>7}"
    )


def _round_row(line: Mapping[str, Any], num_rounds: int) -> str:
    statuses = Counter(p["status"] for p in line["participants"])
    others = [
        f"{count} {status}" for status, count in sorted(statuses.items()) if status != "accepted"
    ]
    quality = line["quality"] or {}
    plug_in = _score(quality.get("plug_in"), quality.get("metric", ""))
    row = (
        f"{line['server_round']:>4}/{num_rounds:<4}  {plug_in:>11}  "
        f"{_number(line['train_loss'], 3):>10}  "
        f"{statuses['accepted']:>4}/{len(line['participants']):<4}  "
        f"{size(line['bytes_down']):>9}  {size(line['bytes_up']):>9}  {line['seconds']:>5.1f} s"
    )
    return row + (f"  [yellow]{', '.join(others)}[/]" if others else "")


def _score(value: float | None, metric: str) -> str:
    return f"{value:.2%}" if value is not None and metric == "accuracy" else _number(value)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError
