"""The geometry of a convolution: which activation each kernel position sees at each sliding window.

Everything here factorises over the spatial axes, so an :class:`Axis` knows one of them and a :class:`Geometry`
is a tuple of axes. Positions are counted in row-major order, as in ``weight.flatten(2)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import product
from math import ceil, floor, prod
from operator import index
from typing import TypeAlias

from chtconv.errors import ConfigurationError, check_name

PerAxis: TypeAlias = int | Sequence[int]
PADDING_MODES = ("zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution.

    Window ``w`` sees coordinate ``x = stride · w - padding[0] + dilation · p`` at position ``p``; coordinates
    outside ``[0, size)`` are padding, which is no activation and so no node of the graph, or, on a circular axis,
    the real activations of the other end.
    """

    kernel: int
    size: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1
    circular: bool = False

    @property
    def windows(self) -> int:
        """Number of sliding windows: the size of the output."""
        return (self.size + sum(self.padding) - self.dilation * (self.kernel - 1) - 1) // self.stride + 1

    @property
    def reach(self) -> int:
        """Windows further apart than this share no activation."""
        return self.dilation * (self.kernel - 1) // self.stride

    def sees(self, window: int) -> dict[int, int]:
        """The positions of a window that are in bounds, each with the coordinate that it sees."""
        start = self.stride * window - self.padding[0]
        coordinates = {p: start + self.dilation * p for p in range(self.kernel)}
        if self.circular:
            return {p: x % self.size for p, x in coordinates.items()}
        return {p: x for p, x in coordinates.items() if 0 <= x < self.size}

    @property
    def in_bounds(self) -> list[float]:
        """Share of the windows in which each position is in bounds."""
        seen = [(self.sees(window), count) for window, count in self.window_classes]
        return [sum(count for sees, count in seen if p in sees) / self.windows for p in range(self.kernel)]

    def nearby(self, window: int) -> dict[int, dict[int, int]]:
        """The windows that can share an activation with this one, itself included, each with what it sees."""
        turns = range(-2, 3) if self.circular else range(1)
        centers = [Fraction(turn * self.size, self.stride) + window for turn in turns]
        reach = Fraction(self.dilation * (self.kernel - 1), self.stride)
        around = {w for center in centers for w in range(ceil(center - reach), floor(center + reach) + 1)}
        return {other: self.sees(other) for other in sorted(around) if 0 <= other < self.windows}

    def is_interior(self, window: int) -> bool:
        """Whether the window and all within reach are far from both ends: all interior windows are alike."""
        first, last = window - self.reach, window + self.reach
        if first < 0 or last >= self.windows:
            return False
        if self.circular:
            return len(self.nearby(window)) == 2 * self.reach + 1
        return len(self.sees(first)) == len(self.sees(last)) == self.kernel

    @cached_property
    def window_classes(self) -> list[tuple[int, int]]:
        """A representative of each class of equivalent windows, with the number of windows in it.

        Windows near the border stand for themselves, one interior window for all others: the number of classes
        does not depend on the size of the input.
        """
        margin = self.reach + ceil(max(self.padding) / self.stride)
        if self.circular:
            margin = max(self.reach, ceil(sum(self.padding) / self.stride))
        if self.windows <= 2 * margin + 1:
            return [(window, 1) for window in range(self.windows)]
        left = [(window, 1) for window in range(margin)]
        right = [(window, 1) for window in range(self.windows - margin, self.windows)]
        assert self.is_interior(margin)
        assert self.is_interior(self.windows - margin - 1)
        return [*left, (margin, self.windows - 2 * margin), *right]


