"""The edge world: a wireless cell with devices, and what a round costs there. NumPy alone."""
