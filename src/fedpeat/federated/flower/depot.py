"""Parts of emulators as files that the gate serves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpeat.core.run_folder import storage_errors, write_atomically
from fedpeat.federated.flower.gate import token_for

__all__ = ["Depot"]


class Depot:
    """A folder of parts.

    Args:
        folder: The folder.
        secret: File with the secret that tokens are made with.
        valid_seconds: How long a token opens the gate [s].
    """

    def __init__(self, folder: Path, secret: Path, valid_seconds: float = 24 * 3600) -> None:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._secret = secret.read_bytes()
        self._valid_seconds = valid_seconds

    def offer(self, parts: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
        """Put parts into the folder; return length and token of each by its hash."""
        expiry = int(time.time() + self._valid_seconds)
        offers = {}
        for sha256, content in parts.items():
            path = self._folder / sha256
            if not path.exists() or path.stat().st_size != len(content):
                write_atomically(path, content)
            token = token_for(self._secret, sha256, expiry)
            offers[sha256] = {"num_bytes": len(content), "token": token}
        return offers
