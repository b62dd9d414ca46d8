"""Tests of the fleet's parts; they are left out where Flower is not installed."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

collect_ignore_glob = [] if find_spec("flwr") else ["test_*.py"]


@pytest.fixture
def on_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the process that Flower starts for a run: none other can make messages."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(f"flwr.supercore.task_identity.TaskIdentity.{name}", 1)
