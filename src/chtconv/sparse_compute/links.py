"""The active links of a convolution as lists, in the orders in which the kernels go through them."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError
from chtconv.sparse_compute.library import Library, library

# Sizes of which a layer keeps what it prepared: two passes in training, and evaluation, with smaller last batches.
_KEPT = 8


class Links:
    """The active links of a 2-D convolution.

    A link is a weight: of kernel ``o``, from input channel ``c`` (of all groups), at a position of the kernel window,
    its tap ``t``, from left to right and then down.

    Attributes:
        shape: of the weight, [O, I / groups, kh, kw].
        groups: of the convolution.
        starts: int64 [O + 1], where the links of each kernel begin.
        codes: int32 [links], ``c * kh * kw + t`` of each link, ascending in each kernel.
    """

    def __init__(self, shape: tuple[int, ...], groups: int, starts: Tensor, codes: Tensor) -> None:
        self.shape = shape
        self.groups = groups
        self.starts = starts
        self.codes = codes
        self._positions: dict[tuple[int, ...], Tensor] = {}
        self._kept: OrderedDict[Any, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type["Links"], tuple[tuple[int, ...], int, Tensor, Tensor]]:
        # What was prepared holds addresses; a copy prepares its own.
        return type(self), (self.shape, self.groups, self.starts, self.codes)

    @classmethod
    def of(cls, mask: Tensor, groups: int = 1) -> "Links":
        """The links of a mask.

        Args:
            mask: bool [O, I / groups, kh, kw].
            groups: of the convolution; O is a multiple of it.

        Raises:
            ConfigurationError: a mask of another type, or with 2^31 positions and more.

        Example:
            >>> links = Links.of(torch.ones(2, 3, 1, 1, dtype=torch.bool))
            >>> links.starts.tolist(), links.codes.tolist()
            ([0, 3, 6], [0, 1, 2, 0, 1, 2])
        """
        if mask.dtype != torch.bool or mask.dim() != 4 or groups < 1 or len(mask) % groups:
            raise ConfigurationError(
                f"mask {mask.dtype} of shape {list(mask.shape)} with groups={groups}: accepted is torch.bool "
                "[O, I / groups, kh, kw], with O a multiple of groups."
            )
        if mask.numel() * groups >= 2**31:
            raise ConfigurationError(f"mask of shape {list(mask.shape)}: accepted are fewer than 2^31 positions.")
        mask, shape = mask.contiguous(), tuple(mask.shape)
        sizes = _sizes(shape, groups)
        starts = torch.empty(len(mask) + 1, dtype=torch.int64, device="cpu")
        _call("list_links", *sizes, mask, starts, None)
        codes = torch.empty(int(starts[-1]), dtype=torch.int32, device="cpu")
        _call("list_links", *sizes, mask, starts, codes)
        return cls(shape, groups, starts, codes)

    @classmethod
    def of_lists(cls, starts: Tensor, codes: Tensor, shape: tuple[int, ...], groups: int = 1) -> "Links":
        """The links of lists that come from elsewhere, such as a file.

        Args:
            starts: int64 [O + 1].
            codes: int32 [links].
            shape: of the weight, [O, I / groups, kh, kw].
            groups: of the convolution.

        Raises:
            ConfigurationError: lists that are not those of such a weight.

        Example:
            >>> links = Links.of(torch.rand(4, 3, 3, 3) < 0.5)
            >>> len(Links.of_lists(links.starts, links.codes, links.shape)) == len(links)
            True
        """
        fits = len(shape) == 4 and min(shape) >= 1 and groups >= 1 and shape[0] % groups == 0
        if not fits or shape[0] * shape[1] * shape[2] * shape[3] * groups >= 2**31:
            raise ConfigurationError(f"shape {list(shape)} with groups={groups}: no weight of a 2-D convolution.")
        kernels, row = shape[0], shape[1] * shape[2] * shape[3]
        if (
            starts.dtype != torch.int64
            or starts.shape != (kernels + 1,)
            or codes.dtype != torch.int32
            or codes.dim() != 1
        ):
            raise ConfigurationError(
                f"lists {starts.dtype} {list(starts.shape)} and {codes.dtype} {list(codes.shape)}: accepted are "
                f"torch.int64 [{kernels + 1}] and torch.int32 [links]."
            )
        if int(starts[0]) != 0 or int(starts[-1]) != len(codes) or bool((starts.diff() < 0).any()):
            raise ConfigurationError(f"starts: accepted is an ascending list from 0 to {len(codes)}, the links.")
        kernel = torch.repeat_interleave(torch.arange(kernels, device="cpu"), starts.diff())
        inside = codes.long() - kernel.div(kernels // groups, rounding_mode="floor") * row
        positions = kernel * row + inside
        if bool(((inside < 0) | (inside >= row)).any()) or bool((positions.diff() <= 0).any()):
            raise ConfigurationError("codes: accepted are ascending ones of channels that the kernel sees.")
        return cls(shape, groups, starts.contiguous(), codes.contiguous())

    def __len__(self) -> int:
        return len(self.codes)

    def positions(self, weight: Tensor) -> Tensor:
        """Where in the memory of a dense weight each link is, int32 [links]."""
        if weight.stride() not in self._positions:
            to_kernel, to_channel, to_row, to_column = weight.stride()
            height, width = self.shape[2:]
            tap_at = torch.arange(height, device="cpu").mul(to_row)[:, None] + torch.arange(width, device="cpu").mul(
                to_column
            )
            positions = torch.empty(len(self), dtype=torch.int32, device="cpu")
            _call("locate_links", *self.sizes, self.starts, self.codes, to_kernel, to_channel, tap_at, positions)
            self._positions = {weight.stride(): positions}
        return self._positions[weight.stride()]

    def transposed(self, taps: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The links by input channel, as the input gradient goes through them.

        Args:
            taps: the links of these are wanted; they are counted in this order then.

        Returns:
            Starts int64 [I + 1], codes int32 [those links], kernel * len(taps) + tap, and the number of each among
            :attr:`codes`, int32.

        Example:
            >>> links = Links.of(torch.tensor([[[[True, False]], [[True, True]]]]))
            >>> [each.tolist() for each in links.transposed([0, 1])]
            [[0, 1, 3], [0, 0, 1], [0, 1, 2]]
        """
        new = torch.full((self.sizes[3],), -1, dtype=torch.int32, device="cpu")
        new[list(taps)] = torch.arange(len(taps), dtype=torch.int32, device="cpu")
        starts = torch.empty(self.shape[1] * self.groups + 1, dtype=torch.int64, device="cpu")
        codes, origin = (torch.empty(len(self), dtype=torch.int32, device="cpu") for _ in range(2))
        _call(
            "transpose_links", *self.sizes, self.starts, self.codes, new, max(1, len(taps)), starts, codes, origin
        )  # fmt: skip
        count = int(starts[-1])
        return starts, codes[:count].clone(), origin[:count].clone()

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Groups, and in each of them kernels, channels and taps."""
        return _sizes(self.shape, self.groups)

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made of the lists for problems of one size, see :mod:`.problem`: that of the latest few sizes."""
        # Each line by itself holds for all threads: at worst two of them make the same.
        found = self._kept.pop(key, None)
        if found is None:
            found = make()
        self._kept[key] = found
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found


def _sizes(shape: Sequence[int], groups: int) -> tuple[int, int, int, int]:
    return groups, shape[0] // groups, shape[1], shape[2] * shape[3]


def _call(name: str, *args: object) -> None:
    # Lists are the same for all types of weights.
    kernels_needed().call(name, torch.float32, *args)


def kernels_needed() -> Library:
    """The compiled kernels.

    Raises:
        ConfigurationError: there are none here.
    """
    found = library()
    if found is None:
        raise ConfigurationError("sparse convolution: the compiled kernels are not there; see docs/building.md.")
    return found
