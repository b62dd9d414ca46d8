"""Emulators: the compact stand-ins for the frozen part of a model, and the files they travel as."""
