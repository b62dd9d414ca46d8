"""What Flower starts on a device for each message: it asks the worker, which is always there.

A fresh process for each message would load libraries and emulator each time; this one imports
neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedpeat.core.errors import WireError
from fedpeat.federated.flower.messages import from_records, to_records
from fedpeat.federated.flower.socket_link import SOCKET_KEY, ask

__all__ = ["client_app"]

_REFUSED = 1


def client_app() -> ClientApp:
    """Return the app that Flower runs on a device."""
    app = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        try:
            kind, content = from_records(message.content)
            reply = ask(Path(str(context.node_config[SOCKET_KEY])), kind, content)
        except (WireError, OSError, KeyError) as error:
            return Message(Error(_REFUSED, f"{type(error).__name__}: {error}"), reply_to=message)
        return Message(to_records(kind, reply), reply_to=message)

    app.train()(answer)
    app.query()(answer)
    return app
