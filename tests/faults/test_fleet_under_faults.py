"""Real processes on the loopback: killed, and right in the end all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.fleet import Materials
from faults.runner import run_with_faults
from faults.scenario import DEVICE_ROLES, ODDITIES, SERVER_ROLES, Event, Scenario, drawn

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
    )
    materials = Materials.made_in(tmp_path / "materials")
    outcome = run_with_faults(materials, tmp_path / "run", scenario, num_rounds=2)
    assert outcome.is_well, outcome.line()
    assert 1 <= outcome.num_accepted < outcome.num_asked  # site-0's, and never site-1's


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
