"""What the benchmark of coordination counts, and the app of plain Flower that it writes."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from coordination import adapter, kind_of, returned
from coordination_apps import COLD_WORK, write_app
from fedpeat.core.wire import decode
from fedpeat.federated.participant import train_message
from fedpeat.tuning.local import LocalSettings


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("/venv/bin/python /venv/bin/flower-superlink --host 127.0.0.1", "superlink"),
        ("/venv/bin/python /venv/bin/flower-superexec --insecure", "superexec"),
        ("/venv/bin/python /venv/bin/flwr-clientapp --insecure", "clientapp"),
        ("python -m fedpeat.federated.flower.gate gate.json", "gate"),
        ("/venv/bin/python /venv/bin/fedpeat join --server localhost:1", "join"),
        ("/venv/bin/python /venv/bin/fedpeat serve config.yaml", "serve"),
        ("sleep 1", "other"),
    ],
)
def test_a_program_is_known_by_its_command_line(command: str, kind: str) -> None:
    assert kind_of(command.split()) == kind


@pytest.mark.parametrize("work", ["    pass", COLD_WORK.format(model="a/b", block_size=8)])
def test_the_app_of_plain_flower_is_two_programs_that_can_be_read(
    work: str, tmp_path: Path
) -> None:
    write_app(tmp_path / "app", tmp_path / "times.json", 10**6, 3, work)
    project = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    for place in project["tool"]["flwr"]["app"]["components"].values():
        module, name = place.split(":")
        tree = ast.parse((tmp_path / "app" / f"{module}.py").read_text())
        assert name in {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}


def test_a_device_of_the_empty_round_returns_the_adapter_that_it_got() -> None:
    sent = adapter()
    assert sum(array.nbytes for array in sent.values()) == 12 * 8 * (768 + 2304) * 4
    task = train_message(
        sent,
        server_round=3,
        emulator="e",
        num_steps=1,
        first_step=0,
        settings=LocalSettings(1, 1e-3, 0, 0.0, 0.0, 0.0),
        seed=0,
    )
    answer = decode(returned("train", task))
    assert answer.record["server_round"] == 3
    assert all((answer.arrays[name] == array).all() for name, array in sent.items())
