"""Secure aggregation: the server learns the sum of a round's updates, and no update."""
