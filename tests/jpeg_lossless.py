"""A plain encoder for JPEG's lossless process 14 with first-order prediction (ITU-T T.81, annex H)."""

import struct

import numpy as np


_CATEGORIES = range(17)  # bits that a difference takes


def encode(pixels: np.ndarray, bits: int) -> bytes:
    """Encode grey `pixels` `(height, width)` of so many bits with predictor 1, every category in five bits."""
    height, width = pixels.shape
    values = pixels.astype(int)
    predicted = np.empty_like(values)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0] = values[:-1, 0]
    predicted[0, 0] = 2 ** (bits - 1)
    stream = ""
    for difference in (values - predicted).ravel().tolist():
        category = abs(difference).bit_length()
        stream += f"{category:05b}"
        if category:
            stream += f"{difference if difference > 0 else difference + 2**category - 1:0{category}b}"
    stream += "1" * (-len(stream) % 8)
    data = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\x00")
    return b"".join([
        b"\xff\xd8",
        b"\xff\xc3" + struct.pack(">HBHHBBBB", 11, bits, height, width, 1, 1, 0x11, 0),
        b"\xff\xc4" + struct.pack(">HB16B", 19 + len(_CATEGORIES), 0, *[17 * (n == 5) for n in range(1, 17)]),
        bytes(_CATEGORIES),
        b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0),
        data,
        b"\xff\xd9",
    ])  # fmt: skip
