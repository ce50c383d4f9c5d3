"""Data sets small enough to write for each test."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

Picture = Callable[..., bytes]
WriteParquet = Callable[..., Path]

datasets.disable_progress_bars()


@pytest.fixture
def picture() -> Picture:
    """A function that encodes a random image of a number, so that images of different numbers differ."""

    def encode(number: int, size: int = 6) -> bytes:
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def write_parquet(picture: Picture) -> WriteParquet:
    """A function that writes FOLDER/train.parquet and the like in the Hub's schema, or with what is replaced."""

    def write(
        file: Path,
        labels: Sequence[Any] = (0, 1, 0, 1),
        *,
        images: Sequence[Any] | None = None,
        classes: Sequence[str] | None = ("cat", "dog"),
        names: tuple[str, str] = ("image", "label"),
        image_feature: Any = None,
        more: dict[str, tuple[Any, Sequence[Any]]] | None = None,
    ) -> Path:
        if images is None:
            images = [{"bytes": picture(row), "path": f"{row}.png"} for row in range(len(labels))]
        string = any(isinstance(label, str) for label in labels)
        value = datasets.Value("string" if string else "int64")
        image, label = names
        features = {
            image: datasets.Image() if image_feature is None else image_feature,
            label: value if classes is None else datasets.ClassLabel(names=list(classes)),
        }
        columns = {image: list(images), label: list(labels)}
        for column, (feature, values) in (more or {}).items():
            features[column], columns[column] = feature, list(values)
        file.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(file))
        return file

    return write


@pytest.fixture
def folder(tmp_path: Path, write_parquet: WriteParquet) -> Path:
    """A good data set: six training images, two test images."""
    write_parquet(tmp_path / "train.parquet", [0, 1, 0, 1, 1, 0])
    write_parquet(tmp_path / "test.parquet", [1, 0])
    return tmp_path
