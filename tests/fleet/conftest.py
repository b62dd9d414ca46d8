"""Tests of the fleet's parts; they are left out where Flower is not installed."""

from __future__ import annotations

import os
from importlib.util import find_spec

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

collect_ignore_glob = [] if find_spec("flwr") else ["test_*.py"]
