"""Heads of compressed streams: sizes as other readers see them; damage is one kind of error."""

from __future__ import annotations

from collections.abc import Callable

import imagecodecs as codecs
import numpy as np
import pytest

from cdt_runtime.codestream import CodestreamError, StreamHead, jpeg2000_head, jpeg_head, webp_size

RGB = np.zeros((6, 9, 3), np.uint8)
GRAY12 = np.full((6, 9), 4095, np.uint16)
J2K = codecs.jpeg2k_encode(RGB, level=0, reversible=True, codecformat="j2k")
JP2 = codecs.jpeg2k_encode(RGB, level=0, reversible=True, codecformat="jp2")
JPEG = codecs.jpeg8_encode(RGB)
LS = codecs.jpegls_encode(GRAY12)


@pytest.mark.parametrize(
    ("read", "data", "bits", "components"),
    [
        (jpeg_head, JPEG, 8, 3),
        (jpeg_head, codecs.jpeg8_encode(GRAY12, level=100, bitspersample=12), 12, 1),
        (jpeg_head, LS, 16, 1),
        (jpeg_head, JPEG[:2] + b"\xff\xff\xff" + JPEG[3:], 8, 3),
        (jpeg2000_head, J2K, 8, 3),
        (jpeg2000_head, JP2, 8, 3),
    ],
)
def test_heads(
    read: Callable[[bytes], StreamHead], data: bytes, bits: int, components: int
) -> None:
    assert read(data) == StreamHead(6, 9, bits, components, len(data))
    assert read(data + b"tail").end == len(data)
    assert read(data[:-2]).end == 0


def test_webp() -> None:
    assert webp_size(codecs.webp_encode(RGB, lossless=True)) == (6, 9)
    assert webp_size(codecs.webp_encode(RGB, level=50)) == (6, 9)


SIZ = J2K.index(b"\xff\x51")


@pytest.mark.parametrize(
    ("read", "data"),
    [
        (jpeg_head, b""),
        (jpeg_head, JPEG[1:]),
        (jpeg_head, JPEG[:20]),
        (jpeg_head, b"\xff\xd8\xff\xd9"),
        (jpeg_head, b"\xff\xd8" + b"\xff\xe0\0\0" * 9),
        (jpeg2000_head, JPEG),
        (jpeg2000_head, J2K[:42]),
        (jpeg2000_head, J2K[: SIZ + 3] + b"\0" + J2K[SIZ + 4 :]),  # a wrong length
        (jpeg2000_head, J2K[: SIZ + 6] + bytes(4) + J2K[SIZ + 10 :]),  # no width
        (webp_size, b"RIFF"),
    ],
)
def test_damage(read: Callable[[bytes], object], data: bytes) -> None:
    with pytest.raises(CodestreamError, match="frame header"):
        read(data)
