"""Asks for replies one by one, so that one that does not come whole holds up no other.

Whoever asks a SuperLink for several replies gets them once all that have begun to come are whole.
A reply whose device died halfway is waited for, for minutes; one that a hostile device never ends,
for ever. So each reply is asked for by itself, in a thread, and a thread that is stuck waits on
alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from flwr.app import Message

__all__ = ["Puller"]

_STUCK_SECONDS = 1.0  # after so long a question is left to wait alone


@dataclass(eq=False)
class _Sweep:
    """A thread that asks for one reply after the other."""

    waiting: list[str]
    asked: str = ""
    asked_at: float = field(default_factory=time.monotonic)
    is_left: bool = False
    thread: threading.Thread | None = None

    @property
    def is_over(self) -> bool:
        return self.thread is not None and not self.thread.is_alive()


class Puller:
    """Brings replies as they come.

    Args:
        pull: Returns the replies to some messages, as far as they have come; it may block.
    """

    def __init__(self, pull: Callable[[list[str]], Iterable[Message]]) -> None:
        self._pull = pull
        self._found: SimpleQueue[tuple[str, Message | Exception]] = SimpleQueue()
        self._arrived: list[tuple[str, Message | Exception]] = []
        self._current: _Sweep | None = None
        self._stuck: list[_Sweep] = []

    def stuck(self) -> list[str]:
        """Return the messages whose replies do not come whole."""
        self._stuck = [sweep for sweep in self._stuck if not sweep.is_over]
        return [sweep.asked for sweep in self._stuck]

    def pulled(self, message_ids: Collection[str]) -> list[tuple[str, Message]]:
        """Return what has come in reply to messages, within a second or so.

        Raises:
            Exception: What a question for one of them raised.
        """
        if self._current is None:
            stuck = set(self.stuck())  # whoever is not any more has put down what it found
            known = stuck.union(message_id for message_id, _ in self._arrivals())
            self._current = self._sweep([i for i in message_ids if i not in known])
        assert self._current.thread is not None
        self._current.thread.join(_STUCK_SECONDS)
        if self._current.is_over:
            self._current = None
        elif time.monotonic() - self._current.asked_at >= _STUCK_SECONDS:
            self._current.is_left = True
            self._stuck.append(self._current)
            self._current = None
        found = []
        arrived = self._arrivals()
        while arrived:
            message_id, message = arrived.pop(0)
            if message_id in message_ids:
                if isinstance(message, Exception):
                    raise message
                found.append((message_id, message))
        return found

    def _sweep(self, message_ids: list[str]) -> _Sweep:
        sweep = _Sweep(message_ids)
        sweep.thread = threading.Thread(target=self._ask, args=(sweep,), daemon=True)
        sweep.thread.start()
        return sweep

    def _ask(self, sweep: _Sweep) -> None:
        for message_id in sweep.waiting:
            if sweep.is_left:
                return
            sweep.asked, sweep.asked_at = message_id, time.monotonic()
            try:
                for message in self._pull([message_id]):
                    self._found.put((message_id, message))
            except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
                self._found.put((message_id, error))
                return

    def _arrivals(self) -> list[tuple[str, Message | Exception]]:
        """Return what has come and was not returned yet; who takes something takes it out."""
        with suppress(Empty):
            while True:
                self._arrived.append(self._found.get_nowait())
        return self._arrived
