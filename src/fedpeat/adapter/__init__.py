"""Adapters: the tuned part of a model, attached through PEFT, named by the full model's blocks."""
