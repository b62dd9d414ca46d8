"""Real processes on the loopback: killed, and right in the end all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from faults.fleet import Materials
from faults.runner import run_with_faults
from faults.scenario import (
    DEVICE_ROLES,
    NUM_MASKED,
    ODDITIES,
    SERVER_ROLES,
    Event,
    Scenario,
    drawn,
    drawn_masked,
)

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="processes are found in /proc"
)


@pytest.mark.slow
def test_a_fleet_whose_server_and_device_are_killed_ends_as_a_run_in_process_does(
    tmp_path: Path,
) -> None:
    scenario = Scenario(
        0,
        (
            Event("welcome", 0.0, "kill", "site-0", "supernode"),
            Event("round 1", 0.0, "kill", "server", "all", 0.5),
        ),
        {"site-1": "nan"},
        hiding="noise",
    )
    materials = Materials.made_in(tmp_path / "materials")
    outcome = run_with_faults(materials, tmp_path / "run", scenario, num_rounds=2)
    assert outcome.is_well, outcome.line()
    assert 1 <= outcome.num_accepted < outcome.num_asked  # site-0's, and never site-1's
    (metrics,) = (tmp_path / "run").glob("runs/*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    first, second = (line["privacy"]["example_epsilon"] for line in lines[1:])
    assert 0 < first < second


def test_every_kill_and_every_oddity_comes_up_in_fifty_seeds() -> None:
    scenarios = [drawn(seed) for seed in range(50)]
    kills = [event for scenario in scenarios for event in scenario.events if event.kind == "kill"]
    assert {event.role for event in kills if event.who == "server"} == set(SERVER_ROLES)
    assert {event.role for event in kills if event.who != "server"} == set(DEVICE_ROLES)
    odd = {kind for scenario in scenarios for kind in scenario.oddities.values()}
    late = {"joins_late"} if any(scenario.late_joiners for scenario in scenarios) else set()
    assert odd | late == set(ODDITIES)
    assert all(
        {"server"} < {event.who for event in scenario.events if event.kind == "kill"}
        for scenario in scenarios
    )
    assert drawn(7) == drawn(7)


def test_masked_runs_lose_one_or_two_devices_of_five_and_some_the_server_too() -> None:
    scenarios = [drawn_masked(seed) for seed in range(10)]
    fallen = [[event for event in s.events if event.who != "server"] for s in scenarios]
    assert {len({event.who for event in events}) for events in fallen} == {1, 2}
    assert {event.role for events in fallen for event in events} == set(DEVICE_ROLES)
    assert sum(len(s.events) > len(f) for s, f in zip(scenarios, fallen, strict=True)) == 3
    assert all(
        scenario.hiding == "masks" and len(scenario.names) == NUM_MASKED for scenario in scenarios
    )
