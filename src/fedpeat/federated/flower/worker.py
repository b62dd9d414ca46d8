"""The lasting half of a device: it holds data and emulators, and answers one message at a time.

Further kinds of messages, beside a participant's:
    welcome  how this run reads data, with its tokenizer -> the hash of the welcome
and "hold" names parts to be fetched instead of bringing them.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedpeat.core.errors import EmulatorError, FedPEATError, WireError
from fedpeat.core.noise import NoiseSource
from fedpeat.core.version import VERSION
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.data.examples import Examples
from fedpeat.emulator.parts import short
from fedpeat.federated.flower.cache import Offer, PartCache
from fedpeat.federated.flower.recall import Answers
from fedpeat.federated.flower.socket_link import receive, receive_kind, send
from fedpeat.federated.participant import Participant
from fedpeat.federated.screening import shown
from fedpeat.federated.secagg.seam import SecureSide
from fedpeat.federated.shelf import EmulatorShelf

__all__ = ["Device", "serve_device"]

_BACKLOG = 8

ReadData = Callable[[Mapping[str, Any], Mapping[str, bytes]], Examples]
"""Reads a device's own data: (how the run reads data, files of its tokenizer) -> examples."""


class Device:
    """A participant on a machine of its own.

    Args:
        name: What its key calls it.
        cache: Parts of emulators on its disk.
        shelf: Emulators in its memory.
        read_data: Reads its data once the server has said how.
        say: Is told what goes on.
        secure: Its side of secure aggregation; None if its updates go in clear.
        max_emulator_bytes: Largest emulator that it takes [byte]; any if None.
        noise: What its examples are hidden with; one that nobody else has if not given.
        least_noise: Noise multiplier below which it does not tune; 0 for any.

    A task that comes twice, since the first answer may not have arrived, is done once; or, if this
    was started anew meanwhile, once more with the same noise, so that nothing more is told.
    """

    def __init__(
        self,
        name: str,
        cache: PartCache,
        shelf: EmulatorShelf,
        read_data: ReadData,
        say: Callable[[str], object],
        secure: SecureSide | None = None,
        *,
        max_emulator_bytes: int | None = None,
        noise: NoiseSource | None = None,
        least_noise: float = 0.0,
    ) -> None:
        self._name = name
        self._cache = cache
        self._shelf = shelf
        self._read_data = read_data
        self._say = say
        self._secure = secure
        self._max_emulator_bytes = max_emulator_bytes
        self._noise = noise or NoiseSource.fresh()
        self._least_noise = least_noise
        self._participant: Participant | None = None
        self._welcome = ""
        self._answered: dict[str, tuple[str, bytes]] = {}

    def handle(self, kind: str, content: bytes) -> bytes:
        """Answer one message.

        Raises:
            FedPEATError: If it cannot be answered; the text says why.
        """
        if kind == "welcome":
            return self._welcomed(content)
        if kind == "hello":
            return self._hello(content)
        if self._participant is None:
            raise WireError(f"{self._name} has not been welcomed yet")
        if kind == "hold":
            return self._hold(content)
        return self._once(kind, content)

    def _once(self, kind: str, content: bytes) -> bytes:
        """Return the answer to a task; that given before if it is the same as the last."""
        assert self._participant is not None
        sha256 = hashlib.sha256(content).hexdigest()
        last, answer = self._answered.get(kind, ("", b""))
        if sha256 != last:
            if kind == "train":
                answer = self._train(content)
            else:
                answer = self._participant.handle(kind, content)
            self._answered[kind] = (sha256, answer)
        return answer

    def _hello(self, content: bytes) -> bytes:
        record = decode(content).record
        if (version := record.get("version")) != VERSION:
            text = f"the server runs fedpeat {version!r:.40}, this device {VERSION}"
            self._say(f"refused: {text}")
            raise WireError(text)
        if self._participant is None or record.get("welcome") != self._welcome:
            return encode(Payload(record={"client_id": self._name, "welcome": self._welcome}))
        return encode(Payload(record=self._inventory(self._participant, content)))

    def _inventory(self, participant: Participant, hello: bytes) -> dict[str, Any]:
        answer = decode(participant.handle("hello", hello)).record
        parts = [short(sha256) for sha256 in self._cache.held()]
        return {**answer, "emulator_parts": parts, "welcome": self._welcome}

    def _train(self, content: bytes) -> bytes:
        """Tune, and say with the update what the next round's "hello" would ask."""
        assert self._participant is not None
        self._say(f"round {shown(decode(content).record.get('server_round'))}: tuning")
        update = decode(self._participant.handle("train", content))
        kept = self._participant.kept
        hello = encode(Payload(record={"parts": [kept] if kept else []}))
        inventory = self._inventory(self._participant, hello)
        return encode(Payload(update.arrays, {**update.record, "inventory": inventory}))

    def _welcomed(self, content: bytes) -> bytes:
        payload = decode(content)
        if any(array.dtype != np.uint8 for array in payload.arrays.values()):
            raise WireError("a welcome's files must be bytes")
        files = {name: array.tobytes() for name, array in payload.arrays.items()}
        data = self._read_data(payload.record, files)
        self._participant = Participant(
            self._name,
            data,
            self._shelf,
            self._secure,
            noise=self._noise,
            least_noise=self._least_noise,
        )
        self._answered.clear()
        self._welcome = str(payload.record.get("welcome"))
        self._say(f"welcomed; {data.num_examples} examples with {data.num_tokens:,} tokens")
        return encode(Payload(record={"welcome": self._welcome}))

    def _hold(self, content: bytes) -> bytes:
        assert self._participant is not None
        self._answered.clear()  # they tell what is held
        record = decode(content).record
        parts = _parts(record.get("manifest"))
        self._require_room(sum(parts.values()))
        num_bytes = self._cache.fetch(_offers(record.get("fetch"), parts))
        whole = Payload(self._cache.arrays(parts), record)
        answer = self._participant.hold(whole).record
        self._cache.forget_all_but(record["current"])
        self._say(f"holds emulator {str(answer['held'])[:12]} ({num_bytes:,} bytes came)")
        return encode(Payload(record={**answer, "fetched_bytes": num_bytes}))

    def _require_room(self, num_bytes: int) -> None:
        """Refuse an emulator that this device cannot hold, before it is fetched."""
        most = self._max_emulator_bytes
        if most is not None and num_bytes > most:
            raise EmulatorError(
                f"{self._name} can hold an emulator of at most {most:,} bytes, this one has "
                f"{num_bytes:,}; it waits for a smaller rung"
            )


