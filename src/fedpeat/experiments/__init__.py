"""Experiments: one kind of run, one file, read top to bottom."""
