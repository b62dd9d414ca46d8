"""What Flower starts on the server for a run: our own loop, on Flower's grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeat.core.records import Transport
from fedpeat.federated.flower.transport import FlowerTransport

__all__ = ["server_app"]


def server_app(main: Callable[[Callable[[Callable[[], object]], Transport]], object]) -> ServerApp:
    """Return the app that Flower runs on the server.

    Args:
        main: Is given what returns the transport, once told what to call when messages were sent.
    """
    app = ServerApp()

    @app.main()
    def run(grid: Grid, _: Context) -> None:
        main(partial(FlowerTransport, grid))

    return app
