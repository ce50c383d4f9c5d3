"""Loading: the embedded digits, the validation images, the statistics, CIFAR-10 where it lies beside the project."""

import io
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from chtconv.data import ImageSet, load_dataset
from chtconv.data.dataset import channel_statistics
from chtconv.errors import ConfigurationError

CIFAR10 = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10"


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", image_size=8)


def test_import_is_cheap():
    code = "import chtconv.data, sys; print(*{'datasets', 'PIL', 'pandas', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(("split", "first", "count"), [("train", 0, 1437), ("test", 1437, 360)])
def test_digits_are_those_of_the_files(digits, split, first, count):
    raw = (files("chtconv.data") / "digits" / f"{split}.parquet").read_bytes()
    rows = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))) for row in rows]
    part = getattr(digits, split)
    assert part.images.shape == (count, 3, 8, 8)
    for channel in range(3):
        np.testing.assert_array_equal(part.images[:, channel].numpy(), np.stack(images))
    assert part.labels.tolist() == [row["label"] for row in rows]
    assert [row["image"]["path"] for row in rows] == [f"{first + row:04d}.png" for row in range(count)]


def test_digits_as_published(digits):
    """The first line of the original file, a 0, and how many there are of each digit."""
    counts = [0, 0, 5, 13, 9, 1, 0, 0, 0, 0, 13, 15, 10, 15, 5, 0, 0, 3, 15, 2, 0, 11, 8, 0, 0, 4, 12, 0, 0, 8, 8, 0]
    counts += [0, 5, 8, 0, 0, 9, 8, 0, 0, 4, 11, 0, 1, 12, 7, 0, 0, 2, 14, 5, 10, 12, 0, 0, 0, 0, 6, 13, 10, 0, 0, 0]
    assert digits.train.images[0, 0].flatten().tolist() == [round(count * 255 / 16) for count in counts]
    assert digits.train.labels[0] == 0
    labels = torch.cat([digits.train.labels, digits.test.labels])
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert digits.classes == tuple("0123456789")


def test_digits_come_with_their_licence():
    text = (files("chtconv.data") / "digits" / "LICENSE").read_text()
    assert all(part in text for part in ("Alpaydin", "Kaynak", "10.24432/C50P49", "licenses/by/4.0"))


def test_statistics_against_numpy(digits):
    pixels = digits.train.images.numpy() / 255
    np.testing.assert_allclose(digits.mean.numpy(), pixels.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(digits.std.numpy(), pixels.std(axis=(0, 2, 3)), rtol=1e-6)
    assert (digits.mean.dtype, digits.std.dtype) == (torch.float32, torch.float32)


def test_statistics_of_channels_that_differ():
    images = torch.randint(256, (5000, 3, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 3
    images[:, 2] = 77
    mean, std = channel_statistics(images)
    pixels = images.numpy() / 255
    np.testing.assert_allclose(mean.numpy(), pixels.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), [*pixels[:, :2].std(axis=(0, 2, 3)), 1], rtol=1e-6)


def test_validation_images_are_held_out_of_train_and_statistics(digits):
    data = load_dataset("digits", image_size=8, validation=437, seed=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (1000, 437, 360)
    # Together they are the training set: the same multiset of images with their labels.
    whole = torch.cat([digits.train.images.flatten(1), digits.train.labels[:, None]], dim=1)
    parts = [torch.cat([part.images.flatten(1), part.labels[:, None]], dim=1) for part in (data.train, data.validation)]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())
    np.testing.assert_allclose(data.mean, (data.train.images.numpy() / 255).mean(axis=(0, 2, 3)), rtol=1e-6)
    assert not torch.equal(data.mean, digits.mean)
    assert torch.equal(data.test.images, digits.test.images)


def test_validation_images_depend_on_the_seed_alone():
    first, again, other = (load_dataset("digits", image_size=8, validation=100, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.validation.images, again.validation.images)
    assert not torch.equal(first.validation.images, other.validation.images)


def test_no_validation(digits):
    assert digits.validation is None
    assert digits.name == "digits"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"validation": -1}, "validation=-1; accepted: 0 to 1436, of 1437 training images"),
        ({"validation": 1437}, "validation=1437; accepted: 0 to 1436"),
        ({"validation": 10**9}, f"validation={10**9}; accepted: 0 to 1436"),
        ({"image_size": 0}, "image_size must be at least 1 pixel, not 0"),
        ({"image_size": -32}, "not -32"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(ConfigurationError, match=message):
        load_dataset("digits", **values)


def test_all_but_one_image_may_be_held_out(folder):
    data = load_dataset(str(folder), validation=5)
    assert (len(data.train), len(data.validation)) == (1, 5)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "images must be uint8"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"\[2, 1, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "labels must be int64"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), "float32"),
    ],
)
def test_image_set_refuses_other_tensors(images, labels, message):
    with pytest.raises(ConfigurationError, match=message):
        ImageSet(images, labels)


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not in ../shared/data/cifar10")
def test_cifar10(monkeypatch):
    monkeypatch.setenv("CHTCONV_CACHE", "")
    data = load_dataset(str(CIFAR10))
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert " ".join(data.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert [round(value, 4) for value in data.mean.tolist()] == [0.4914, 0.4822, 0.4465]
    assert [round(value, 4) for value in data.std.tolist()] == [0.247, 0.2435, 0.2616]
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    rows = pyarrow.parquet.read_table(CIFAR10 / "test-00000-of-00001.parquet").slice(9990).to_pylist()
    for image, label, row in zip(data.test.images[9990:], data.test.labels[9990:], rows, strict=True):
        oracle = np.asarray(Image.open(io.BytesIO(row["img"]["bytes"])))
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), oracle)
        assert label == row["label"]