@dataclass(frozen=True)
class Geometry:
    """The spatial axes of a convolution; no axis at all for a linear layer.

    A transposed convolution has the links of a convolution with the sides exchanged: its axes are those of that
    convolution, whose windows are the inputs here, and whose activations are the outputs.

    Example:
        >>> geometry = Geometry.of(kernel=(3, 3), input_size=(32, 32), padding=1, stride=2)
        >>> geometry.output_size, geometry.positions
        ((16, 16), 9)
    """

    axes: tuple[Axis, ...]
    transposed: bool = False

    @classmethod
    def of(
        cls,
        kernel: Sequence[int],
        input_size: PerAxis,
        *,
        stride: PerAxis = 1,
        padding: PerAxis | str = 0,
        dilation: PerAxis = 1,
        padding_mode: str = "zeros",
        transposed: bool = False,
        output_padding: PerAxis = 0,
    ) -> "Geometry":
        """The geometry of a layer, from the arguments of ``torch.nn.Conv*d`` and the size of its input.

        Padding by reflection or replication copies activations that a window near the border sees already, or
        could see; the copies are no nodes of their own, so both are read like zero padding.

        Raises:
            ConfigurationError: a value that is not positive, a wrong number of axes, an empty output, an unknown
                padding mode, or a circular axis that is narrower than the kernel or the padding.
        """
        n = len(kernel)
        sizes = _per_axis("input_size", input_size, n, least=1)
        strides = _per_axis("stride", stride, n, least=1)
        dilations = _per_axis("dilation", dilation, n, least=1)
        kernels = _per_axis("kernel", kernel, n, least=1)
        paddings = _paddings(padding, kernels, strides, dilations)
        check_name("padding mode", padding_mode, PADDING_MODES)
        circular = [padding_mode == "circular" and any(pads) for pads in paddings]
        if transposed:
            if isinstance(padding, str):
                raise ConfigurationError(f"padding={padding!r}: a transposed convolution accepts whole numbers.")
            if padding_mode != "zeros":
                raise ConfigurationError(f"padding_mode={padding_mode!r}: a transposed convolution accepts 'zeros'.")
            extra = _per_axis("output_padding", output_padding, n, least=0)
            sizes = _transposed_sizes(sizes, kernels, strides, paddings, dilations, extra)
        axes = tuple(map(Axis, kernels, sizes, strides, paddings, dilations, circular))
        for axis in axes:
            _check(axis, padding)
        return cls(axes, transposed)

    @property
    def positions(self) -> int:
        """Number of kernel positions K."""
        return prod(axis.kernel for axis in self.axes)

    @cached_property
    def in_bounds(self) -> tuple[float, ...]:
        """Share of the windows in which each kernel position is in bounds: what padding leaves of it.

        >>> Geometry.of((3, 3), 2, padding=1).in_bounds
        (0.25, 0.5, 0.25, 0.5, 1.0, 0.5, 0.25, 0.5, 0.25)
        """
        return tuple(prod(shares) for shares in product(*(axis.in_bounds for axis in self.axes)))

    @property
    def input_size(self) -> tuple[int, ...]:
        """Size of the input on each axis."""
        return tuple(axis.windows if self.transposed else axis.size for axis in self.axes)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Size of the output on each axis."""
        return tuple(axis.size if self.transposed else axis.windows for axis in self.axes)


def _check(axis: Axis, padding: PerAxis | str) -> None:
    if axis.size < 1 or axis.windows < 1:
        raise ConfigurationError(
            f"a kernel of {axis.kernel} with dilation {axis.dilation}, stride {axis.stride} and padding {padding} on "
            f"a size of {axis.size} leaves nothing: input and output need a size of at least 1 on each axis."
        )
    if axis.circular and axis.dilation * (axis.kernel - 1) >= axis.size:
        raise ConfigurationError(
            f"padding_mode='circular' with a kernel of {axis.kernel} and dilation {axis.dilation} on a size of "
            f"{axis.size}: two positions would be the same link. Accepted is a kernel no wider than the input."
        )

    if axis.circular and max(axis.padding) > axis.size:
        raise ConfigurationError(
            f"padding_mode='circular' with padding {padding} on a size of {axis.size}: it would wrap around more than "
            "once. Accepted is padding no wider than the input."
        )


def _transposed_sizes(
    sizes: tuple[int, ...],
    kernels: tuple[int, ...],
    strides: tuple[int, ...],
    paddings: list[tuple[int, int]],
    dilations: tuple[int, ...],
    extras: tuple[int, ...],
) -> tuple[int, ...]:
    """Output sizes of a transposed convolution, as torch defines them."""
    if any(extra >= max(steps) for extra, *steps in zip(extras, strides, dilations, strict=True)):
        raise ConfigurationError(
            f"output_padding={extras}: accepted is less than the stride, {strides}, or the dilation, {dilations}."
        )
    terms = zip(sizes, kernels, strides, paddings, dilations, extras, strict=True)
    return tuple(s * (n - 1) - sum(pads) + d * (k - 1) + 1 + extra for n, k, s, pads, d, extra in terms)


def _per_axis(name: str, value: PerAxis, axes: int, *, least: int) -> tuple[int, ...]:
    try:
        values = (index(value),) * axes if not isinstance(value, Sequence) else tuple(map(index, value))
    except TypeError:
        raise ConfigurationError(
            f"{name}={value!r}: accepted is a whole number, or one for each of {axes} spatial axes."
        ) from None
    if len(values) != axes:
        raise ConfigurationError(f"{name}={value!r} has {len(values)} entries; the kernel has {axes} spatial axes.")
    if any(v < least for v in values):
        raise ConfigurationError(f"{name}={value!r}: each entry must be at least {least}.")
    return values


def _paddings(
    padding: PerAxis | str, kernels: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Padding before and after on each axis; ``"same"`` puts the odd one after, as torch does."""
    if not isinstance(padding, str):
        return [(p, p) for p in _per_axis("padding", padding, len(kernels), least=0)]
    if padding == "valid":
        return [(0, 0)] * len(kernels)
    if padding != "same":
        raise ConfigurationError(f"padding={padding!r}: accepted are whole numbers, 'same' and 'valid'.")
    if any(stride != 1 for stride in strides):
        raise ConfigurationError(f"padding='same' needs stride 1, not {strides}.")
    totals = [dilation * (kernel - 1) for kernel, dilation in zip(kernels, dilations, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]
