"""From encoded images to one uint8 tensor."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from chtconv.data.columns import Records
from chtconv.errors import ConfigurationError

# Named one by one because Pillow would start another program (Ghostscript) for some of the others.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
_ORIENTATION = 0x0112


def decode(records: Records, image_size: int) -> Tensor:
    """Decode every image as RGB, ``image_size`` pixels high and wide: uint8 ``[N, 3, image_size, image_size]``.

    Grey is replicated to three channels, transparency dropped. An image of another size is resized (bilinear,
    antialiased where it shrinks; its aspect ratio is not kept); one of the right size is taken bit for bit.
    Decoding is one loop: threads make it slower, since images this small spend their time in Python.

    Raises:
        ConfigurationError: an image cannot be decoded; the message names the split, the row and the file.
    """
    pixels = np.empty((len(records.images), 3, image_size, image_size), dtype=np.uint8)
    for row, image in enumerate(records.images):
        try:
            pixels[row] = decode_image(image, image_size).transpose(2, 0, 1)
        except Exception as error:  # Pillow's readers raise OSError, SyntaxError, ValueError, struct.error and others
            raise ConfigurationError(f"{records.where(row)}: broken image: {_reason(error)}") from error
    return torch.from_numpy(pixels)


def decode_image(image: Any, image_size: int) -> NDArray[np.uint8]:
    r"""Decode one image: uint8 ``[image_size, image_size, 3]``.

    Args:
        image: ``{"bytes": encoded or None, "path": file, read where there are no bytes}``.
        image_size: height and width, in pixels.

    >>> dot = b"P5 1 1 255 \x07"  # a grey image of one pixel
    >>> decode_image({"bytes": dot, "path": None}, 1)
    array([[[7, 7, 7]]], dtype=uint8)
    """
    from PIL import Image

    with Image.open(io.BytesIO(_encoded(image)), formats=_FORMATS) as opened:
        picture: Image.Image = opened
        if "exif" in picture.info and (turn := _turns().get(picture.getexif().get(_ORIENTATION, 1))) is not None:
            # Not by ImageOps.exif_transpose, which writes all the tags anew and takes offence at odd ones.
            picture = picture.transpose(turn)
        if picture.mode[0] in "IF":
            picture = Image.fromarray(_eight_bits(np.asarray(picture)))
        picture = picture.convert("RGB")
        if picture.size != (image_size, image_size):
            picture = picture.resize((image_size, image_size), Image.Resampling.BILINEAR)
        return np.asarray(picture)


def _turns() -> dict[int, Any]:
    """What brings a picture into the position that it is to be seen in, by the orientation in its EXIF tags."""
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip


def _encoded(image: Any) -> bytes:
    if not isinstance(image, dict):
        raise ValueError("it is missing")
    if image.get("bytes") is not None:
        return bytes(image["bytes"])
    if image.get("path") is None:
        raise ValueError("it is missing")
    return Path(image["path"]).read_bytes()


def _eight_bits(grey: NDArray[Any]) -> NDArray[np.uint8]:
    """Scale 16-bit grey to 8 bits: ``round(v / 257)``; Pillow's own conversion would cut all above 255 to white."""
    if grey.dtype.kind not in "iu" or grey.min() < 0 or grey.max() > 65535:
        raise ValueError("pixels are neither 8-bit nor 16-bit unsigned integers")
    return ((grey.astype(np.int64) + 128) // 257).astype(np.uint8)


def _reason(error: Exception) -> str:
    """What is wrong; Pillow's own message for data of no known format shows the address of a buffer."""
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"none of the formats {', '.join(_FORMATS)}"
    return str(error) or type(error).__name__
