"""Floating point operations of layers, models and trainings."""

from chtconv.flops.counting import Flops, LayerFlops, count_flops, layer_flops, training_flops

__all__ = ["Flops", "LayerFlops", "count_flops", "layer_flops", "training_flops"]
