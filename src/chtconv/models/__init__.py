"""The networks that the command line can train."""

from chtconv.models.registry import MODELS, WITHOUT_PERCEPTRON, build_model
from chtconv.models.resnet import ResNet, resnet18, wrn22_2
from chtconv.models.vgg import VGG, vgg16, vgg19

__all__ = ["MODELS", "VGG", "WITHOUT_PERCEPTRON", "ResNet", "build_model", "resnet18", "vgg16", "vgg19", "wrn22_2"]
