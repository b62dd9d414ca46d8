"""Controllers: who takes part in a round, with which emulator and how much work."""
