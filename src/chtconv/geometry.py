"""The geometry of a convolution: which activation each kernel position sees at each sliding window.

Everything here factorises over the spatial axes, so an :class:`Axis` knows one of them and a :class:`Geometry`
is a tuple of axes. Positions are counted in row-major order, as in ``weight.flatten(2)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

from chtconv.errors import ConfigurationError

PerAxis: TypeAlias = int | Sequence[int]


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution.

    Window ``w`` sees coordinate ``x = stride · w - padding[0] + dilation · p`` at position ``p``; coordinates
    outside ``[0, size)`` are padding, which is no activation and so no node of the graph.
    """

    kernel: int
    size: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1

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
        return {p: x for p, x in coordinates.items() if 0 <= x < self.size}

    def is_interior(self, window: int) -> bool:
        """Whether all windows within reach exist and see no padding: all interior windows are alike."""
        first, last = window - self.reach, window + self.reach
        if first < 0 or last >= self.windows:
            return False
        return len(self.sees(first)) == len(self.sees(last)) == self.kernel

    @cached_property
    def window_classes(self) -> list[tuple[int, int]]:
        """A representative of each class of equivalent windows, with the number of windows in it.

        Windows near the border stand for themselves, one interior window for all others: the number of classes
        does not depend on the size of the input.
        """
        margin = self.reach - (-max(self.padding) // self.stride)
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

    Example:
        >>> geometry = Geometry.of(kernel=(3, 3), input_size=(32, 32), padding=1, stride=2)
        >>> geometry.output_size, geometry.positions
        ((16, 16), 9)
    """

    axes: tuple[Axis, ...]

    @classmethod
    def of(
        cls,
        kernel: Sequence[int],
        input_size: PerAxis,
        *,
        stride: PerAxis = 1,
        padding: PerAxis | str = 0,
        dilation: PerAxis = 1,
    ) -> "Geometry":
        """The geometry of a convolution, from the arguments of ``torch.nn.Conv*d`` and the size of its input.

        Raises:
            ConfigurationError: a value that is not positive, a wrong number of axes, or an empty output.
        """
        n = len(kernel)
        sizes = _per_axis("input_size", input_size, n, least=1)
        strides = _per_axis("stride", stride, n, least=1)
        dilations = _per_axis("dilation", dilation, n, least=1)
        kernels = _per_axis("kernel", kernel, n, least=1)
        paddings = _paddings(padding, kernels, strides, dilations)
        axes = tuple(map(Axis, kernels, sizes, strides, paddings, dilations))
        geometry = cls(axes)
        if any(axis.windows < 1 for axis in axes):
            raise ConfigurationError(
                f"kernel {kernels} with dilation {dilations} does not fit into an input of size {sizes} with padding "
                f"{padding}: the output would have size {geometry.output_size}, and at least 1 is needed on each axis."
            )
        return geometry

    @property
    def positions(self) -> int:
        """Number of kernel positions K."""
        return prod(axis.kernel for axis in self.axes)

    @property
    def input_size(self) -> tuple[int, ...]:
        """Size of the input on each axis."""
        return tuple(axis.size for axis in self.axes)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Number of sliding windows on each axis."""
        return tuple(axis.windows for axis in self.axes)


def _per_axis(name: str, value: PerAxis, axes: int, *, least: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(map(int, value))
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
