"""Decoded images from the disk cache of the package, where these very images were decoded before.

Decoding CIFAR-10 takes seconds, which a grid of short runs pays once a run. The key is a digest of the encoded images
themselves, so that no file can be out of date; what is read is checked against its own digest, and is pixels, never
code (see :mod:`chtconv.cache`).
"""

import hashlib

import torch
from torch import Tensor

from chtconv.cache import cached
from chtconv.data.columns import Records
from chtconv.data.decode import decode

# Bytes of pixels: less is decoded in no time, and more would crowd out everything else in the cache.
_LEAST, _MOST = 2**24, 2**28
# To be raised when the meaning of the pixels changes.
_VERSION = 1


def decoded(records: Records, image_size: int) -> Tensor:
    """What :func:`chtconv.data.decode.decode` returns, uint8 ``[N, 3, image_size, image_size]``, read or decoded.

    Images that are files of their own are always decoded: their content is not at hand.

    Raises:
        ConfigurationError: an image cannot be decoded.
    """
    shape = len(records.images), 3, image_size, image_size
    key = _key(records, image_size) if _LEAST <= shape[0] * 3 * image_size**2 <= _MOST else None
    if key is None:
        return decode(records, image_size)
    return cached(key, shape, torch.uint8, lambda: decode(records, image_size))


def _key(records: Records, image_size: int) -> str | None:
    """Everything that the pixels depend on; None where some image is not in memory."""
    import PIL
    from PIL import features

    digest = hashlib.blake2b(digest_size=16)
    for image in records.images:
        encoded = image.get("bytes") if isinstance(image, dict) else None
        if not isinstance(encoded, bytes):
            return None
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    decoders = "/".join(str(features.version(name)) for name in ("jpg", "webp", "libtiff"))
    return f"images/{_VERSION}/{digest.hexdigest()}/{image_size}/Pillow {PIL.__version__}/{decoders}"
