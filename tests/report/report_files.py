"""Lines and summaries as a run writes them, for the tests of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Line = dict[str, Any]
MakeRun = Callable[..., Path]


def participant(client_id: str, status: str = "accepted", **values: Any) -> Line:
    role = "server" if client_id == "server" else "device"
    return {"client_id": client_id, "role": role, "status": status, "reason": ""} | values


def round_line(server_round: int, plug_in: float | None, **values: Any) -> Line:
    quality = {"metric": "perplexity", "plug_in": plug_in, "plug_in_bits_per_byte": 1.5}
    spent = {"bytes_down": 1000, "bytes_up": 500, "seconds": 2.0}
    line: Line = {
        "server_round": server_round,
        "quality": quality,
        "train_loss": 3.0,
        "update_norm": 0.1,
        "participants": [participant("server"), participant("ann")],
        "elapsed_seconds": 2.0 * server_round,
        "peak_rss_bytes": 812_000_000,
        **(spent if server_round else dict.fromkeys(spent, 0)),
    }
    return line | values


def summary(**quality: Any) -> Line:
    values = {
        "metric": "perplexity",
        "full_zero_shot": 34.9,
        "emulator_zero_shot": 88.3,
        "emulator_tuned": 40.0,
        "plug_in": 21.3,
        "full_tuned": 18.9,
        "gap_closed": 0.81,
    }
    cost = {"bytes_down": 1_200_000, "bytes_up": 800_000, "wall_seconds": 192.0}
    return {
        "schema": 1,
        "method": "fedpeat",
        "model": "bundled",
        "num_parameters": 8_000_000,
        "seed": 0,
        "num_rounds": 2,
        "num_clients": 6,
        "emulator": {"recipe": "layer_drop", "num_parameters": 2_000_000, "num_bytes": 4_000_000},
        "adapter": {"peft": "lora", "num_parameters": 80_000, "num_bytes": 160_000},
        "quality": values | quality,
        "cost": cost | {"peak_rss_bytes": 812_000_000, "tokens_per_second": 8800.0},
        "versions": {"fedpeat": "0.1.0"},
    }


def three_rounds() -> list[Line]:
    return [round_line(0, 34.9, participants=[]), round_line(1, 28.0), round_line(2, 22.0)]


def figure(page: str, caption: str) -> str:
    """Return the first figure of a page whose caption begins so."""
    return page[page.index(f"<figcaption>{caption}") :].partition("</figure>")[0]
