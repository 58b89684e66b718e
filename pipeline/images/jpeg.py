"""The C functions of _jpeg.c, registered for compiled code, and full decoding for everything else.

Decoding is libjpeg-turbo's with its exact inverse transform: the pixels are those that PIL gives.
"""

import ctypes

import llvmlite.binding as llvm
import numpy as np
from numpy.typing import NDArray

try:
    from softshard.pipeline.images import _jpeg
except ImportError:
    raise ImportError(
        "softshard.pipeline.images: expected the compiled module _jpeg, found none; run `pip install -e .` in "
        "the checkout"
    ) from None

_library = ctypes.CDLL(_jpeg.__file__)
for _name in ("softshard_decode", "softshard_crc32"):
    llvm.add_symbol(_name, ctypes.cast(getattr(_library, _name), ctypes.c_void_p).value)

_library.softshard_decode.argtypes = [
    ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p,
    ctypes.c_void_p,
]  # fmt: skip


def decode(jpeg: bytes, height: int, width: int) -> NDArray[np.uint8] | None:
    """A gray or YCbCr JPEG as RGB, uint8 [height, width, 3]; None when it is not that, or not whole."""
    return _decode(jpeg, height, width, 1)


def decodes(jpeg: bytes, height: int, width: int) -> bool:
    """Whether `decode` gives an image. An eighth of each side is decoded, which still reads every byte."""
    return _decode(jpeg, height, width, 8) is not None


def jpeg_version() -> str:
    """The version of libjpeg-turbo that the extension was built with."""
    number = _library.softshard_jpeg_version()
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _decode(jpeg: bytes, height: int, width: int, denominator: int) -> NDArray[np.uint8] | None:
    scaled = (-(-height // denominator), -(-width // denominator))
    image, decoded_box = np.empty((*scaled, 3), np.uint8), np.empty(4, np.int64)
    wanted_box = np.array([0, 0, *scaled], np.int64)
    status = _library.softshard_decode(
        jpeg,
        len(jpeg),
        height,
        width,
        wanted_box.ctypes.data,
        denominator,
        image.ctypes.data,
        decoded_box.ctypes.data,
    )
    return None if status else image
