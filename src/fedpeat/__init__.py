"""Federated emulator-assisted PEFT tuning: tune a model you may not share on data you may not see.

The public names are loaded when they are first used, so that ``import fedpeat`` costs no PyTorch
import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedpeat.core.version import VERSION

if TYPE_CHECKING:
    from fedpeat.config.loading import load_config
    from fedpeat.config.schema import Config
    from fedpeat.core.errors import FedPEATError
    from fedpeat.experiments.compare import compare
    from fedpeat.experiments.evaluate import evaluate_adapter
    from fedpeat.experiments.export import export_adapter
    from fedpeat.experiments.inspect import inspect
    from fedpeat.experiments.run import run
    from fedpeat.report.page import write_report

__version__ = VERSION

_HOME = {
    "Config": "fedpeat.config.schema",
    "FedPEATError": "fedpeat.core.errors",
    "compare": "fedpeat.experiments.compare",
    "evaluate_adapter": "fedpeat.experiments.evaluate",
    "export_adapter": "fedpeat.experiments.export",
    "inspect": "fedpeat.experiments.inspect",
    "load_config": "fedpeat.config.loading",
    "run": "fedpeat.experiments.run",
    "write_report": "fedpeat.report.page",
}

__all__ = [
    "Config",
    "FedPEATError",
    "compare",
    "evaluate_adapter",
    "export_adapter",
    "inspect",
    "load_config",
    "run",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedpeat' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
