"""Batches made where the images lie: shuffled, flipped, cropped and normalised, with no host in the loop."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from chtconv.data.dataset import ImageSet
from chtconv.errors import ConfigurationError
from chtconv.randomness import generator


class Draw(NamedTuple):
    """What chance decided about one batch; on the device of the images.

    Attributes:
        chosen: int64 ``[B]``, which images.
        mirrored: bool ``[B]``, which of them are mirrored.
        offsets: int64 ``[B, 2]``, where the window of each lies, see :func:`crop_images`.
    """

    chosen: Tensor
    mirrored: Tensor
    offsets: Tensor


class Batches:
    """The batches of every epoch of a run.

    Epoch ``e`` depends on ``seed`` and ``e`` alone, the same on every device, so that a resumed run goes on without a
    replay. The order, the flips and the crops of an epoch do not depend on whether the other two are used, nor on the
    batch size.

    Args:
        images: what to draw from; the batches are made on its device.
        mean: float32 ``[3]``, subtracted from each channel, in units where white is 1.
        std: float32 ``[3]``, by which the difference is divided.
        batch_size: images a batch; the last batch of an epoch has those that remain.
        seed: of the run. None is for evaluation: the order is kept, ``flip`` and ``crop`` have no effect.
        flip: mirror each image left to right with probability 0.5.
        crop: pad by so many black pixels on each side, as is usual before normalisation, and take a window of the
            original size at random.
        memory_format: of the batches.

    Attributes:
        batch_size: images a batch, but for the last one of an epoch.

    Raises:
        ConfigurationError: ``batch_size`` is below 1, ``crop`` below 0, or there are no images.

    >>> images = ImageSet(torch.full((5, 3, 4, 4), 255, dtype=torch.uint8), torch.arange(5))
    >>> batches = Batches(images, mean=torch.full((3,), 0.5), std=torch.full((3,), 0.5), batch_size=2, seed=None)
    >>> [(round(batch.mean().item(), 4), labels.tolist()) for batch, labels in batches.epoch(0)]
    [(1.0, [0, 1]), (1.0, [2, 3]), (1.0, [4])]
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        mean: Tensor,
        std: Tensor,
        batch_size: int,
        seed: int | None,
        flip: bool = False,
        crop: int = 0,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1 image, not {batch_size}")
        if crop < 0:
            raise ConfigurationError(f"crop must be a number of pixels, 0 or more, not {crop}")
        if not len(images):
            raise ConfigurationError("there are no images to make batches of")
        self._images = images
        self._device = images.images.device
        mean, std = (value.to(self._device, torch.float64).view(1, 3, 1, 1) for value in (mean, std))
        # (x / 255 - mean) / std in one multiplication and one addition.
        self._scale = (1 / (255 * std)).float()
        self._shift = (-mean / std).float()
        self.batch_size = batch_size
        self._seed = seed
        self._flip = flip
        self._crop = crop
        self._memory_format = memory_format

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return -(-len(self._images) // self.batch_size)

    def epoch(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch: float32 ``[B, 3, H, W]``, normalised, and int64 ``[B]``, the class numbers."""
        if self._seed is None:
            for images, labels in self._split(self._images.images, self._images.labels):
                yield self._normalised(images), labels
            return
        for draw in self.draws(index):
            yield self.make(draw)

    def draws(self, index: int) -> Iterator[Draw]:
        """What chance decides in an epoch: drawn on the CPU and moved to the device at once, before the first batch.

        Raises:
            ConfigurationError: these batches are for evaluation.
        """
        if self._seed is None:
            raise ConfigurationError("seed=None: batches for evaluation are not drawn; accepted is a whole number")
        total = len(self._images)
        order = torch.randperm(total, generator=generator(self._seed, "order", index))
        source = generator(self._seed, "augment", index)
        # All are drawn for the whole epoch, used or not: what an option adds must not move what another one draws.
        mirrored = torch.rand(total, generator=source) < 0.5
        offsets = torch.randint(2 * self._crop + 1, (total, 2), generator=source)
        for each in self._split(*(drawn.to(self._device) for drawn in (order, mirrored, offsets))):
            yield Draw(*each)

    def make(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """The batch of a draw: float32 ``[B, 3, H, W]``, normalised, and int64 ``[B]``. Waits for no device."""
        images = self._images.images.index_select(0, draw.chosen)
        if self._flip:
            images = flip_images(images, draw.mirrored)
        if self._crop:
            images = crop_images(images, draw.offsets, self._crop)
        return self._normalised(images), self._images.labels.index_select(0, draw.chosen)

    def _split(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(torch.split(tensor, self.batch_size) for tensor in tensors), strict=True)

    def _normalised(self, images: Tensor) -> Tensor:
        pixels = images.to(torch.float32, memory_format=self._memory_format)
        return torch.addcmul(self._shift, pixels, self._scale)


def flip_images(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror those images ``[B, 3, H, W]`` left to right for which ``mirrored``, bool ``[B]``, is set.

    >>> flip_images(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([True, False])).flatten().tolist()
    [2, 1, 3, 4]
    """
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def crop_images(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Cut a window of the original size out of each image, padded with zeros on each side.

    Args:
        images: ``[B, C, H, W]``.
        offsets: int64 ``[B, 2]``, first row and first column of the window in the padded image, each from 0 to
            ``2 * padding``; ``padding`` is the image itself.
        padding: in pixels.

    Returns:
        ``[B, C, H, W]``.

    >>> crop_images(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([[2, 1]]), 1).flatten().tolist()
    [3, 4, 0, 0]
    """
    height, width = images.shape[-2:]
    # Every window there is, as a view of the padded images: picking one of each image is then the only copy.
    windows_BCYXHW = functional.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows_BCYXHW[torch.arange(len(images), device=images.device), :, offsets[:, 0], offsets[:, 1]]
