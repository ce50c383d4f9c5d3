"""Where the links of a run lie: counts by kernel position, by slice and by channel, from its masks."""

import re
from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from chtconv.report.run import Run, table
from chtconv.training.run_folder import MASKS

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class LayerLinks:
    """The links of a convolution with O kernels, C input channels and K kernel positions.

    Attributes:
        name: of the layer.
        shape: [O, C, *kernel].
        positions: links at each kernel position, of the kernel's shape.
        slices: number of slices (kernel, input channel) with 0, 1, ... K links.
        sources: links that leave each input channel, [C].
        kernels: links of each kernel, [O].
    """

    name: str
    shape: tuple[int, ...]
    positions: Counts
    slices: Counts
    sources: Counts
    kernels: Counts

    @property
    def links(self) -> int:
        """Number of links."""
        return int(self.kernels.sum())

    @property
    def per_kernel(self) -> bool:
        """Whether every kernel has the same number of links, so that they do not compete within the layer."""
        return int(self.kernels.max() - self.kernels.min()) <= 1


def layer_links(name: str, mask: NDArray[np.bool_]) -> LayerLinks:
    """The counts of one mask, [O, C, *kernel].

    >>> mask = np.zeros((1, 2, 3, 3), dtype=bool)
    >>> mask[0, 0, 1, :2] = True
    >>> links = layer_links("conv", mask)
    >>> links.slices.tolist(), links.sources.tolist()
    ([1, 0, 1, 0, 0, 0, 0, 0, 0, 0], [2, 0])
    """
    kernels, channels, *kernel = mask.shape
    mask_OCK = mask.reshape(kernels, channels, -1)
    slices_OC = mask_OCK.sum(axis=2, dtype=np.int64)
    return LayerLinks(
        name=name.removesuffix(".weight"),
        shape=mask.shape,
        positions=mask_OCK.sum(axis=(0, 1), dtype=np.int64).reshape(kernel),
        slices=np.bincount(slices_OC.ravel(), minlength=mask_OCK.shape[2] + 1),
        sources=slices_OC.sum(axis=0),
        kernels=slices_OC.sum(axis=1),
    )


def links_of(run: Run) -> tuple[list[LayerLinks], str]:
    """The convolutions of a run in the order of its network, or none and why.

    Linear layers have no kernel positions, and are left out.
    """
    path = run.path / MASKS
    try:
        masks = safetensors.numpy.load_file(path)
    except FileNotFoundError:
        return [], ""
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        return [], f"{MASKS} of {run.name} cannot be read: {error}"
    known = list(table(run.summary, "layers")) or list(dict.fromkeys(str(row.get("layer")) for row in run.records))
    order = {name: index for index, name in enumerate(known)}
    names = sorted(masks, key=lambda name: (order.get(name, len(order)), _natural(name)))
    usable = [name for name in names if masks[name].ndim > 2 and masks[name].size]
    return [layer_links(name, masks[name].astype(bool)) for name in usable], ""


def _natural(name: str) -> list[tuple[int, str]]:
    """Names with their numbers as numbers."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]
