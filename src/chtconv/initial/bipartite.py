"""Initial topologies of linear layers: bipartite networks whose links are near the diagonal, and random to a degree.

Outputs and inputs lie on one ring, evenly spaced however many they are. The distance of an output and an input is
that along the ring, in steps from input to input, as |i - j| where there are as many outputs as inputs.

Shapes: O outputs, I inputs; masks are those of ``torch.nn.Linear`` weights, [O, I].

References:
    [1] Zhang et al., "Brain network science modelling of sparse neural networks enables Transformers and LLMs to
        perform as fully connected", NeurIPS 2025, arXiv 2501.19107, section 3.2 and appendix D.
    [2] Zhang et al., "Epitopological learning and Cannistraci-Hebb network shape intelligence brain-inspired theory
        for ultra-sparse advantage in deep learning", ICLR 2024.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError, check_name
from chtconv.selection import exponentials

# Of two inputs at the same distance, the one that follows is nearer by so much of the least difference of distances.
_NEARER = 2.0**-10


def small_world(outputs: int, inputs: int, links: int, beta: float, generator: torch.Generator) -> Tensor:
    """Bipartite small world (BSW): every output linked to its nearest inputs, then a share of the links rewired.

    Before the rewiring the degrees of the outputs are equal, or differ by one if the links cannot be divided evenly,
    and those of the inputs nearly so. ``round(beta · links)`` of the links, drawn without replacement, are then removed
    and as many put at random where there are none: with ``beta`` 0 the network is regular, with 1 Erdős-Rényi.

    Args:
        outputs: number of outputs.
        inputs: number of inputs.
        links: number of links of the mask, up to outputs · inputs.
        beta: share of the links that are rewired, in [0, 1]; [1] uses 0.25.
        generator: draws what is rewired; its device is that of the mask.

    Returns:
        bool of shape [outputs, inputs] with exactly ``links`` true.

    Raises:
        ConfigurationError: a value out of range.

    Source: [1] appendix D, "Bipartite small-world model", after [2]. The official code draws for each link whether it
    is rewired; here the share is exact.

    >>> small_world(4, 4, 8, 0.0, torch.Generator()).int()
    tensor([[1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1],
            [1, 0, 0, 1]], dtype=torch.int32)
    """
    _check(outputs, inputs, links, "beta", beta)
    mask_OI = _take_nearest(_distances(outputs, inputs, generator.device), _equal(outputs, inputs, links, generator))
    rewired = round(beta * links)
    flat = mask_OI.view(-1)
    flat[_draw(flat.nonzero().flatten(), rewired, generator)] = False
    flat[_draw((~flat).nonzero().flatten(), rewired, generator)] = True
    return mask_OI


def receptive_field(
    outputs: int, inputs: int, links: int, r: float, generator: torch.Generator, degrees: str = "fixed"
) -> Tensor:
    """Bipartite receptive field (BRF): links drawn with a probability that falls with the distance d.

    The degrees of the outputs are given, and the inputs of each output are drawn without replacement in proportion to

        (1 + d)^(-(1 - r) / r).

    With ``r`` 0 they are the nearest, so the network is ``small_world`` with ``beta`` 0; with ``r`` 1, any.

    Args:
        outputs: number of outputs.
        inputs: number of inputs.
        links: number of links of the mask, up to outputs · inputs.
        r: randomness, in [0, 1]; [1] finds 0.25 best for perceptrons and uses 0 to 0.3 in LLaMA.
        generator: draws the links; its device is that of the mask.
        degrees: ``"fixed"`` (BRFf), all outputs have the same number of links, or one more or less; ``"uniform"``
            (BRFu), every output has one link, if there are as many, and the others fall on outputs at random.

    Returns:
        bool of shape [outputs, inputs] with exactly ``links`` true.

    Raises:
        ConfigurationError: a value out of range.

    Source: [1] appendix D, "Bipartite receptive field model". It gives the score as d^((1 - r) / r) and says that it is
    high near the diagonal, and leaves the range of uniform degrees open: the base 1 + d, the sign of the exponent and
    the uniform degrees are those of the official code.

    >>> receptive_field(4, 4, 8, 0.25, torch.Generator().manual_seed(0)).sum(1)
    tensor([2, 2, 2, 2])
    """
    _check(outputs, inputs, links, "r", r)
    check_name("degrees", degrees, _DEGREES)
    degrees_O = _DEGREES[degrees](outputs, inputs, links, generator)
    distances_OI = _distances(outputs, inputs, generator.device)
    # The least exponential clocks of rates w are a draw in proportion to w; keys are r · log(clock), so r may be 0.
    clocks_OI = exponentials(distances_OI, generator).double().log_().mul_(r)
    return _take_nearest(distances_OI.log1p_().mul_(1 - r).add_(clocks_OI), degrees_O)


def _distances(outputs: int, inputs: int, device: torch.device) -> Tensor:
    """Distance along the ring of each output and input, in steps between inputs: float64 [O, I], no two equal in a row.

    Output o is at (o + 1/2) / O and input i at (i + 1/2) / I of the ring. Where two inputs are equally near, the
    following one counts as nearer: by a consistent side no input is favoured on a ring, and degrees remain equal.
    """
    ring = 2 * outputs * inputs
    position_O1 = (2 * torch.arange(outputs, device=device) + 1)[:, None] * inputs
    position_I = (2 * torch.arange(inputs, device=device) + 1) * outputs
    ahead_OI = (position_I - position_O1 + ring // 2).remainder_(ring).sub_(ring // 2)
    return ahead_OI.double().sub_(_NEARER).abs_().div_(2 * outputs)


def _take_nearest(keys_OI: Tensor, degrees_O: Tensor) -> Tensor:
    """The smallest keys of each row, as many as its degree: bool [O, I]."""
    most = int(degrees_O.max())
    index_OM = keys_OI.topk(most, dim=1, largest=False).indices
    taken_OM = torch.arange(most, device=keys_OI.device) < degrees_O[:, None]
    return torch.zeros_like(keys_OI, dtype=torch.bool).scatter_(1, index_OM, taken_OM)


def _equal(outputs: int, inputs: int, links: int, generator: torch.Generator) -> Tensor:
    """Degrees that differ by one at most, those with one more spread evenly: int64 [O]."""
    return (torch.arange(outputs + 1, device=generator.device) * links // outputs).diff()


def _scattered(outputs: int, inputs: int, links: int, generator: torch.Generator) -> Tensor:
    """Degrees where links fall on outputs at random, but each has one if there are as many: int64 [O]."""
    least = min(1, links // outputs)
    free = torch.arange(outputs, device=generator.device).repeat_interleave(inputs - least)
    return least + _draw(free, links - least * outputs, generator).bincount(minlength=outputs)


_DEGREES: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {"fixed": _equal, "uniform": _scattered}


def _draw(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """So many of the values, drawn without replacement."""
    return values[torch.randperm(len(values), generator=generator, device=values.device)[:count]]


def _check(outputs: int, inputs: int, links: int, name: str, randomness: float) -> None:
    for side, size in (("outputs", outputs), ("inputs", inputs)):
        if not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"{side}={size!r}: accepted are whole numbers from 1.")
    if not isinstance(links, int) or not 0 <= links <= outputs * inputs:
        raise ConfigurationError(
            f"links={links!r}: accepted are whole numbers from 0 to {outputs * inputs}, "
            f"the positions of {outputs} outputs and {inputs} inputs."
        )
    if not isinstance(randomness, (int, float)) or not 0 <= randomness <= 1:
        raise ConfigurationError(f"{name}={randomness!r}: accepted are numbers from 0 to 1.")
