"""The lasting half of a device: it holds data and emulators, and answers one message at a time.

Further kinds of messages, beside a participant's:
    welcome  how this run reads data, with its tokenizer -> the hash of the welcome
and "hold" names parts to be fetched instead of bringing them.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedpeat.core.errors import EmulatorError, FedPEATError, WireError
from fedpeat.core.version import VERSION
from fedpeat.core.wire import Payload, decode, encode
from fedpeat.data.examples import Examples
from fedpeat.emulator.parts import short
from fedpeat.federated.flower.cache import Offer, PartCache
from fedpeat.federated.flower.recall import Answers
from fedpeat.federated.flower.socket_link import receive, send
from fedpeat.federated.participant import Participant
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
        least_noise: Noise multiplier below which it does not tune; 0 for any.

    What it hides its examples with is drawn anew whenever it is started.
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
        least_noise: float = 0.0,
    ) -> None:
        self._name = name
        self._cache = cache
        self._shelf = shelf
        self._read_data = read_data
        self._say = say
        self._secure = secure
        self._max_emulator_bytes = max_emulator_bytes
        self._least_noise = least_noise
        self._participant: Participant | None = None
        self._welcome = ""

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
        if kind == "train":
            return self._train(content)
        return self._participant.handle(kind, content)

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
        self._say(f"round {decode(content).record.get('server_round')}: tuning")
        update = decode(self._participant.handle("train", content))
        kept = self._participant.kept
        hello = encode(Payload(record={"parts": [kept] if kept else []}))
        inventory = self._inventory(self._participant, hello)
        return encode(Payload(update.arrays, {**update.record, "inventory": inventory}))

    def _welcomed(self, content: bytes) -> bytes:
        payload = decode(content)
        files = {name: array.tobytes() for name, array in payload.arrays.items()}
        data = self._read_data(payload.record, files)
        self._participant = Participant(
            self._name, data, self._shelf, self._secure, least_noise=self._least_noise
        )
        self._welcome = str(payload.record.get("welcome"))
        self._say(f"welcomed; {data.num_examples} examples with {data.num_tokens:,} tokens")
        return encode(Payload(record={"welcome": self._welcome}))

    def _hold(self, content: bytes) -> bytes:
        assert self._participant is not None
        record = decode(content).record
        parts = _listed_parts(record)
        self._require_room(sum(parts.values()))
        num_bytes = self._cache.fetch(_offers(record.get("fetch")))
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


def _listed_parts(record: Mapping[str, Any]) -> dict[str, int]:
    """Return the length of each part of the emulator in a "hold" message, by its hash."""
    try:
        parts = record["manifest"]["parts"]
        return {str(part["sha256"]): int(part["num_bytes"]) for part in parts}
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"a hold message must list the parts of an emulator: {error!r}") from error


def _offers(value: object) -> dict[str, Offer]:
    if not isinstance(value, dict):
        raise WireError(f"fetch must be a mapping of hashes to offers, got {value!r:.80}")
    try:
        return {
            sha256: Offer(int(offer["num_bytes"]), str(offer["token"]))
            for sha256, offer in value.items()
        }
    except (TypeError, KeyError, ValueError) as error:
        raise WireError(f"an offer must have num_bytes and token: {error!r}") from error


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
        kind, content = receive(link).decode(), receive(link)
        try:
            flag, answer = b"1", device.handle(kind, content)
        except FedPEATError as error:
            flag, answer = b"0", str(error).encode()
        except Exception as error:  # noqa: BLE001 - whatever a message does must not end the device
            flag, answer = b"0", f"{type(error).__name__}: {error}".encode()
        if flag == b"0":
            say(f"could not answer {kind!r}: {answer.decode()}")
        send(link, flag)
        send(link, answer)
    except (OSError, ValueError) as error:
        say(f"a message was cut: {error}")
