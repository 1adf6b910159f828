"""TIFF to a raster: which pages belong together, what their samples mean, how large they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from cdt_runtime.errors import TileError
from cdt_runtime.markers import is_placeholder
from cdt_runtime.printable import printable
from cdt_runtime.raster import Raster, drop_alpha, plausible_mpp, turn
from cdt_runtime.tiff_ifd import Ifd, scan
from cdt_runtime.tiff_meta import Layout, Z, layout
from cdt_runtime.tiff_page import IMAGE_CODECS, Page, check_samples, parse_page, read_page
from cdt_runtime.tile_limits import check_bytes

_REFUSED = {
    4: "a transparency mask",
    5: "CMYK (separated)",
    6: "raw YCbCr",
    8: "CIE Lab",
    9: "ICC Lab",
    10: "ITU Lab",
    32803: "a colour filter array (camera raw)",
    32844: "LogL",
    32845: "LogLuv",
    34892: "linear raw",
}
_MICRONS_PER_UNIT = {2: 25_400.0, 3: 10_000.0}


@dataclass(frozen=True)
class _Samples:
    """Decoded planes `(H, W, C)` with what is known of them so far."""

    pixels: np.ndarray
    names: tuple[str, ...] | None
    bits: int
    warnings: tuple[str, ...] = ()


def read_tiff(file: BinaryIO, wanted: int = 0, z: Z = None) -> Raster:
    """Read the one image of a TIFF file.

    Args:
        file: An open, seekable binary file.
        wanted: How many channels the caller will name, 0 where the file must name them. A fourth
            sample that is one of them is no alpha.
        z: Which plane of a stack, as `tiff_meta.layout` takes it.

    Raises:
        TileError: The file is damaged, too large, or holds something else than one tile.
    """
    pages = _image_pages(scan(file))
    planes = layout(pages, z)
    for page in pages:
        check_samples(page)
        check_photometric(page)
    named = channel_names(planes)
    if len(pages) == 1:
        samples = _one_page(pages[0], named, wanted)
    else:
        samples = _many_pages(pages, planes, named)
    page = pages[0]
    mpp, notes = stated_mpp(page, planes)
    return Raster(
        pixels=turn(samples.pixels, page.ifd.one(274, 1)),
        names=samples.names,
        bits=_claimed_bits(page, planes, samples),
        mpp=mpp,
        warnings=samples.warnings + planes.notes + notes,
        renamable=page.compression not in IMAGE_CODECS and page.photometric in (0, 1, 2),
    )


def _image_pages(ifds: list[Ifd]) -> list[Page]:
    """The full-size pages: thumbnails, masks and pyramid levels are left out.

    Raises:
        TileError: The pages left differ in size or kind: several images, not one.
    """
    full = [ifd for ifd in ifds if not ifd.one(254, 0) & 0b101 and ifd.one(255, 1) != 2]
    full = full or ifds[:1]
    first = parse_page(full[0])
    text = first.ifd.text(270)
    if text.startswith("Aperio"):
        return [first]  # the other pages of an SVS are levels, thumbnail, label and macro
    if "PerkinElmer-QPI" in text[:2000]:
        full = [ifd for ifd in full if "<ImageType>FullResolution<" in ifd.text(270)] or full
    pages = [parse_page(ifd) for ifd in full]
    if len({page.kind for page in pages}) > 1:
        sizes = ", ".join(f"{page.width} x {page.height} x {page.samples}" for page in pages[:4])
        raise TileError(
            f"holds {len(pages)} unlike pages ({sizes}): export the one image as a tile"
        )
    check_bytes(sum(page.nbytes for page in pages))
    return pages


def check_photometric(page: Page) -> None:
    """Refuse colours that have no fixed meaning, and damaged palettes."""
    code = page.photometric
    if code == 6 and page.compression == "JPEG":
        return
    if code not in (0, 1, 2, 3):
        name = _REFUSED.get(code, "unknown")
        raise TileError(
            f"is {name} (PhotometricInterpretation {code}), expected RGB or gray: convert it"
        )
    if page.bits == 1:
        raise TileError("is bilevel (1 bit a sample), expected 8 bits or more: save it as gray")
    if code == 2 and page.samples < 3:
        raise TileError(f"says it is RGB but has {page.samples} samples a pixel: damaged")
    if code == 3 and (page.samples, page.sample_format) != (1, 1):
        raise TileError("has a palette but not one unsigned index a pixel: damaged")
    if code in (2, 6) and page.bits < 8:
        raise TileError(f"is RGB of {page.bits} bits a sample, expected 8 or 16: convert it")
    if code == 0 and page.sample_format != 1:
        raise TileError("is MINISWHITE with signed or float samples: no white level; convert it")


def channel_names(planes: Layout) -> tuple[str, ...] | None:
    """The channel names that the file gives; None where some only count."""
    names = tuple(
        printable(" ".join(name.split()), instead="", most=80) for name in planes.names or ()
    )
    return None if not names or any(map(is_placeholder, names)) else names


def _one_page(page: Page, named: tuple[str, ...] | None, wanted: int) -> _Samples:
    samples = _intensities(page)
    if named is None and wanted == page.samples > 3:
        return samples
    if page.photometric in (2, 3, 6):
        return _colour(page, samples, named)
    pixels, warnings = samples.pixels, samples.warnings
    extra = page.ifd.ints(338)
    if page.samples == 2 and extra[-1:] in ((1,), (2,)):
        pixels, warnings = drop_alpha(pixels, samples.bits), (*warnings, "opaque alpha dropped")
    if pixels.shape[2] == 1:
        return _Samples(pixels, named or ("gray",), samples.bits, warnings)
    return _Samples(pixels, named, samples.bits, warnings)


def _colour(page: Page, samples: _Samples, named: tuple[str, ...] | None) -> _Samples:
    """RGB, an opaque alpha dropped; a file that names its samples as markers keeps them."""
    count = samples.pixels.shape[2]
    if named is not None and len(named) == count and count > 1:
        return replace(samples, names=named)
    if count == 3:
        return replace(samples, names=("R", "G", "B"))
    if count == 4:
        pixels = drop_alpha(samples.pixels, samples.bits)
        notes = (*samples.warnings, "opaque alpha dropped")
        return _Samples(pixels, ("R", "G", "B"), samples.bits, notes)
    return replace(samples, names=None)


def _many_pages(pages: list[Page], planes: Layout, named: tuple[str, ...] | None) -> _Samples:
    if pages[0].samples != 1 or any(page.photometric not in (0, 1) for page in pages):
        raise TileError(
            f"holds {len(pages)} colour pages, expected one image: export the one that is meant"
        )
    channels, bits = [], 0
    for start in range(0, len(planes.order), planes.depth):
        stack = [_intensities(pages[at]) for at in planes.order[start : start + planes.depth]]
        channels.append(np.maximum.reduce([one.pixels for one in stack]))
        bits = stack[0].bits
    names = ("gray",) if named is None and planes.notes and len(channels) == 1 else named
    return _Samples(np.concatenate(channels, axis=2), names, bits)


def _intensities(page: Page) -> _Samples:
    """Decode a page so that larger samples are brighter and packed samples fill their type."""
    pixels, bits = read_page(page), page.bits
    if page.photometric == 3:
        return _Samples(_expand_palette(page, pixels), None, 8)
    if page.sample_format == 3:
        return _Samples(_finite(pixels), None, 32)
    if page.sample_format == 2:
        return _Samples(pixels, None, bits - 1)
    if bits < 8:
        pixels, bits = pixels * np.uint8(255 // (2**bits - 1)), 8
    if page.photometric == 0:
        pixels = np.subtract(2**bits - 1, pixels, dtype=pixels.dtype)
    return _Samples(pixels, None, bits)


def _finite(pixels: np.ndarray) -> np.ndarray:
    """Float samples as float32.

    Raises:
        TileError: A sample is NaN or infinite.
    """
    with np.errstate(over="ignore"):
        single = pixels.astype(np.float32)
    bad = int(single.size - np.count_nonzero(np.isfinite(single)))
    if bad:
        raise TileError(f"holds {bad} samples that are NaN or infinite, expected finite: repair it")
    return single


def _expand_palette(page: Page, indices: np.ndarray) -> np.ndarray:
    """Colours `(H, W, 3)` uint8 of palette indices `(H, W, 1)`."""
    table = np.array(page.ifd.ints(320))
    if page.bits > 8 or table.size != 3 * 2**page.bits:
        raise TileError(
            f"has a palette of {table.size} values for {page.bits}-bit indices, expected "
            f"{3 * 2**page.bits}: damaged; save it as RGB"
        )
    if table.max() > 255:  # the standard says 16 bits; some writers store 8
        table = table >> 8
    colours = table.astype(np.uint8).reshape(3, -1).T
    return np.ascontiguousarray(colours[indices[:, :, 0]])


def _claimed_bits(page: Page, planes: Layout, samples: _Samples) -> int:
    """The significant bits: what the file claims, where that is possible and the samples obey.

    Raises:
        TileError: A sample is larger than the claimed bits allow.
    """
    if samples.pixels.dtype not in (np.uint16, np.uint32):
        return samples.bits
    tops = [*page.ifd.ints(281)[:1], *page.ifd.ints(341)[:1]] if page.photometric == 1 else []
    claims = [planes.bits] + [(top + 1).bit_length() - 1 for top in tops if not top & (top + 1)]
    bits = next((claim for claim in claims if 8 <= claim < samples.bits), samples.bits)
    if samples.pixels.max() >= 2**bits:
        raise TileError(
            f"says {bits} significant bits but holds the value {samples.pixels.max()}: "
            "write the right number of bits into the file"
        )
    return bits


def stated_mpp(page: Page, planes: Layout) -> tuple[float | None, tuple[str, ...]]:
    """Microns a pixel from the metadata, else from the resolution tags."""
    if planes.mpp is not None:
        return plausible_mpp(*planes.mpp, coarsest=100.0)
    scale = _MICRONS_PER_UNIT.get(page.ifd.one(296, 2), 0.0)
    across, down = page.ifd.ratio(282), page.ifd.ratio(283)
    if not (scale and across and down):
        return None, ()
    return plausible_mpp(scale / across, scale / down)
