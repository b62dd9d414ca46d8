"""Errors, records, seeds, the wire format and the run folder: neither PyTorch nor Flower."""
