"""What was learnt in a simulated world, in a folder that a run can be steered with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat.control.planners import FixedPlan
from fedpeat.control.policy import Policy, save_policy
from fedpeat.control.process import FederationProcess, ProcessSettings
from fedpeat.core.errors import CheckpointError, WorldError
from fedpeat.core.run_folder import replace_folder
from fedpeat.mec.quality import QualityModel

__all__ = ["POLICY_FOLDER", "Trained", "load_trained", "save_trained"]

_SCHEMA = 1
_FILE = "controller.json"
POLICY_FOLDER = "policy"


@dataclass(frozen=True)
class Trained:
    """What controllers of a federation go by.

    Attributes:
        settings: What there is to choose from, and what it is worth.
        quality: How the loss is foretold to go on.
        plans: The best plan of each rule, by the rule's name.
    """

    settings: ProcessSettings
    quality: QualityModel
    plans: Mapping[str, FixedPlan]


def save_trained(
    folder: Path,
    trained: Trained,
    policy: Policy,
    process: FederationProcess,
    facts: Mapping[str, Any],
) -> None:
    """Write ``controller.json`` and the policy.

    Args:
        folder: Where to; what is there is replaced.
        trained: What was learnt.
        policy: The policy.
        process: What it was trained in.
        facts: What else is worth knowing: what it was trained on, and how it did.
    """
    record = {
        "schema": _SCHEMA,
        "rungs": [rung.name for rung in process.workload.rungs],
        "settings": asdict(trained.settings),
        "quality": {name: value.tolist() for name, value in vars(trained.quality).items()},
        "plans": {rule: asdict(plan) for rule, plan in trained.plans.items()},
        "facts": facts,
    }
    with replace_folder(folder) as temporary:
        (temporary / _FILE).write_text(json.dumps(record, indent=1) + "\n")
        save_policy(policy, process, temporary / POLICY_FOLDER)


def load_trained(folder: Path, rung_names: Sequence[str]) -> Trained:
    """Read what ``save_trained`` wrote, but for the policy.

    Args:
        folder: Where it is.
        rung_names: Rungs that it must be for, in order.

    Raises:
        CheckpointError: If it is missing or damaged, of another schema, or for other rungs.
    """
    path = folder / _FILE
    try:
        record = json.loads(path.read_text())
        schema, rungs = record["schema"], record["rungs"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"cannot read controller {path}: {error!r}") from error
    if schema != _SCHEMA:
        raise CheckpointError(f"controller {path} must have schema {_SCHEMA}, got {schema!r}")
    if rungs != list(rung_names):
        raise CheckpointError(
            f"controller {path} must be for rungs {list(rung_names)}, got {rungs}"
        )
    try:
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in record["settings"].items()
        }
        return Trained(
            ProcessSettings(**settings),
            QualityModel(**{n: np.array(v, dtype=float) for n, v in record["quality"].items()}),
            {rule: FixedPlan(**plan) for rule, plan in record["plans"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, WorldError) as error:
        raise CheckpointError(f"controller {path} is damaged: {error!r}") from error
