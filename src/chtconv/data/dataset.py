"""A data set as tensors: loaded, split, and with the statistics that normalise it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chtconv.data.columns import number_classes
from chtconv.data.decoded import decoded
from chtconv.data.sources import is_local, read_source
from chtconv.errors import ConfigurationError
from chtconv.randomness import generator

_CHUNK = 4096


@dataclass(frozen=True)
class ImageSet:
    """Images and their classes.

    Attributes:
        images: uint8 ``[N, 3, H, W]``, RGB.
        labels: int64 ``[N]``, class numbers.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ConfigurationError(f"images must be uint8 [N, 3, H, W], not {images.dtype} {list(images.shape)}")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ConfigurationError(
                f"labels must be int64 [{len(images)}], one for each image, not {labels.dtype} {list(labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set on one device.

    Attributes:
        name: as it was asked for.
        classes: the name of each class number.
        train: the training images that remain after the validation images are held out.
        validation: the images held out, None where none are.
        test: the test images.
        mean: float32 ``[3]``, of all pixels of a channel in ``train``, in units where white is 1.
        std: float32 ``[3]``, their population standard deviation; 1 for a channel that is constant.
        labels: digest of the classes and of the labels of all images, see :func:`labels_digest`.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSet
    validation: ImageSet | None
    test: ImageSet
    mean: Tensor
    std: Tensor
    labels: str


def load_dataset(
    name: str, *, image_size: int = 32, validation: int = 0, seed: int = 0, device: torch.device | str = "cpu"
) -> Dataset:
    """Load a data set into memory, ``N * 3 * image_size ** 2`` bytes of it.

    Args:
        name: ``digits`` (embedded: 1,797 digits of 8 x 8 pixels, the first 1,437 in file order for training); a
            folder with Parquet files (``train-*.parquet``, ``test-*.parquet``) or images
            (``train/CLASS/*.png``, ``test/CLASS/*.png``); or a data set of the Hugging Face Hub, ``OWNER/NAME``,
            fetched once. A validation split that comes with the source is ignored where there is a test split;
            of CIFAR-100's two labels the fine one is taken.
        image_size: height and width to which all images are brought, in pixels.
        validation: how many training images to hold out.
        seed: decides which ones, the same on every device.
        device: where the tensors go.

    Raises:
        ConfigurationError: a value is out of range, or the source cannot be found, read, or understood.

    >>> digits = load_dataset("digits", validation=100)
    >>> len(digits.train), len(digits.validation), len(digits.test)
    (1337, 100, 360)
    """
    if image_size < 1:
        raise ConfigurationError(f"image_size must be at least 1 pixel, not {image_size}")
    train_records, test_records = read_source(name)
    total = len(train_records.images)
    if not 0 <= validation < total:
        raise ConfigurationError(f"validation={validation}; accepted: 0 to {total - 1}, of {total} training images")
    classes, train_labels, test_labels = number_classes(train_records, test_records)
    train, held_out = hold_out(ImageSet(decoded(train_records, image_size), train_labels), validation, seed)
    test = ImageSet(decoded(test_records, image_size), test_labels)
    mean, std = channel_statistics(train.images)
    return Dataset(
        name,
        classes,
        train=_moved(train, device),
        validation=_moved(held_out, device) if validation else None,
        test=_moved(test, device),
        mean=mean.to(device),
        std=std.to(device),
        labels=labels_digest(classes, train_labels, test_labels),
    )


def fingerprint(name: str, validation: int = 0) -> dict[str, Any]:
    """What tells a data set from others of its name, without decoding an image; empty where it is not on this machine.

    Args:
        name: as :func:`load_dataset` takes it; nothing is fetched.
        validation: how many training images are held out.

    Returns:
        ``classes``, ``train``, ``validation`` and ``test``: how many there are; ``labels``: see :func:`labels_digest`.

    Raises:
        ConfigurationError: the source cannot be read or understood.

    >>> {key: value for key, value in fingerprint("digits", validation=100).items() if key != "labels"}
    {'classes': 10, 'train': 1337, 'validation': 100, 'test': 360}
    """
    if not is_local(name):
        return {}
    classes, train, test = number_classes(*read_source(name))
    return {
        "classes": len(classes),
        "train": len(train) - validation,
        "validation": validation,
        "test": len(test),
        "labels": labels_digest(classes, train, test),
    }


def labels_digest(classes: Sequence[str], train: Tensor, test: Tensor) -> str:
    """Digest of the names of the classes and of the labels of all images, int64 ``[N]``, in the order of the source."""
    digest = hashlib.blake2b("\0".join(classes).encode(errors="surrogatepass"), digest_size=16)
    for labels in (train, test):
        digest.update(b"\0" + str(labels.tolist()).encode())
    return digest.hexdigest()


def hold_out(images: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split off ``count`` images at random; both parts keep the order of the whole.

    >>> whole = ImageSet(torch.zeros(5, 3, 1, 1, dtype=torch.uint8), torch.arange(5))
    >>> rest, held_out = hold_out(whole, 2, seed=0)
    >>> len(rest), len(held_out)
    (3, 2)
    """
    held = torch.zeros(len(images), dtype=torch.bool)
    held[torch.randperm(len(images), generator=generator(seed, "validation"))[:count]] = True
    rest, held_out = (ImageSet(images.images[part], images.labels[part]) for part in (~held, held))
    return rest, held_out


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of each channel, float32 ``[3]`` each, in units where white is 1.

    Computed from how often each of the 256 values occurs, in integers: exact until the last division, whatever
    the number of images, and without a copy of them in floating point.

    Args:
        images: uint8 ``[N, 3, H, W]`` on the CPU.

    >>> mean, std = channel_statistics(torch.tensor([0, 255, 51]).to(torch.uint8).view(1, 3, 1, 1).repeat(2, 1, 2, 2))
    >>> mean, std
    (tensor([0.0000, 1.0000, 0.2000]), tensor([1., 1., 1.]))
    """
    count = images.numel() // images.shape[1]
    means, stds = [], []
    for channel in range(images.shape[1]):
        frequency = torch.zeros(256, dtype=torch.int64)
        for chunk in torch.split(images[:, channel], _CHUNK):
            frequency += torch.bincount(chunk.reshape(-1), minlength=256)
        total = sum(value * times for value, times in enumerate(frequency.tolist()))
        squares = sum(value * value * times for value, times in enumerate(frequency.tolist()))
        means.append(total / count / 255)
        variance = (count * squares - total * total) / count**2
        stds.append(variance**0.5 / 255 or 1.0)
    return torch.tensor(means, dtype=torch.float32), torch.tensor(stds, dtype=torch.float32)


def _moved(images: ImageSet, device: torch.device | str) -> ImageSet:
    return ImageSet(images.images.to(device), images.labels.to(device))
