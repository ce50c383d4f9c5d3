"""The networks that the command line can train."""

from chtconv.models.registry import MODELS, build_model
from chtconv.models.vgg import VGG, vgg16

__all__ = ["MODELS", "VGG", "build_model", "vgg16"]
