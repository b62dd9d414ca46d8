"""A real fleet on Flower's SuperLink and SuperNodes; the only folder that knows flwr."""