def _parts(manifest: object) -> dict[str, int]:
    """Return the length of each part that an emulator's manifest lists, by its hash [B]."""
    listed = manifest.get("parts") if isinstance(manifest, dict) else None
    if not isinstance(listed, list) or not all(isinstance(part, dict) for part in listed):
        raise WireError(f"an emulator's manifest must list its parts, got {shown(manifest)}")
    parts = {}
    for part in listed:
        sha256, num_bytes = part.get("sha256"), part.get("num_bytes")
        if not (isinstance(sha256, str) and type(num_bytes) is int and num_bytes > 0):
            raise WireError(f"a part must have sha256 and num_bytes, got {shown(part)}")
        parts[sha256] = num_bytes
    return parts


def _offers(value: object, parts: Mapping[str, int]) -> dict[str, Offer]:
    """Return what may be fetched: parts of the emulator, in their length."""
    if not isinstance(value, dict):
        raise WireError(f"fetch must be a mapping of hashes to offers, got {shown(value)}")
    offers = {}
    for sha256, item in value.items():
        offer = item if isinstance(item, dict) else {}
        token, num_bytes = offer.get("token"), offer.get("num_bytes")
        if not isinstance(token, str) or sha256 not in parts or num_bytes != parts[sha256]:
            raise WireError(
                f"an offer must have a token and the length of one of the emulator's parts, got "
                f"{shown(item)}"
            )
        offers[sha256] = Offer(parts[sha256], token)
    return offers


def serve_device(path: Path, device: Answers, say: Callable[[str], object]) -> None:
    """Answer messages on a Unix socket, which only this user can reach, until told to end."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        old = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(old)
        listening.listen(_BACKLOG)
        while True:
            link, _ = listening.accept()
            with link:
                _answer_one(link, device, say)


def _answer_one(link: socket.socket, device: Answers, say: Callable[[str], object]) -> None:
    try:
        kind, content = receive_kind(link), receive(link)
        try:
            flag, answer = b"1", device.handle(kind, content)
        except FedPEATError as error:
            flag, answer = b"0", str(error).encode(errors="replace")
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - whatever a message does must not end the device; a library's panic in Rust is no Exception
            flag, answer = b"0", f"{type(error).__name__}: {error}".encode(errors="replace")
        if flag == b"0":
            say(f"could not answer {kind!r}: {answer.decode()}")
        send(link, flag)
        send(link, answer)
    except (OSError, ValueError) as error:
        say(f"a message was cut: {error}")
