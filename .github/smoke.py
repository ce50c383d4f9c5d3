"""Loads the compiled kernels of a wheel, without torch: ``python smoke.py FILE.whl``."""

import ctypes
import sys
import tempfile
import zipfile

NAME = "chtconv/sparse_compute/_native.so"

with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(sys.argv[1]) as wheel:
    library = ctypes.CDLL(wheel.extract(NAME, folder))
    print("interface version", library.chtconv_abi_version(), "instruction sets", bin(library.chtconv_supported()))
    if not library.chtconv_supported() & 1:
        sys.exit(f"{sys.argv[1]}: the kernels support no instruction set")
