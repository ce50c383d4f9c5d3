"""Comparisons: a grid of runs, its statistics and tables."""
