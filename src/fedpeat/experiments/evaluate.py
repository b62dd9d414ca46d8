"""Score an exported adapter on the data of a run, through the files alone."""

from __future__ import annotations

from pathlib import Path

from fedpeat.adapter.tunable import read_adapter
from fedpeat.config.loading import load_config
from fedpeat.core.errors import ConfigError
from fedpeat.experiments.plugged import plugged_model
from fedpeat.experiments.tasks import task_of
from fedpeat.tuning.evaluation import evaluate

__all__ = ["evaluate_adapter"]


def evaluate_adapter(
    run: Path, *, adapter: Path | None = None, split: str = "test"
) -> dict[str, float]:
    """Plug an adapter into the full model of a run and score it.

    Args:
        run: Run folder.
        adapter: Adapter folder; the run's own if not given.
        split: "validation" or "test".

    Returns:
        ``perplexity`` per token, ``bits_per_byte`` and ``perplexity_per_byte``; or ``accuracy`` and
        ``cross_entropy``.

    Raises:
        FedPEATError: If the folder is not a run, or the adapter does not fit its model.
    """
    config = load_config(_config_of(run))
    state = read_adapter(adapter or run / "adapter")
    loaded, tunable = plugged_model(config, state)
    task = task_of(config)
    data = task.read(config, loaded)
    chosen = {"validation": data.validation, "test": data.test}[split]
    quality = evaluate(tunable.model, chosen, config.evaluation.batch_size)
    return {task.metric: quality.value(task.metric), **quality.beside(task.metric)}


def _config_of(run: Path) -> Path:
    path = run / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{run} is not a run folder: it has no config.yaml")
    return path
