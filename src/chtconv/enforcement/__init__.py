"""Keeping a model on its masks through every step, whatever the optimizer, the number of ranks and the average."""
