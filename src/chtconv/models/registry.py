"""Networks by name, with initial weights that depend on the seed alone."""

from typing import Final, Protocol

import torch
from torch import nn

from chtconv.errors import check_name
from chtconv.models.resnet import resnet18, wrn22_2
from chtconv.models.vgg import vgg16, vgg19
from chtconv.randomness import derived_seed


class _Builder(Protocol):
    def __call__(
        self, num_classes: int, *, width: float, head: int | None, dropout: float, in_channels: int
    ) -> nn.Module: ...


MODELS: Final[dict[str, _Builder]] = {"vgg16": vgg16, "vgg19": vgg19, "resnet18": resnet18, "wrn22_2": wrn22_2}
# Those without a perceptron, which take no notice of dropout.
WITHOUT_PERCEPTRON: Final = ("resnet18", "wrn22_2")


def build_model(
    name: str,
    num_classes: int,
    *,
    seed: int,
    width: float = 1.0,
    head: int | None = None,
    dropout: float = 0.5,
    in_channels: int = 3,
) -> nn.Module:
    """The network ``name`` on the CPU, its initial weights drawn from a generator of their own.

    The same arguments give the same weights, whatever was drawn before, and the global generator is left as it was.

    Args:
        name: a key of ``MODELS``.
        num_classes: logits per image.
        seed: the seed of the run.
        width: multiplies the channels.
        head: neurons of each hidden layer of the perceptron, or None for the network's own number.
        dropout: share of the hidden neurons dropped while training.
        in_channels: channels of an image.

    Raises:
        ConfigurationError: for an unknown name (with the nearest match) or a value the network cannot use.

    >>> one, two = (build_model("vgg16", 10, seed=14, width=1 / 16) for _ in range(2))
    >>> all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    True
    """
    check_name("model", name, MODELS)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the devices, which fork_rng does not restore here.
        torch.default_generator.manual_seed(derived_seed(seed, "weights"))
        return MODELS[name](num_classes, width=width, head=head, dropout=dropout, in_channels=in_channels)
