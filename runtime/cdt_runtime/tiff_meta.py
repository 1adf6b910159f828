"""What the writers of TIFF files say about planes: OME-XML, ImageJ, tifffile, PerkinElmer, Aperio.

Axes are the file's own; nothing is guessed from shapes. A stack in T is refused by name, and so is
one in Z, but for an OME-TIFF of which one plane or the maximum of all is asked for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal
from xml.etree import ElementTree

from cdt_runtime.errors import TileError
from cdt_runtime.tiff_page import Page

MAX_XML = 4 * 2**20
"""Longest OME-XML that is parsed, characters."""

MAX_TEXT = 2**16
"""Longest other description that is parsed, characters."""

_MICRONS = {
    "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "microns": 1.0, "\\u00b5m": 1.0,
    "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "å": 1e-4,
}  # fmt: skip


Z = int | Literal["max"] | None
"""Which plane of a stack is taken, counted from 1, or the maximum of all; None: there is none."""


@dataclass(frozen=True)
class Layout:
    """What the metadata says of the planes (pages, or the samples of one page).

    `order[i * depth : (i + 1) * depth]` are the planes of channel `i`, of which the maximum is
    taken; `names` is None where the file has none; `mpp` is microns a pixel along (x, y); `bits` is
    0 where the file does not say.
    """

    order: tuple[int, ...]
    names: tuple[str, ...] | None = None
    mpp: tuple[float, float] | None = None
    bits: int = 0
    depth: int = 1
    notes: tuple[str, ...] = ()


def layout(pages: Sequence[Page], z: Z = None) -> Layout:
    """The planes of `pages`, all of one kind.

    Args:
        pages: of one image.
        z: which plane of a stack is taken, counted from 1, or "max" for the maximum of all.

    Raises:
        TileError: The planes are Z or T, belong to several images, or lie in other files.
    """
    found = _layout(pages, z)
    if not found.notes and isinstance(z, int) and z != 1:
        raise TileError(f"--z {z}: it is no OME-TIFF with planes in Z: leave --z out")
    return found


def _layout(pages: Sequence[Page], z: Z) -> Layout:
    text = pages[0].ifd.text(270)
    planes = len(pages) if len(pages) > 1 else pages[0].samples
    if re.search(r"<(\w+:)?OME[\s>]", text[:20_000]):
        return _ome(text, pages[0], planes, z)
    if text.startswith("ImageJ="):
        return _imagej(text[:MAX_TEXT], pages[0], planes)
    if text.startswith("{"):
        return _shaped(text, planes, sum(page.height * page.width * page.samples for page in pages))
    if "PerkinElmer-QPI" in text[:2000]:
        return _perkin_elmer(pages, planes)
    if 34412 in pages[0].ifd or 33629 in pages[0].ifd:
        raise TileError("is a LSM or STK microscope file: export it as OME-TIFF")
    if text.startswith("Aperio"):
        found = re.search(r"\|\s*MPP\s*=\s*([0-9.]+)", text)
        return Layout((0, 1, 2), mpp=_pair(found.group(1), found.group(1), 1.0) if found else None)
    return Layout(tuple(range(planes)))


def _ome(text: str, page: Page, planes: int, z: Z) -> Layout:
    root = _xml(text)
    images = _children(root, "Image")
    if len(images) != 1:
        raise TileError(f"is an OME-TIFF with {len(images)} images, expected one: export one")
    pixels = next(iter(_children(images[0], "Pixels")), None)
    if pixels is None:
        raise TileError("is an OME-TIFF without a Pixels element: damaged; export it again")
    deep = _whole(pixels, "SizeZ")
    _refuse_stack({"T": _whole(pixels, "SizeT"), "Z": deep if z is None or page.samples > 1 else 1})
    if isinstance(z, int) and not 1 <= z <= deep:
        raise TileError(f"--z {z}: it has {deep} planes in Z, counted from 1: give one of these")
    size = _whole(pixels, "SizeY"), _whole(pixels, "SizeX")
    if size != (page.height, page.width):
        raise TileError(f"OME-XML says {size} pixels (Y, X), the page {page.height, page.width}")
    channels = _whole(pixels, "SizeC")
    if channels * deep != planes:
        raise TileError(
            f"OME-XML names {channels * deep} {'planes' if deep > 1 else 'channels'} but {planes} "
            "are in the file: the others lie in another file, which is never followed; export one "
            "file"
        )
    names = [item.get("Name", "") for item in _children(pixels, "Channel")]
    unit = _MICRONS.get(pixels.get("PhysicalSizeXUnit", "µm").casefold(), 0.0)
    found = Layout(
        tuple(range(planes)) if page.samples > 1 else _ome_order(pixels, channels, deep),
        names=tuple(names) if len(names) == channels else None,
        mpp=_pair(pixels.get("PhysicalSizeX", ""), pixels.get("PhysicalSizeY", ""), unit),
        bits=_whole(pixels, "SignificantBits", 0),
        depth=deep,
    )
    return found if deep == 1 else _at(found, z)


def _at(found: Layout, z: Z) -> Layout:
    """Take one plane of a stack, or the maximum of all."""
    if isinstance(z, int):
        order = found.order[z - 1 :: found.depth]
        return replace(found, order=order, depth=1, notes=(f"plane {z} of {found.depth} in Z",))
    return replace(found, notes=(f"the maximum of {found.depth} planes in Z",))


def _xml(text: str, longest: int = MAX_XML) -> ElementTree.Element:
    if len(text) > longest or "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise TileError("its XML is too long or declares entities: not read; export it again")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise TileError(f"its XML is damaged ({error}): export the file again") from error


def _children(node: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [child for child in node if child.tag.rpartition("}")[2] == name]


def _whole(node: ElementTree.Element, key: str, default: int = 1) -> int:
    text = node.get(key, str(default))
    if not re.fullmatch(r"\d{1,9}", text):
        raise TileError(f"OME-XML has {key} = {text[:40]!r}, expected a whole number: damaged")
    return int(text)


def _ome_order(pixels: ElementTree.Element, channels: int, deep: int) -> tuple[int, ...]:
    """The page of each plane, channel by channel, from the TiffData elements."""
    planes = channels * deep
    blocks = _children(pixels, "TiffData")
    files = {item.get("FileName") for block in blocks for item in _children(block, "UUID")}
    if len(files - {None}) > 1:
        raise TileError(f"is one of {len(files)} files of an OME set: export all channels in one")
    if len(blocks) > planes:
        raise TileError(f"OME-XML has {len(blocks)} TiffData blocks for {planes} planes: damaged")
    axes = pixels.get("DimensionOrder", "XYCZT")
    steps = (1, channels) if axes.find("C") < axes.find("Z") else (deep, 1)
    pages: dict[int, int] = {}
    for block in blocks or [ElementTree.Element("TiffData")]:
        first = _whole(block, "IFD", 0)
        start = _whole(block, "FirstC", 0) * steps[0] + _whole(block, "FirstZ", 0) * steps[1]
        count = _whole(block, "PlaneCount", planes - start if block.get("IFD") is None else 1)
        pages.update((start + step, first + step) for step in range(min(count, planes + 1)))
    if sorted(pages) != list(range(planes)) or sorted(pages.values()) != list(range(planes)):
        what = "planes" if deep > 1 else "channels"
        raise TileError(f"OME-XML does not map its {planes} {what} to {planes} pages: damaged")
    return tuple(
        pages[channel * steps[0] + level * steps[1]]
        for channel in range(channels)
        for level in range(deep)
    )


def _imagej(text: str, page: Page, planes: int) -> Layout:
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    counts = {key: int(value) for key, value in fields.items() if re.fullmatch(r"\d{1,9}", value)}
    _refuse_stack({"Z": counts.get("slices", 1), "T": counts.get("frames", 1)})
    images = counts.get("images", 1)
    if images not in (1, planes):
        raise TileError(
            f"ImageJ says {images} images but the file has {planes} pages: save it as OME-TIFF"
        )
    unit = _MICRONS.get(fields.get("unit", "").casefold(), 0.0)
    steps = [page.ifd.ratio(tag) for tag in (282, 283)]
    mpp = (unit / steps[0], unit / steps[1]) if unit and all(steps) else None
    return Layout(tuple(range(planes)), mpp=mpp)


def _shaped(text: str, planes: int, samples: int) -> Layout:
    """The JSON that tifffile writes: `{"shape": [7, 500, 500], "axes": "CYX"}`.

    Args:
        text: the description.
        planes: pages, or samples of the one page.
        samples: all numbers in all pages.
    """
    plain = Layout(tuple(range(planes)))
    try:
        facts = json.loads(text) if len(text) <= MAX_TEXT else {}
        shape, axes = [int(size) for size in facts.get("shape", ())], str(facts.get("axes", ""))
        names = facts.get("Channel", {}).get("Name") if "Channel" in facts else None
    except (ValueError, AttributeError, TypeError, RecursionError, OverflowError):
        return plain
    _refuse_stack({axis: size for axis, size in zip(axes, shape, strict=False) if axis in "ZT"})
    if shape and math.prod(shape) != samples:
        raise TileError(
            f"says its shape is {shape[:8]} but holds {samples} samples: "
            "truncated or damaged; save it as OME-TIFF"
        )
    if isinstance(names, list) and len(names) == planes:
        return replace(plain, names=tuple(map(str, names)))
    return plain


def _perkin_elmer(pages: Sequence[Page], planes: int) -> Layout:
    """Vectra, Polaris and inForm: one page a channel, its name in the page's own XML."""
    if len(pages) == 1:
        return Layout(tuple(range(planes)))
    roots = [_xml(page.ifd.text(270), MAX_TEXT) for page in pages]
    names = tuple((root.findtext("Name") or "").strip() for root in roots)
    return Layout(tuple(range(planes)), names=names)


def _refuse_stack(sizes: dict[str, int]) -> None:
    deep = {axis: size for axis, size in sizes.items() if size > 1}
    if deep:
        found = ", ".join(f"{axis} = {size}" for axis, size in deep.items())
        raise TileError(
            f"is a stack of planes ({found}), expected one plane a channel: --z takes one of an "
            "OME-TIFF's, or their maximum; else export one"
        )


def _pair(x: str, y: str, unit: float) -> tuple[float, float] | None:
    try:
        across = float(x) * unit
        down = float(y) * unit if y else across
    except ValueError:
        return None
    valid = all(math.isfinite(value) and value > 0 for value in (across, down))
    return (across, down) if valid else None
