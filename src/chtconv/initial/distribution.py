"""How a sparsity is distributed over layers: the density of each, for one overall number of links.

Shapes are those of the weights, rows first: [outputs, inputs] of a linear layer, [outputs, inputs / groups, *kernel]
of a convolution. So n_in of a grouped convolution is the number of channels that one kernel sees, not that of the
layer: a depthwise convolution has n_in = 1 and stays dense or nearly so.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from math import prod
from numbers import Real

from chtconv.errors import ConfigurationError, check_name

Shapes = Mapping[str, tuple[int, ...]]


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The same density in every layer.

    Evci et al. keep the first layer dense under this name; here that is done by leaving it out of ``shapes``.

    Args:
        shapes: shape of the weight of each layer, by name.
        sparsity: share of disabled links, in [0, 1).

    Returns:
        density of each layer, in (0, 1], in the order of ``shapes``.

    Raises:
        ConfigurationError: a sparsity outside [0, 1), or a shape that is not that of a layer.

    >>> uniform({"features.0": (64, 3, 3, 3), "head": (10, 64)}, 0.75)
    {'features.0': 0.25, 'head': 0.25}
    """
    _check(shapes, sparsity)
    return dict.fromkeys(shapes, 1 - float(sparsity))


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Erdős-Rényi-Kernel: dense in small layers, sparse in large ones.

    With ε such that the layers together have as many links as under :func:`uniform`, the density of a layer is

        min(1, ε · (n_out + n_in + k_1 + k_2 + ...) / (n_out · n_in · k_1 · k_2 · ...)).

    Without a kernel, in a linear layer, this is Erdős-Rényi: as many links as ε · (n_out + n_in).

    Args:
        shapes: shape of the weight of each layer, by name.
        sparsity: share of disabled links of all layers together, in [0, 1).

    Returns:
        density of each layer, in (0, 1], in the order of ``shapes``.

    Raises:
        ConfigurationError: a sparsity outside [0, 1), or a shape that is not that of a layer.

    References:
        Erdős-Rényi: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity
        inspired by network science", Nature Communications 9 (2018), equation 1. With kernels: Evci et al., "Rigging
        the Lottery: Making All Tickets Winners", ICML 2020, section 3 (1).

    >>> erk({"stem": (4, 1, 3, 3), "features.0": (8, 4, 3, 3), "head": (16, 16)}, 0.5)
    {'stem': 1.0, 'features.0': 0.3175, 'head': 0.635}
    """
    _check(shapes, sparsity)
    # Exact numbers: the links are those of the sparsity, and a sparsity of 0 is a density of 1, with no tolerance.
    links = (1 - Fraction(float(sparsity))) * sum(map(prod, shapes.values()))
    share = sum(map(sum, shapes.values()))
    densities: dict[str, Fraction] = {}
    # From the densest layer on, so that a layer which would exceed 1 leaves what it cannot hold to those after it.
    for name, shape in sorted(shapes.items(), key=lambda layer: Fraction(prod(layer[1]), sum(layer[1]))):
        densities[name] = min(Fraction(1), links / share * sum(shape) / prod(shape))
        links -= densities[name] * prod(shape)
        share -= sum(shape)
    return {name: float(densities[name]) for name in shapes}


DISTRIBUTIONS: dict[str, Callable[[Shapes, float], dict[str, float]]] = {"uniform": uniform, "erk": erk}


def distributed(distribution: str, shapes: Shapes, sparsity: float) -> dict[str, float]:
    """The density of each layer by the distribution of a name in :data:`DISTRIBUTIONS`, one of your own included.

    Args:
        distribution: the name.
        shapes: shape of the weight of each layer, by name.
        sparsity: share of disabled links of all layers together, in [0, 1).

    Returns:
        density of each layer, in (0, 1], in the order of ``shapes``.

    Raises:
        ConfigurationError: an unknown name; or layers without a density, and densities that are none.

    >>> distributed("uniform", {"features.0": (64, 3, 3, 3), "head": (10, 64)}, 0.75)
    {'features.0': 0.25, 'head': 0.25}
    """
    check_name("distribution", distribution, DISTRIBUTIONS)
    densities = DISTRIBUTIONS[distribution](shapes, sparsity)
    for name in shapes:
        density = densities.get(name) if isinstance(densities, Mapping) else None
        if not isinstance(density, Real) or not 0 < density <= 1:
            raise ConfigurationError(
                f"layer {name}: the distribution {distribution!r} gave the density {density!r}; accepted are numbers "
                "above 0 and up to 1, for every layer."
            )
    return {name: float(densities[name]) for name in shapes}


def check_sparsity(sparsity: object, name: str = "sparsity") -> None:
    """Refuses what is no sparsity.

    Raises:
        ConfigurationError: with the name of the value.
    """
    if not isinstance(sparsity, Real) or not 0 <= float(sparsity) < 1:
        raise ConfigurationError(f"{name}={sparsity!r}: accepted are numbers from 0 up to, but not including, 1.")


def _check(shapes: Shapes, sparsity: float) -> None:
    check_sparsity(sparsity)
    for name, shape in shapes.items():
        if len(shape) < 2 or min(shape) < 1:
            raise ConfigurationError(
                f"layer {name}: shape {tuple(shape)}; accepted are shapes (outputs, inputs / groups, *kernel) "
                "of at least two sizes, all of them at least 1."
            )
