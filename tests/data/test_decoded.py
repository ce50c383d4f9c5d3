"""Decoded images in the cache of the package: the same pixels, whatever is found there."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from chtconv.data import decoded as module
from chtconv.data.columns import Records
from chtconv.data.decode import decode
from chtconv.data.decoded import decoded


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHTCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_LEAST", 0)
    return tmp_path / "cache"


def records(seed: int = 0, count: int = 3) -> Records:
    images = []
    for pixels in np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    return Records("a", images, [0] * count)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Records]:
    """What was decoded, in order."""
    found: list[Records] = []

    def counting(some: Records, image_size: int) -> torch.Tensor:
        found.append(some)
        return decode(some, image_size)

    monkeypatch.setattr(module, "decode", counting)
    return found


def test_the_same_images_are_decoded_once(folder: Path, decodings: list[Records]) -> None:
    for _ in range(2):
        assert torch.equal(decoded(records(), 4), decode(records(), 4))
    assert len(decodings) == 1
    assert len(list(folder.iterdir())) == 1


def test_other_images_orders_and_sizes_are_other_pixels(folder: Path, decodings: list[Records]) -> None:
    one = records()
    reordered = Records("a", [*one.images[1:], one.images[0]], one.labels)
    # The same bytes in all, cut elsewhere, would be the same digest if the lengths were not in it.
    for some, size in ((one, 4), (one, 8), (reordered, 4), (records(seed=1), 4), (records(count=2), 4)):
        assert torch.equal(decoded(some, size), decode(some, size))
    assert len(decodings) == 5


def test_what_is_broken_is_decoded_again(folder: Path, decodings: list[Records]) -> None:
    decoded(records(), 4)
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert torch.equal(decoded(records(), 4), decode(records(), 4))
    assert len(decodings) == 2


def test_files_of_their_own_and_few_images_are_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = records(count=1)
    (tmp_path / "a.png").write_bytes(one.images[0]["bytes"])
    files = Records("a", [{"bytes": None, "path": str(tmp_path / "a.png")}], [0])
    assert torch.equal(decoded(files, 4), decode(one, 4))
    monkeypatch.setattr(module, "_LEAST", 2**20)
    assert torch.equal(decoded(one, 4), decode(one, 4))
    assert not folder.exists()
