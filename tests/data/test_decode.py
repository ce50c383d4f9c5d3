"""Every image as RGB of one size, against Pillow and numpy; hostile images by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from chtconv.data import load_dataset
from chtconv.data.columns import Records
from chtconv.data.decode import decode, decode_image
from chtconv.errors import ConfigurationError


def encoded(pixels: np.ndarray, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form, **options)
    return buffer.getvalue()


def decoded(data: bytes, size: int) -> np.ndarray:
    return decode_image({"bytes": data, "path": None}, size)


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)


def test_right_size_is_untouched_bit_for_bit(rgb):
    tensor = decode(Records("a", [{"bytes": encoded(rgb), "path": None}] * 2, [0, 0]), 9)
    assert tensor.shape == (2, 3, 9, 9)
    np.testing.assert_array_equal(tensor[1].numpy(), rgb.transpose(2, 0, 1))


def test_grey_is_replicated(rgb):
    grey = rgb[:, :, 0]
    np.testing.assert_array_equal(decoded(encoded(grey), 9), np.stack([grey] * 3, axis=2))


def test_sixteen_bit_grey_is_scaled_not_cut():
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for rest in (-128, 0, 128):  # half of a step of 257, both ways
        values = (ramp.astype(int) * 257 + rest).clip(0, 65535).astype(np.uint16)
        np.testing.assert_array_equal(decoded(encoded(values), 16)[:, :, 0], ramp)


def test_palette(rgb):
    quantised = Image.fromarray(rgb).quantize(8)
    buffer = io.BytesIO()
    quantised.save(buffer, "PNG")
    np.testing.assert_array_equal(decoded(buffer.getvalue(), 9), np.asarray(quantised.convert("RGB")))


def test_transparency_is_dropped(rgb):
    alpha = np.dstack([rgb, np.zeros((9, 9), np.uint8)])
    np.testing.assert_array_equal(decoded(encoded(alpha), 9), rgb)


def test_orientation_of_a_photograph_is_followed(rgb):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    np.testing.assert_array_equal(decoded(encoded(rgb, exif=exif), 9), np.rot90(rgb, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_followed_as_pillow_does(rgb, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(rgb, exif=exif)))))
    np.testing.assert_array_equal(decoded(encoded(rgb, exif=exif), 9), expected)


def test_odd_tags_beside_the_orientation_do_no_harm(rgb):
    """A resolution as text, which Pillow reads and cannot write again."""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0) + struct.pack("<HHII", 0x011A, 2, 3, 0x003231)
    exif = b"Exif\x00\x00II*\x00" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0)
    found = decoded(encoded(rgb, "JPEG", exif=exif, quality=100, subsampling=0), 9)
    assert np.abs(found.astype(int) - np.rot90(rgb, 2)).max() < 64


def test_bilinear_resize_of_two_pixels():
    steps = decoded(encoded(np.array([[0, 80], [0, 80]], dtype=np.uint8)), 4)[0, :, 0]
    assert steps.tolist() == [0, 20, 60, 80]


def test_other_sizes_are_resized_whatever_their_shape(rgb):
    assert decoded(encoded(rgb[:4]), 5).shape == (5, 5, 3)
    assert decoded(encoded(rgb), 1).shape == (1, 1, 3)


@pytest.mark.parametrize("form", ["BMP", "GIF", "TIFF", "PPM", "WEBP", "JPEG"])
def test_other_formats(form):
    flat = np.full((4, 4, 3), 200, dtype=np.uint8)
    np.testing.assert_allclose(decoded(encoded(flat, form), 4), flat, atol=3)


def not_an_image(png: bytes) -> bytes:
    return b"this is no image"


def no_bytes(png: bytes) -> bytes:
    return b""


def truncated(png: bytes) -> bytes:
    return png[: len(png) // 2]


def body_overwritten(png: bytes) -> bytes:
    return png[:45] + b"\x00" * 20 + png[65:]


def header_only(png: bytes) -> bytes:
    return png[:8]


def gigapixels(png: bytes) -> bytes:
    """A PNG that claims 100,000 x 100,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    return png[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def postscript(png: bytes) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "breakage", [not_an_image, no_bytes, truncated, body_overwritten, header_only, gigapixels, postscript]
)
def test_broken_image_is_named(breakage, rgb):
    good = encoded(rgb)
    images = [{"bytes": good, "path": None}, {"bytes": breakage(good), "path": "owl.png"}]
    with pytest.raises(ConfigurationError, match=r"data set birds, row 1 \(owl.png\): broken image: \w"):
        decode(Records("birds", images, [0, 0]), 9)


def test_no_other_program_is_started_for_postscript():
    with pytest.raises(ConfigurationError, match="broken image: none of the formats PNG"):
        decode(Records("birds", [{"bytes": postscript(b""), "path": None}], [0]), 9)


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": None}, 7])
def test_missing_image_is_named(image):
    with pytest.raises(ConfigurationError, match="data set birds, row 0: broken image: it is missing"):
        decode(Records("birds", [image], [0]), 9)


def test_image_whose_file_is_gone(tmp_path):
    with pytest.raises(ConfigurationError, match=r"row 0 \(.*gone.png\): broken image: .*No such file"):
        decode(Records("birds", [{"bytes": None, "path": str(tmp_path / "gone.png")}], [0]), 9)


def test_floating_point_image_is_refused():
    with pytest.raises(ValueError, match="neither 8-bit nor 16-bit"):
        decoded(encoded(np.zeros((2, 2), np.float32), "TIFF"), 2)


def test_broken_image_of_a_folder_is_named_with_its_file(tmp_path, picture):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(picture(0))
    (tmp_path / "test" / "dog" / "0.png").write_bytes(picture(0)[:60])
    with pytest.raises(ConfigurationError, match=r"split 'test', row 1 \(.*test/dog/0.png\): broken image"):
        load_dataset(str(tmp_path))


def test_broken_image_of_a_parquet_file_is_named_with_its_row(folder, write_parquet, picture):
    images = [{"bytes": picture(0), "path": None}, {"bytes": b"nothing", "path": None}]
    write_parquet(folder / "train.parquet", [0, 1], images=images)
    with pytest.raises(ConfigurationError, match="split 'train', row 1: broken image"):
        load_dataset(str(folder))
