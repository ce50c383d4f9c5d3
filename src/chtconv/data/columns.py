"""From a split of any source to its encoded images and its class numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chtconv.errors import ConfigurationError

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "fine_label")
_ROWS = 1000


@dataclass(frozen=True)
class Records:
    """One split as its source holds it.

    Attributes:
        name: the data set and the split, for messages.
        images: for each row the encoded image, ``{"bytes": ..., "path": ...}``; one of them may be None.
        labels: for each row an integer or a string, not yet checked.
        classes: the names behind the integers, where the source gives them.
    """

    name: str
    images: Sequence[Any]
    labels: Sequence[Any]
    classes: tuple[str, ...] | None = None

    def where(self, row: int) -> str:
        """Say where a row is, with its file where that is known.

        >>> Records("digits, split 'test'", [{"bytes": b"", "path": "7.png"}], [3]).where(0)
        "data set digits, split 'test', row 0 (7.png)"
        """
        image = self.images[row]
        path = image.get("path") if isinstance(image, dict) else None
        return f"data set {self.name}, row {row}" + (f" ({path})" if path else "")


def read_records(dataset: str, name: str, split: Any) -> Records:
    """Find the two columns of a split and read them, images still encoded.

    Args:
        dataset: the name of the data set, for messages.
        name: the name of the split.
        split: a ``datasets.Dataset`` or ``datasets.IterableDataset``.

    Raises:
        ConfigurationError: a column is missing or ambiguous, or there are no rows.
    """
    import datasets

    # A source without a schema (CSV) has its columns in the first row.
    features = split.features or dict.fromkeys(next(iter(split), {}))
    title = f"{dataset!r}, split {name!r}"
    image, label = image_column(title, features), label_column(title, features)
    split = split.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    images: list[Any] = []
    labels: list[Any] = []
    for rows in split.iter(_ROWS):
        images += rows[image]
        labels += rows[label]
    if not images:
        raise ConfigurationError(f"data set {title} has no images")
    feature = features[label]
    classes = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return Records(title, images, labels, classes)


def image_column(title: str, features: Mapping[str, Any]) -> str:
    """Find the column of images: by its type, by the fields ``bytes`` and ``path``, or by its name."""
    import datasets

    typed = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    structs = [column for column, feature in features.items() if isinstance(feature, dict) and "bytes" in feature]
    for found in (typed, structs, [column for column in _IMAGE_NAMES if column in features]):
        named = [column for column in _IMAGE_NAMES if column in found]
        if named or len(found) == 1:
            return (named or found)[0]
        if found:
            raise ConfigurationError(f"data set {title} has several image columns: {_listed(found)}; keep one")
    raise ConfigurationError(
        f"data set {title} has no image column (of type Image, or named image or img); its columns are "
        f"{_listed(features)}"
    )


def label_column(title: str, features: Mapping[str, Any]) -> str:
    """Find the column of labels: ``label``, ``labels`` or ``fine_label``, or else the only one with class names.

    CIFAR-100 has ``fine_label`` (100 classes) and ``coarse_label`` (20): it is the 100 classes that are learned.
    """
    import datasets

    for column in _LABEL_NAMES:
        if column in features:
            return column
    typed = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(typed) == 1:
        return typed[0]
    raise ConfigurationError(
        f"data set {title} has no label column ({', '.join(_LABEL_NAMES)}, or one column with class names); its "
        f"columns are {_listed(features)}"
    )


def number_classes(train: Records, test: Records) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """The names of the classes, and the class number of every image, int64 ``[N]``, in training and in test.

    Integers are numbers already: 0 to n - 1. Strings are numbered in sorted order.

    Raises:
        ConfigurationError: a label is missing, neither integer nor string, out of range, or in the test split only.

    >>> train = Records("pets", [{}] * 3, ["dog", "cat", "dog"])
    >>> number_classes(train, Records("pets", [{}], ["cat"]))
    (('cat', 'dog'), tensor([1, 0, 1]), tensor([0]))
    """
    classes, numbers = _numbering(train)
    train_numbers, test_numbers = (_look_up(records, numbers, classes) for records in (train, test))
    unseen = set(test_numbers) - set(train_numbers)
    if unseen:
        row = next(row for row, number in enumerate(test_numbers) if number in unseen)
        raise ConfigurationError(f"{test.where(row)}: no training image has the class {classes[test_numbers[row]]!r}")
    return classes, torch.tensor(train_numbers), torch.tensor(test_numbers)


def _numbering(train: Records) -> tuple[tuple[str, ...], dict[Any, int]]:
    """The names of the classes, and the class number of each label that may occur."""
    if train.classes is not None:
        return train.classes, {number: number for number in range(len(train.classes))}
    for row, label in enumerate(train.labels):
        if not isinstance(label, int | str) or not isinstance(label, type(train.labels[0])):
            raise ConfigurationError(f"{train.where(row)}: label {label!r}; accepted: all integers, or all strings")
    labels = sorted(set(train.labels))
    if isinstance(labels[0], int) and labels != list(range(len(labels))):
        raise ConfigurationError(
            f"data set {train.name}: integer labels must be 0 to n - 1, all of them in use; these are {len(labels)} "
            f"labels from {labels[0]} to {labels[-1]}"
        )
    return tuple(map(str, labels)), {label: number for number, label in enumerate(labels)}


def _look_up(records: Records, numbers: Mapping[Any, int], classes: Sequence[str]) -> list[int]:
    """The class number of every row."""
    for row, label in enumerate(records.labels):
        if not isinstance(label, int | str) or label not in numbers:
            keys = list(numbers)
            raise ConfigurationError(
                f"{records.where(row)}: label {label!r} is none of the {len(classes)} classes of the training split, "
                f"{keys[0]!r} to {keys[-1]!r}"
            )
    return [numbers[label] for label in records.labels]


def _listed(columns: Any) -> str:
    return ", ".join(map(repr, columns)) or "none"
