"""What Flower starts on the server for a run: our own loop, on Flower's grid."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedpeat.core.records import Transport
from fedpeat.federated.flower.transport import FlowerTransport

__all__ = ["server_app"]


def server_app(main: Callable[[Transport], object]) -> ServerApp:
    """Return the app that Flower runs on the server."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, _: Context) -> None:
        main(FlowerTransport(grid))

    return app
