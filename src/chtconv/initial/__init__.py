"""Sparse initialisation: which links there are before training, and how many in each layer."""

from chtconv.initial.masks import ALLOCATIONS, RANDOM, LinearTopology, initial_mask, links_at, random_mask

__all__ = ["ALLOCATIONS", "RANDOM", "LinearTopology", "initial_mask", "links_at", "random_mask"]
