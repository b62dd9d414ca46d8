"""A device that is not as it should be: ``fedpeat join`` with something wrong in what it sends.

    python odd_device.py KIND TOLD join --server ...

KIND is one of ODDITIES. A line of JSON goes into the file TOLD for each wrong update that is sent:
its round and kind.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np

from fedpeat.cli.main import main as command
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.federated.flower import worker

FULL_DISK_BYTES = 16_000
"""Less than an emulator's largest part, more than keys, FAB and a few lines of a log."""
LATE_SECONDS = 120.0


def nan(update: Payload, _: Payload | None) -> Payload:
    name, array = next(iter(update.arrays.items()))
    wrong = np.array(array)
    wrong.flat[0] = np.nan
    return Payload({**update.arrays, name: wrong}, update.record)


def shape(update: Payload, _: Payload | None) -> Payload:
    name, array = next(iter(update.arrays.items()))
    return Payload({**update.arrays, name: array[:1]}, update.record)


def missing(update: Payload, _: Payload | None) -> Payload:
    return Payload(dict(list(update.arrays.items())[1:]), update.record)


def stale(update: Payload, before: Payload | None) -> Payload:
    """Return the update of an earlier round."""
    return update if before is None else before


def examples(update: Payload, _: Payload | None) -> Payload:
    return Payload(update.arrays, {**update.record, "num_examples": 10**9})


def late(update: Payload, _: Payload | None) -> Payload:
    time.sleep(LATE_SECONDS)
    return update


Oddity = Callable[[Payload, Payload | None], Payload]
ODDITIES: dict[str, Oddity] = {
    "nan": nan,
    "shape": shape,
    "missing": missing,
    "stale": stale,
    "examples": examples,
    "late": late,
    "full_disk": lambda update, _: update,
}


class OddDevice(worker.Device):
    """A device whose updates go through an oddity; ``before`` is that of another round."""

    oddity: Oddity
    kind: str
    told: Path
    _last: Payload | None = None

    def _train(self, content: bytes) -> bytes:
        update = decode(super()._train(content))
        server_round, last = update.record["server_round"], self._last
        before = last if last and last.record["server_round"] != server_round else None
        if before is None:
            self._last = update
        wrong = type(self).oddity(update, before)
        if wrong is not update:
            with self.told.open("a") as file:
                file.write(json.dumps({"server_round": server_round, "kind": self.kind}) + "\n")
        return encode(wrong)


def main() -> None:
    kind, told, *arguments = sys.argv[1:]
    OddDevice.oddity, OddDevice.kind, OddDevice.told = ODDITIES[kind], kind, Path(told)
    if kind == "full_disk":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, hard))
    with mock.patch("fedpeat.experiments.join.Device", OddDevice):
        command(arguments)


if __name__ == "__main__":
    main()
