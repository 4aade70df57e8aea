"""Arrays of whole numbers as short text, for states: the narrowest integers that hold them, possibly deflated, as base64.

Text is "=n" where all entries are n, else "<itemsize><mark><bits>:<base64>". bits: how many zero bits at their end all entries
have lost (the keys of scores in single precision have 29 of them). mark "-": entries one after the other; "z": all first bytes,
all second bytes, and so on, deflated.
"""

from __future__ import annotations

import base64
import zlib

import numpy as np

_WORTH_BYTES = 2048  # deflating less gains little


def pack(array: np.ndarray, *, deflate: bool) -> str:
    """array: int64, none negative, or uint64."""
    if not len(array):
        return "=0"
    top = int(array.max())
    if int(array.min()) == top:
        return f"={top}"
    used = int(np.bitwise_or.reduce(array))
    bits = (used & -used).bit_length() - 1
    top >>= bits
    width = 1 if top < 1 << 8 else 2 if top < 1 << 16 else 4 if top < 1 << 32 else 8
    narrow = (array >> array.dtype.type(bits) if bits else array).astype(f"<u{width}")
    if deflate and narrow.nbytes >= _WORTH_BYTES:
        data, mark = _deflated(narrow, width), "z"
    else:
        data, mark = narrow.tobytes(), "-"
    return f"{width}{mark}{bits}:{base64.b64encode(data).decode('ascii')}"


def unpack(text: str, length: int) -> np.ndarray:
    """The array, uint64."""
    if text[0] == "=":
        return np.full(length, int(text[1:]), np.uint64)
    head, _, body = text.partition(":")
    data = base64.b64decode(body)
    if head[1] == "z":
        planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(int(head[0]), length)
        data = np.ascontiguousarray(planes.T)
    narrow = np.frombuffer(data, f"<u{head[0]}")
    return narrow.astype(np.uint64) << np.uint64(head[2:])


def _deflated(array: np.ndarray, width: int) -> bytes:
    planes = np.ascontiguousarray(array.view(np.uint8).reshape(len(array), width).T)
    squeeze = zlib.compressobj(1, strategy=zlib.Z_RLE)  # there are no repeated texts to look for: twice as quick as the default
    return squeeze.compress(planes.tobytes()) + squeeze.flush()
