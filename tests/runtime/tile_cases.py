"""Tile files of every kind, made on the spot: what is read, and what is refused with which line."""

from __future__ import annotations

import io
import struct
import zlib

import imagecodecs
import numpy as np
import tifffile
from PIL import Image
from tiff_builder import LONG, RATIONAL, SHORT, build, gray

RNG = np.random.default_rng(20240517)
RGB8 = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
GRAY8 = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
GRAY16 = RNG.integers(0, 4096, (20, 30), dtype=np.uint16)
MARKERS = RNG.integers(0, 4096, (3, 20, 30), dtype=np.uint16)
NAMES = ("DAPI", "CD3", "PanCK")
OME = {"axes": "CYX", "Channel": {"Name": list(NAMES)}}


def written(array: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def photo(array: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(**options: object) -> bytes:
    return written(RGB8, photometric="rgb", **options)


def palette_tiff() -> tuple[bytes, np.ndarray]:
    table = RNG.integers(0, 65536, (3, 256), dtype=np.uint16)
    colours = (table >> 8).astype(np.uint8).T
    return written(GRAY8, photometric="palette", colormap=table), colours[GRAY8]


def png_raw(
    width: int, height: int, depth: int, colour: int, rows: bytes, interlace: int = 0
) -> bytes:
    """A PNG of rows with their filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


PALETTE, PALETTE_COLOURS = palette_tiff()
PACKED4 = np.array([[0, 1, 7, 15]], np.uint8)
RGBA = np.dstack([RGB8, np.full((20, 30), 255, np.uint8)])
GLASS = np.dstack([RGB8, GRAY8])

# name, file, pixels (H, W, C), channels, bits
READ: list[tuple[str, bytes, np.ndarray, tuple[str, ...], int]] = [
    ("rgb", rgb(), RGB8, ("R", "G", "B"), 8),
    ("rgb deflate predictor", rgb(compression="zlib", predictor=True), RGB8, ("R", "G", "B"), 8),
    ("rgb lzw tiled", rgb(compression="lzw", tile=(16, 16)), RGB8, ("R", "G", "B"), 8),
    ("rgb packbits strips", rgb(compression="packbits", rowsperstrip=7), RGB8, ("R", "G", "B"), 8),
    ("rgb zstd", rgb(compression="zstd"), RGB8, ("R", "G", "B"), 8),
    ("rgb lzma", rgb(compression="lzma"), RGB8, ("R", "G", "B"), 8),
    ("rgb jpeg 2000", rgb(compression="jpeg2000"), RGB8, ("R", "G", "B"), 8),
    ("rgb webp lossless", rgb(compression="webp", compressionargs={"lossless": True}),
     RGB8, ("R", "G", "B"), 8),
    ("rgb planar",
     written(RGB8.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
     RGB8, ("R", "G", "B"), 8),
    ("rgb big-endian 16 bit", written(RGB8.astype("u2") * 257, photometric="rgb", byteorder=">"),
     RGB8.astype("u2") * 257, ("R", "G", "B"), 16),
    ("bigtiff big-endian", rgb(bigtiff=True, byteorder=">"), RGB8, ("R", "G", "B"), 8),
    ("opaque alpha", written(RGBA, photometric="rgb", extrasamples=[2]), RGB8, ("R", "G", "B"), 8),
    ("palette", PALETTE, PALETTE_COLOURS, ("R", "G", "B"), 8),
    ("gray 16", written(GRAY16), GRAY16[..., None], ("gray",), 16),
    ("gray 12 in 16, MaxSampleValue",
     written(GRAY16, extratags=[(281, 3, 1, 4095, True)]), GRAY16[..., None], ("gray",), 12),
    ("gray 12 packed", build(gray(1, 2, b"\xff\xf8\x00", t258=(SHORT, [12]))),
     np.array([[[4095], [2048]]], np.uint16), ("gray",), 12),
    ("gray 4", build(gray(1, 4, b"\x01\x7f", t258=(SHORT, [4]))),
     PACKED4[..., None] * 17, ("gray",), 8),
    ("gray 2", build(gray(1, 4, b"\x1b", t258=(SHORT, [2]))),
     np.array([[0, 85, 170, 255]], np.uint8)[..., None], ("gray",), 8),
    ("white is zero",
     
     written(GRAY8, photometric="miniswhite"), 255 - GRAY8[..., None], ("gray",), 8),
    ("white is zero, 12 bits",
     
     build(gray(1, 2, b"\xff\xf8\x00", t258=(SHORT, [12]), t262=(SHORT, [0]))),
     np.array([[[0], [2047]]], np.uint16), ("gray",), 12),
    ("signed 16", written(GRAY16.astype("i2")), GRAY16.astype("i2")[..., None], ("gray",), 15),
    ("unsigned 32", written(GRAY16.astype("u4")), GRAY16.astype("u4")[..., None], ("gray",), 32),
    ("float predictor", written(GRAY16.astype("f4") / 4095, compression="zlib", predictor=3),
     (GRAY16.astype("f4") / 4095)[..., None], ("gray",), 32),
    ("double", written(GRAY16 / 4096), (GRAY16 / 4096).astype("f4")[..., None], ("gray",), 32),
    ("ome channels", written(MARKERS, ome=True, metadata=OME), MARKERS.transpose(1, 2, 0),
     NAMES, 16),
    ("ome significant bits", written(MARKERS, ome=True, metadata=OME | {"SignificantBits": 12}),
     MARKERS.transpose(1, 2, 0), NAMES, 12),
    ("tifffile channels", written(MARKERS, photometric="minisblack", metadata=OME),
     MARKERS.transpose(1, 2, 0), NAMES, 16),
    ("lsb first", build(gray(1, 2, b"\x80\x01", t266=(SHORT, [2]))),
     np.array([[[1], [128]]], np.uint8), ("gray",), 8),
    ("png rgb", photo(RGB8, "PNG"), RGB8, ("R", "G", "B"), 8),
    ("png opaque alpha", photo(RGBA, "PNG"), RGB8, ("R", "G", "B"), 8),
    ("png gray", photo(GRAY8, "PNG"), GRAY8[..., None], ("gray",), 8),
    ("png gray 16", photo(GRAY16, "PNG"), GRAY16[..., None], ("gray",), 16),
    ("png gray alpha", photo(np.dstack([GRAY8, GRAY8 * 0 + 255]),
     "PNG"), GRAY8[..., None], ("gray",), 8),
    ("png gray 4", png_raw(4, 1, 4, 0, b"\0\x01\x7f"), PACKED4[..., None] * 17, ("gray",), 8),
    ("png rgb 16", imagecodecs.png_encode(RGB8.astype("u2") * 257), RGB8.astype("u2") * 257,
     ("R", "G", "B"), 16),
    ("png interlaced", png_raw(3, 1, 8, 0, b"\0\x01" b"\0\x02" b"\0\x03", interlace=1),
     np.array([[1, 3, 2]], np.uint8)[..., None], ("gray",), 8),
    ("png palette", photo(RGB8 // 128 * 128, "PNG", "P"),
     np.asarray(Image.fromarray(RGB8 // 128 * 128).convert("P").convert("RGB")), ("R", "G",
     "B"), 8),
]  # fmt: skip


def bad_jpeg_strip() -> bytes:
    """A JPEG strip without its end: decoders fill the rest with gray and only warn."""
    jpeg = photo(RGB8, "JPEG")
    return build(
        gray(20, 30, jpeg[:-20], t259=(SHORT, [7]), t262=(SHORT, [6]),
             t258=(SHORT, [8, 8, 8]), t277=(SHORT, [3]))
    )  # fmt: skip


def ome_text(**changes: str) -> bytes:
    facts = {"SizeX": "30", "SizeY": "20", "SizeC": "3", "SizeZ": "1", "SizeT": "1"} | changes
    inside = facts.pop("inside", "")
    pairs = " ".join(f'{key}="{value}"' for key, value in facts.items())
    return (
        f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        f'<Pixels DimensionOrder="XYCZT" Type="uint16" {pairs}>{inside}</Pixels></Image></OME>'
    ).encode()


def with_text(text: bytes) -> bytes:
    return written(MARKERS, photometric="minisblack", description=text, metadata=None)


def one_pixel_tiles() -> bytes:
    tags = {
        322: (LONG, [1]),
        323: (LONG, [1]),
        256: (LONG, [8000]),
        257: (LONG, [8000]),
    }
    page = gray(1, 1, b"\0")
    return build({"tags": page["tags"] | tags, "data": [b"\0"]})


def bomb() -> bytes:
    """A strip of a few bytes that inflates to 50 MB."""
    return build(gray(10, 10, zlib.compress(bytes(50_000_000)), t259=(SHORT, [8])))


def png_of(width: int, height: int) -> bytes:
    data = bytearray(photo(GRAY8, "PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def png_rows_missing() -> bytes:
    """A whole, well-formed PNG whose pixels end after 5 of 20 rows."""
    return png_raw(30, 20, 8, 0, b"".join(b"\0" + row.tobytes() for row in GRAY8[:5]))


def changed(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def jpeg_of(width: int, height: int) -> bytes:
    data = photo(GRAY8, "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def animated_png() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(RGB8), Image.fromarray(255 - RGB8)]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


J2K = imagecodecs.jpeg2k_encode(GRAY8, level=0, reversible=True, codecformat="j2k")
NAN = np.full((4, 4), np.nan, np.float32)
DOCTYPE = b'<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a "b">]>' + ome_text()
TWO_FILES = "".join(
    f'<TiffData IFD="0" FirstC="{at}"><UUID FileName="{name}">urn:uuid:0</UUID></TiffData>'
    for at, name in enumerate(("tile.tif", "../secret.tif", "../secret.tif"))
)
TWICE = '<TiffData IFD="0" FirstC="0"/><TiffData IFD="0" FirstC="1"/><TiffData IFD="1" FirstC="2"/>'

# name, file, what the line says
REFUSED: list[tuple[str, bytes, str]] = [
    ("empty", b"", r"is empty \(0 bytes\)"),
    ("text", b"hello, tile", "is not a TIFF, PNG or JPEG"),
    ("gif", b"GIF89a" + bytes(50), "is not a TIFF, PNG or JPEG"),
    ("tiff header only", b"II*\0\0\0\0\0", "header but no image behind it"),
    ("tiff header cut", b"II*\0", "the TIFF header lies at bytes 4 to 8 of a file of 4"),
    ("bigtiff header odd", b"II+\0\x04\0\0\0" + bytes(8),
     r"damaged BigTIFF header \(offset size 4\)"),
    ("offset outside", b"II*\0\xff\xff\xff\x7f", "TIFF page 0 lies at bytes 2147483647"),
    ("truncated", rgb()[:1500], "of a file of 1500: the file is truncated"),
    ("truncated inside deflate",
     
     build(gray(20, 30, zlib.compress(GRAY8.tobytes())[:-40], t259=(SHORT, [8]))),
     "does not decode as deflate"),
    ("short strip", build(gray(20, 30, GRAY8.tobytes()[:-1])),
     "holds 599 bytes of pixels, expected 600"),
    ("jpeg strip cut", bad_jpeg_strip(), "a JPEG segment ends before its end marker"),
    ("jpeg 2000 strip cut", build(gray(20, 30, J2K[:-20], t259=(SHORT, [34712]))),
     "a JPEG 2000 segment ends before its end marker: truncated"),
    ("webp strip without header", build(gray(20, 30, bytes(99), t259=(SHORT, [50001]))),
     r"does not decode as WebP \(no frame header\): damaged"),
    ("pages loop", build(gray(2, 2, bytes(4)), loop=True),
     "chain of TIFF pages loops back after page 1"),
    ("too many pages", build(*[gray(1, 1, b"\0") for _ in range(513)]), "more than 512 TIFF pages"),
    ("no tags", b"II*\0\x08\0\0\0\0\0\0\0\0\0", "claims 0 tags, expected 1 to 1024"),
    ("zero width", build(gray(1, 0, b"\0")), "is 0 x 1 pixels"),
    ("no width", build({"tags": {257: (LONG, [1])}, "data": [b"\0"]}),
     "ImageWidth of page 0 is missing"),
    ("width is text", build(gray(1, 1, b"\0", t256=(2, [49]))), "ImageWidth of page 0 has type 2"),
    ("65535 x 65535", build(gray(65535, 65535, b"\0")),
     r"over the limit of 64 Mpixel a tile: use --slide, or crop a tile$"),
    ("too many bytes", build(gray(8000, 8000, b"\0", t277=(SHORT, [100]))),
     "decodes to 6104 MiB, over the"),
    ("1 x 1 tiles", one_pixel_tiles(), "cut into 64000000 segments of 1 x 1 pixels"),
    ("zip bomb", bomb(), "does not decode as deflate"),
    ("segment missing", build(gray(20, 30, GRAY8.tobytes(), t278=(LONG, [10]))),
     "lists 1 segment offsets and 1 sizes where the image needs 2"),
    ("sparse", build(gray(2, 2, bytes(4)) | {"sparse": True}), r"segments without data \(sparse\)"),
    ("65535 samples", build(gray(1, 1, b"\0", t277=(SHORT, [65535]))), "SamplesPerPixel is 65535"),
    ("many values", build(gray(1, 1, b"\0", t284=(SHORT, [1] * 2000))), "claims 2000 values"),
    ("huge segment", build(gray(1, 1, bytes(70_000), t259=(SHORT, [8]))), "segment of 70000 bytes"),
    ("unequal bits", build(gray(1, 1, b"\0\0\0", t277=(SHORT, [3]), t258=(SHORT, [5, 6, 5]))),
     r"BitsPerSample of page 0 is \(5, 6, 5\)"),
    ("volume", build(gray(1, 1, b"\0", t32997=(LONG, [4]))), "is a volume"),
    ("complex", written(np.ones((4, 4), np.complex64)), "64-bit complex samples"),
    ("int64", written(np.ones((4, 4), np.int64)), "64-bit signed samples"),
    ("int8", written(np.ones((4, 4), np.int8)), "8-bit signed samples"),
    ("nan", written(NAN), "holds 16 samples that are NaN or infinite"),
    ("overflow", written(np.full((4, 4), 1e300)), "16 samples that are NaN or infinite"),
    ("bilevel", written(GRAY8 > 128, photometric="minisblack"), "is bilevel"),
    ("float white is zero",
     
     build(gray(1, 1, bytes(4), t258=(SHORT, [32]), t262=(SHORT, [0]), t339=(SHORT, [3]))),
     "MINISWHITE with signed or float"),
    ("12 bits broken", written(GRAY16 * 16, extratags=[(281, 3, 1, 4095, True)]),
     "says 12 significant bits but holds the value"),
    ("palette cut", build(gray(1, 1, b"\0", t262=(SHORT, [3]), t320=(SHORT, [1, 2, 3]))),
     "a palette of 3 values"),
    ("cmyk", written(RGBA, photometric="separated"), "is CMYK"),
    ("lab", written(RGB8, photometric="cielab"), "is CIE Lab"),
    ("raw ycbcr", build(gray(1, 1, b"\0\0\0", t277=(SHORT, [3]), t262=(SHORT, [6]))),
     "is raw YCbCr"),
    ("unknown photometric", build(gray(1, 1, b"\0", t262=(SHORT, [99]))),
     "PhotometricInterpretation 99"),
    ("rgb of one sample", build(gray(1, 1, b"\0", t262=(SHORT, [2]))),
     "says it is RGB but has 1 samples"),
    ("fax", build(gray(1, 1, b"\0", t259=(SHORT, [4]))), "TIFF compression 4 is not read"),
    ("predictor", build(gray(1, 1, b"\0", t317=(SHORT, [9]))), "predictor 9 on unsigned samples"),
    ("orientation", build(gray(1, 1, b"\0", t274=(SHORT, [9]))), "Orientation 9, expected 1 to 8"),
    ("glass", written(GLASS, photometric="rgb", extrasamples=[2]), "not an opaque alpha"),
    ("tag twice",
     
     build(gray(1, 1, b"\0")).replace(b"\x01\x01\x04\0", b"\0\x01\x04\0", 1),
     "ImageWidth stands twice"),
    ("no names", written(MARKERS, photometric="minisblack"),
     "3 channels without names: .* --channels"),
    ("names that count",
     written(MARKERS, ome=True, metadata=OME | {"Channel": {"Name": ["C:0", "C:1",
     "C:2"]}}),
     "3 channels without names"),
    ("one name twice",
     written(MARKERS, ome=True, metadata=OME | {"Channel": {"Name": ["CD3", "cd-3",
     "CD8"]}}),
     "one channel name twice"),
    ("unlike pages", build(gray(1, 1, b"\0"), gray(2, 2, bytes(4))), "holds 2 unlike pages"),
    ("colour pages", written(np.stack([RGB8, RGB8]), photometric="rgb"), "holds 2 colour pages"),
    ("tifffile z", written(MARKERS, photometric="minisblack", metadata={"axes": "ZYX"}),
     r"\(Z = 3\)"),
    ("ome z", written(MARKERS, ome=True, metadata={"axes": "ZYX"}), r"stack of planes \(Z = 3\)"),
    ("ome t", written(MARKERS, ome=True, metadata={"axes": "TYX"}), r"stack of planes \(T = 3\)"),
    ("imagej slices", written(MARKERS, imagej=True, metadata={"axes": "ZYX"}), r"\(Z = 3\)"),
    ("imagej one page", with_text(b"ImageJ=1.54\nimages=9\nchannels=9\n"),
     "9 images but the file has 3"),
    ("json shape", with_text(b'{"shape": [900000, 20, 30]}'), r"its shape is \[900000, 20, 30\]"),
    ("ome billion planes", with_text(ome_text(SizeC="999999999")),
     "names 999999999 channels but 3"),
    ("ome other file", with_text(ome_text(inside=TWO_FILES)), "one of 2 files of an OME set"),
    ("ome missing planes", with_text(ome_text(SizeC="6")), "never followed"),
    ("ome page twice", with_text(ome_text(inside=TWICE)), "does not map its 3 channels"),
    ("ome entity", with_text(DOCTYPE), "declares entities"),
    ("ome not xml", with_text(b"<OME ><Image>"), "its XML is damaged"),
    ("ome size text", with_text(ome_text(SizeC="many")), "SizeC = 'many'"),
    ("ome other size", with_text(ome_text(SizeX="31")), r"OME-XML says \(20, 31\) pixels"),
    ("ome two images", with_text(ome_text().replace(b"</OME>", b"<Image/></OME>")),
     "with 2 images"),
    ("png cut", photo(RGB8, "PNG")[:200], "ends before its end mark"),
    ("png header only", photo(RGB8, "PNG")[:20], "a PNG without a header"),
    ("png pixel changed", changed(photo(RGB8, "PNG"), 300), r"wrong checksum in its b'IDAT' chunk"),
    ("png 16 changed", changed(photo(GRAY16, "PNG"), 300), r"wrong checksum in its b'IDAT' chunk"),
    ("png rows missing", png_rows_missing(), "holds 155 of 620 bytes of rows"),
    ("png huge", png_of(65535, 65535), "over the limit of 64 Mpixel"),
    ("png bilevel", photo(GRAY8, "PNG", "1"), "is bilevel"),
    ("png glass", photo(GLASS, "PNG"), "not an opaque alpha"),
    ("png animated", animated_png(), "animated PNG"),
    ("jpeg cut", photo(RGB8, "JPEG")[:-100], "ends before its end mark"),
    ("jpeg header", photo(RGB8, "JPEG")[:10], "no frame header before its pixels"),
    ("jpeg huge", jpeg_of(65535, 65535), "over the limit of 64 Mpixel"),
    ("jpeg cmyk", photo(RGBA, "JPEG", "CMYK"), "a JPEG of CMYK"),
]  # fmt: skip


def resolution(x: float, y: float, unit: int) -> bytes:
    return rgb(resolution=(x, y), resolutionunit=unit)


# name, file, microns a pixel
SCALES: list[tuple[str, bytes, float | None]] = [
    ("centimetre", resolution(20_000, 20_000, 3), 0.5),
    ("inch", resolution(25_400, 25_400, 2), 1.0),
    ("72 dpi", resolution(72, 72, 2), None),
    ("96 dpi in cm", resolution(37.795, 37.795, 3), None),
    ("no unit", resolution(20_000, 20_000, 1), None),
    ("ratio over zero",
     
     build(gray(1, 1, b"\0", t282=(RATIONAL, [1, 0]), t283=(RATIONAL, [1, 0]))), None),
    ("ome default", written(GRAY8, ome=True, metadata={"PhysicalSizeX": 0.25,
     "PhysicalSizeY": 0.25}), 0.25),
    ("ome nm", written(GRAY8, ome=True, metadata={"PhysicalSizeX": 325, "PhysicalSizeXUnit": "nm",
                                                  "PhysicalSizeY": 325,
     "PhysicalSizeYUnit": "nm"}), 0.325),
    ("ome pixel", written(GRAY8, ome=True, metadata={"PhysicalSizeX": 1,
     "PhysicalSizeXUnit": "pixel"}), None),
    ("imagej", written(GRAY8, imagej=True, resolution=(2, 2), metadata={"unit": "um"}), 0.5),
    ("aperio", rgb(description="Aperio Image|AppMag = 20|MPP = 0.4990", metadata=None), 0.499),
    ("png", photo(RGB8, "PNG", dpi=(50_800, 50_800)), 0.5),
    ("jpeg 96 dpi", photo(RGB8, "JPEG", dpi=(96, 96)), None),
]  # fmt: skip
