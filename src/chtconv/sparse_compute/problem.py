"""Sparse convolutions of one size, made ready for the kernels: their tiles, and their links in the order of these.

The three passes of a layer are one kind of problem (``csrc/convolution.h``): outputs, and the gradient of the input as
the outputs of the transposed links; gradients of the weights run through the tiles of the outputs.
"""

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chtconv.sparse_compute.layout import BLOCKED_FROM, LANES
from chtconv.sparse_compute.library import Library
from chtconv.sparse_compute.links import Links

Pair = tuple[int, int]


def _structure(name: str, fields: str, *pointers: str) -> type[ctypes.Structure]:
    described = [(field, ctypes.c_int64) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [*described, *((each, ctypes.c_void_p) for each in pointers)]})


_Problem = _structure(
    "_Problem",
    "flat batch channels height width in_n in_c in_y in_x kernels out_height out_width out_n out_c out_y out_x "
    "step_y step_x links taps",
    "tap_y",
    "tap_x",
)
_Links = _structure("_Links", "", "starts", "codes")
_Plan = _structure(
    "_Plan",
    "tile_y tile_x vectors unit_n unit_y unit_x block blocks min_y min_x rows columns phases channel_bytes group_bytes "
    "groups units_y units_x bordered segments",
)


@dataclass(frozen=True)
class Geometry:
    """What decides a convolution but for its links.

    Attributes:
        batch: images.
        size: height and width of the input.
        stride: of the convolution, like the following.
        padding: rows above and columns to the left.
        after: rows below and columns to the right.
        dilation: distance of taps.
        window: height and width of the kernel.
    """

    batch: int
    size: Pair
    stride: Pair
    padding: Pair
    after: Pair
    dilation: Pair
    window: Pair

    @classmethod
    def of(
        cls, x: Tensor, window: Sequence[int], stride: Pair, padding: str | Sequence[int], dilation: Pair
    ) -> "Geometry":
        """That of ``torch.nn.functional.conv2d`` with these arguments; a stride of ``padding="same"`` is 1."""
        extents = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
        if isinstance(padding, str):
            before = [extent // 2 if padding == "same" else 0 for extent in extents]
            after = [extent - extent // 2 if padding == "same" else 0 for extent in extents]
        else:
            before = after = list(padding)
        batch, _, *size = x.shape
        return cls(batch, pair(size), stride, pair(before), pair(after), dilation, pair(window))

    @property
    def flat(self) -> bool:
        """Whether there are too few images to fill vectors with them, so that tensors stay as they are."""
        return self.batch < BLOCKED_FROM

    @property
    def out_size(self) -> Pair:
        """Height and width of the output; not above 0 where the window does not fit."""
        sizes = zip(self.size, self.padding, self.after, self.dilation, self.window, self.stride, strict=True)
        return pair([(n + b + a - d * (k - 1) - 1) // s + 1 for n, b, a, d, k, s in sizes])

    def shape(self, channels: int, size: Pair) -> tuple[int, ...]:
        """Of a tensor in memory: blocked, or flat."""
        if self.flat:
            return (self.batch, channels, *size)
        return (-(-self.batch // LANES), channels, *size, LANES)


class Problem:
    """Links and geometry as one kernel takes them, and where its links are in the weight.

    Attributes:
        positions: int32 [links], of each link in the memory of the weight, in the order of the kernel's lists.
        starts: int64 [kernels + 1], where the links of each kernel begin in it.
        out_size: height and width of the outputs.
        first: row and column of the first one, in an input gradient.
    """

    def __init__(
        self,
        kernels: Library,
        dtype: torch.dtype,
        geometry: Geometry,
        starts: Tensor,
        codes: Tensor,
        positions: Tensor,
        *,
        channels: int,
        size: Pair,
        out_size: Pair,
        out_whole: Pair | None = None,
        out_step: Pair = (1, 1),
        first: Pair = (0, 0),
        step: Pair = (1, 1),
        taps: Sequence[Pair],
    ) -> None:
        self.out_size, self.first = out_size, first
        if geometry.flat:
            # Outputs without gaps.
            out_whole, out_step, first = None, (1, 1), (0, 0)
        lanes = 1 if geometry.flat else LANES
        whole, count = out_whole or out_size, len(starts) - 1
        self._taps = [
            torch.tensor([tap[axis] for tap in taps or [(0, 0)]], dtype=torch.int32, device="cpu") for axis in (0, 1)
        ]
        in_c, out_c = size[0] * size[1] * lanes, whole[0] * whole[1] * lanes
        self._problem = _Problem(
            geometry.flat, geometry.batch, channels, *size,
            channels * in_c, in_c, size[1] * lanes, lanes,
            count, *out_size,
            count * out_c, out_c, out_step[0] * whole[1] * lanes, out_step[1] * lanes,
            *step, len(codes), len(self._taps[0]), *(axis.data_ptr() for axis in self._taps),
        )  # fmt: skip
        self._begin = (first[0] * whole[1] + first[1]) * lanes
        self._kernels, self._dtype = kernels, dtype
        self._plan = _Plan()
        kernels.call("plan", dtype, ctypes.byref(self._problem), ctypes.byref(self._plan))
        self._offsets = torch.empty(len(codes), dtype=torch.int32, device="cpu")
        self._splits = torch.empty(count * (self._plan.segments + 1), dtype=torch.int64, device="cpu")
        order = torch.empty(len(codes), dtype=torch.int64, device="cpu")
        given = _Links(starts.data_ptr(), codes.data_ptr())
        references = (self._problem, self._plan, given)
        kernels.call("place", dtype, *map(ctypes.byref, references), order, self._offsets, self._splits)
        # Links change their order where segments are not blocks of channels.
        self.positions, self.starts = positions[order] if self._plan.bordered else positions, starts

    def values(self, weight: Tensor) -> Tensor:
        """The weights of the links, in the order of the kernel's lists."""
        if weight.dim() == 1 and not self._plan.bordered:
            return weight
        values = torch.empty(len(self.positions), dtype=self._dtype, device="cpu")
        self._kernels.call("gather", self._dtype, len(self.positions), self.positions, weight, values)
        return values

    def outputs(self, x: Tensor, values: Tensor, bias: Tensor | None, out: Tensor, rectify: bool = False) -> None:
        """Writes the outputs."""
        threads = torch.get_num_threads()
        offset = out.data_ptr() + self._begin * out.element_size()
        self._kernels.call(
            "outputs", self._dtype, *self._given(), self._offsets, self._splits, values, bias, int(rectify), threads, x,
            ctypes.c_void_p(offset),
        )  # fmt: skip

    def gradients(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradients of the weights of the links, in the order of the kernel's lists."""
        values = torch.empty(len(self.positions), dtype=self._dtype, device="cpu")
        self._kernels.call("gradients", self._dtype, *self._given(), self._offsets, self._splits, x, grad, values)
        return values

    def scatter(self, values: Tensor, weight: Tensor) -> None:
        """Writes values of the links to a tensor like the weight, and zero everywhere else."""
        row = weight.numel() // len(weight)
        self._kernels.call(
            "scatter", self._dtype, len(weight), row, self.starts, self.positions, values, weight
        )  # fmt: skip

    def kernel_sums(self, out: Tensor) -> Tensor:
        """Sums of a tensor like the output, [kernels]."""
        sums = torch.empty(len(self.starts) - 1, dtype=self._dtype, device="cpu")
        self._kernels.call("kernel_sums", self._dtype, self._given()[0], out, sums)
        return sums

    def _given(self) -> tuple[object, object]:
        return ctypes.byref(self._problem), ctypes.byref(self._plan)


def outputs_of(kernels: Library, links: Links, geometry: Geometry, weight: Tensor) -> Problem:
    """The problem of the outputs, kept for later calls with the same sizes, type and memory format of the weight."""

    def make() -> Problem:
        rows, columns = ([d * i - b for i in range(k)] for k, d, b in _axes(geometry))
        # Of values that are given alone, [links], those of the links are all of them.
        positions = (
            links.positions(weight) if weight.dim() == 4 else torch.arange(len(links), dtype=torch.int32, device="cpu")
        )
        return Problem(
            kernels, weight.dtype, geometry, links.starts, links.codes, positions,
            channels=links.shape[1] * links.groups,
            size=geometry.size,
            out_size=geometry.out_size,
            step=geometry.stride,
            taps=list(itertools.product(rows, columns)),
        )  # fmt: skip

    found: Problem = links.keep(("outputs", geometry, weight.dtype, weight.stride(), kernels.isa), make)
    return found


def input_gradients_of(kernels: Library, links: Links, geometry: Geometry, weight: Tensor) -> list[Problem]:
    """The problems of the input gradient: one for each remainder of rows and columns by the stride."""
    key = ("input gradient", geometry, weight.dtype, weight.stride(), kernels.isa)
    found: list[Problem] = links.keep(key, lambda: list(_input_gradients(kernels, links, geometry, weight)))
    return found


def _input_gradients(kernels: Library, links: Links, geometry: Geometry, weight: Tensor) -> Iterator[Problem]:
    positions = links.positions(weight)
    rows, columns = (
        [_seen(first, *axis, stride) for first in range(min(stride, size))]
        for size, stride, axis in zip(geometry.size, geometry.stride, _axes(geometry), strict=True)
    )
    for (y, of_row), (x, of_column) in itertools.product(enumerate(rows), enumerate(columns)):
        window = geometry.window[1]
        chosen = [i * window + j for i in of_row for j in of_column]
        starts, codes, origin = links.transposed(chosen)
        first, step = (y, x), geometry.stride
        yield Problem(
            kernels, weight.dtype, geometry, starts, codes, positions[origin],
            channels=links.shape[0],
            size=geometry.out_size,
            out_size=pair([-(-(n - f) // s) for n, f, s in zip(geometry.size, first, step, strict=True)]),
            out_whole=geometry.size,
            out_step=step,
            first=first,
            taps=[(i, j) for i in of_row.values() for j in of_column.values()],
        )  # fmt: skip


def _seen(first: int, window: int, dilation: int, before: int, stride: int) -> dict[int, int]:
    """Taps that see inputs first, first + stride, ..., and the outputs that see them, counted from their own number."""
    places = {i: first + before - i * dilation for i in range(window)}
    return {i: place // stride for i, place in places.items() if place % stride == 0}


def _axes(geometry: Geometry) -> Iterator[tuple[int, int, int]]:
    return zip(geometry.window, geometry.dilation, geometry.padding, strict=True)


def pair(value: int | Sequence[int]) -> Pair:
    """A number for rows and one for columns, of one for both as torch takes it too."""
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
