"""Writes what each simulated device of a run owns, so that real devices can have the same."""

from __future__ import annotations

import json
from pathlib import Path

from fedpeat.config.schema import Config
from fedpeat.core.errors import ConfigError
from fedpeat.core.run_folder import storage_errors, write_atomically
from fedpeat.data.federation import load_federated_documents

__all__ = ["write_shards"]


def write_shards(config: Config, folder: Path) -> list[Path]:
    """Write the text of each device into ``NAME.jsonl``; return the files.

    A line has the fields "text", "prompt", "label" and "key".

    Raises:
        ConfigError: If the run is not about text.
        DataError: If the source is missing or malformed.
        StorageError: If the folder cannot be written.
    """
    if config.model.task != "causal_lm":
        raise ConfigError(f"model.task must be causal_lm to write shards, got {config.model.task}")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, documents in load_federated_documents(config.data, config.seed).clients.items():
        lines = [
            json.dumps({"text": d.text, "prompt": d.prompt, "label": d.label, "key": d.key})
            for d in documents
        ]
        paths.append(folder / f"{name}.jsonl")
        write_atomically(paths[-1], "".join(f"{line}\n" for line in lines))
    return paths
