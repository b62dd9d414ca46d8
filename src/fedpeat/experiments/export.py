"""Write a run's adapter where the user wants it, by itself or merged into the full model."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from fedpeat.adapter.tunable import read_adapter
from fedpeat.config.loading import load_config
from fedpeat.core.errors import AdapterError, ConfigError
from fedpeat.core.run_folder import replace_folder
from fedpeat.experiments.plugged import plugged_model

__all__ = ["export_adapter"]


def export_adapter(run: Path, out: Path, *, merged: bool = False) -> Path:
    """Export a finished run.

    Args:
        run: Run folder.
        out: Folder to write; it must not exist yet or be empty.
        merged: Write the full model with the adapter merged in, rather than the adapter alone.

    Returns:
        The folder.

    Raises:
        FedPEATError: If the run has no adapter, it cannot be merged, or the folder cannot be
            written.
    """
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is not a run folder: it has no config.yaml")
    if not (run / "adapter").is_dir():
        raise AdapterError(f"{run} has no adapter yet; finish the run with --resume")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"export folder must not exist yet or be empty, got {out}")
    if not merged:
        with replace_folder(out) as temporary:
            shutil.copytree(run / "adapter", temporary, dirs_exist_ok=True)
        return out
    loaded, tunable = plugged_model(load_config(run / "config.yaml"), read_adapter(run / "adapter"))
    model = tunable.merged()
    with replace_folder(out) as temporary:
        torch.nn.Module.to(model, dtype=loaded.storage_dtype)
        model.save_pretrained(temporary)
        loaded.processor.save_pretrained(temporary)
    return out
