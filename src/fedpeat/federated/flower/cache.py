"""Parts of emulators on a device's disk: fetched by hash, in pieces, verified, and kept."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from fedpeat.core.errors import WireError
from fedpeat.core.run_folder import sha256_of_file, storage_errors
from fedpeat.emulator.parts import short
from fedpeat.federated.flower.gate import PARTS_PATH

__all__ = ["Offer", "PartCache"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NUM_TRIES = 8
_WAIT_SECONDS = 1.0
_TIME_OUT_SECONDS = 30.0


@dataclass(frozen=True)
class Offer:
    """A part that may be fetched.

    Attributes:
        num_bytes: Its length.
        token: What opens the gate for it.
    """

    num_bytes: int
    token: str


class _OnDisk(Mapping[str, np.ndarray]):
    """Files as arrays: one that nobody uses any more takes no memory."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths

    def __getitem__(self, name: str) -> np.ndarray:
        return np.frombuffer(self._paths[name].read_bytes(), np.uint8)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class PartCache:
    """Parts in a folder, each in a file called by its hash.

    Args:
        folder: The folder; what is in it from earlier is used again.
        server: Where parts are fetched, "HOST:PORT".
        ca: Certificate of the authority.
    """

    def __init__(self, folder: Path, server: str, ca: Path) -> None:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._url = f"https://{server}{PARTS_PATH}"
        self._ca = ca

    def held(self) -> list[str]:
        """Return the hashes of the parts that are here."""
        return sorted(p.name for p in self._folder.iterdir() if _SHA256.fullmatch(p.name))

    def arrays(self, hashes: Collection[str]) -> Mapping[str, np.ndarray]:
        """Return those of some parts that are here; each is read anew whenever it is asked for."""
        paths = {sha256: self._folder / sha256 for sha256 in hashes if _SHA256.fullmatch(sha256)}
        return _OnDisk({sha256: path for sha256, path in paths.items() if _size(path)})

    def forget_all_but(self, current: Collection[str]) -> None:
        """Delete the parts that are of no use any more, by the beginnings of their hashes."""
        for path in self._folder.iterdir():
            if short(path.name.removesuffix(".partial")) not in current:
                path.unlink(missing_ok=True)

    def fetch(self, offers: Mapping[str, Offer]) -> int:
        """Fetch what is not here; return how many bytes came over the network.

        Raises:
            WireError: If a part does not come, or is not what its hash says.
            StorageError: If it cannot be written.
        """
        for sha256 in offers:
            if not _SHA256.fullmatch(sha256):
                raise WireError(f"a part must be called by its hash, got {sha256[:80]!r}")
        context = ssl.create_default_context(cafile=self._ca)
        with httpx.Client(verify=context, timeout=_TIME_OUT_SECONDS) as client:
            return sum(
                self._fetch(client, sha256, offer)
                for sha256, offer in offers.items()
                if not (self._folder / sha256).exists()
            )

    def _fetch(self, client: httpx.Client, sha256: str, offer: Offer) -> int:
        partial = self._folder / f"{sha256}.partial"
        came, num_failures, reason = 0, 0, ""
        while num_failures < _NUM_TRIES:
            time.sleep(_WAIT_SECONDS * num_failures)
            have, reason = _size(partial), "the connection was cut"
            try:
                if have < offer.num_bytes:
                    self._append(client, sha256, offer, partial, have)
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            new = _size(partial) - have
            came += new
            if have + new < offer.num_bytes:
                num_failures += new == 0  # one that brought something was none
                continue
            if sha256_of_file(partial) == sha256:
                partial.replace(self._folder / sha256)
                return came
            partial.unlink()
            num_failures, reason = num_failures + 1, "what came has another hash"
        raise WireError(f"part {sha256[:12]} did not come in {_NUM_TRIES} tries: {reason}")

    def _append(
        self, client: httpx.Client, sha256: str, offer: Offer, partial: Path, have: int
    ) -> None:
        """Go on where an earlier try was cut."""
        headers = {"Authorization": f"Bearer {offer.token}", "Range": f"bytes={have}-"}
        with (
            storage_errors(partial),
            partial.open("ab") as file,
            client.stream("GET", f"{self._url}/{sha256}", headers=headers) as answer,
        ):
            if answer.status_code != httpx.codes.PARTIAL_CONTENT:
                raise WireError(
                    f"the server must send part {sha256[:12]}, got status {answer.status_code}"
                )
            for chunk in answer.iter_raw():  # as it comes: what is collected is lost with a cut
                have += len(chunk)
                if have > offer.num_bytes:
                    raise WireError(
                        f"part {sha256[:12]} must have {offer.num_bytes} bytes, got more"
                    )
                file.write(chunk)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
