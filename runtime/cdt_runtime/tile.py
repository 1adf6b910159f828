"""A pathology tile from disk: TIFF, PNG, JPEG, or a folder with one image a marker.

One reader for training and serving. It gives pixels as the file has them, with channel names and
microns a pixel, or one line that says what is wrong with which file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from cdt_runtime.errors import TileError
from cdt_runtime.markers import canonical, find_channel, is_marker, names_of_stems, spelling
from cdt_runtime.printable import counted, last_part, printable

if TYPE_CHECKING:
    import os

    from cdt_runtime.raster import Raster
    from cdt_runtime.tiff_meta import Z

RGB = ("R", "G", "B")
SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
MAX_PHOTO_BYTES = 2**29
MAX_MARKER_FILES = 128
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True, eq=False)
class Tile:
    """One tile as it lies on disk.

    Args:
        pixels: `(H, W, C)`, dtype as in the file: uint8, uint16, int16, uint32 or float32.
        channels: C names: `("R", "G", "B")`, `("gray",)` or marker names.
        bits: significant bits of an integer sample (12 for 12 in 16 where the file says so),
            32 for float.
        mpp: microns a pixel, or None where nothing tells it.
        sha256: of the file's bytes; of all files of a marker folder, sorted by name.
        source: the name to show: file or folder name.
        warnings: one line each.
    """

    pixels: np.ndarray
    channels: tuple[str, ...]
    bits: int
    mpp: float | None
    sha256: str
    source: str
    warnings: tuple[str, ...] = ()


def read_tile(
    path: str | os.PathLike[str],
    *,
    channels: Sequence[str] | None = None,
    mpp: float | None = None,
    z: Z = None,
) -> Tile:
    """Read one tile.

    Args:
        path: A TIFF, PNG or JPEG file, or a folder with one single-channel image a marker.
        channels: The names of the channels of a file that has none, in the file's order.
        mpp: Microns a pixel; goes before what the file says.
        z: Which plane of an OME-TIFF's stack, counted from 1, or "max" for the maximum of all.

    Raises:
        TileError: The tile can't be used; the message names the file, the fault and the cure.
    """
    path = Path(path)
    name = last_part(path)
    try:
        raster, sha256 = _read(path, len(channels or ()), z)
        raster = _named(raster, channels)
        raster = _scaled(raster, mpp)
    except TileError as error:
        raise TileError(f"{name}: {error}") from error
    except OSError as error:
        raise TileError(f"{name}: can't be read ({error.strerror}): check the file") from error
    assert raster.names is not None
    return Tile(
        pixels=raster.pixels,
        channels=raster.names,
        bits=raster.bits,
        mpp=raster.mpp,
        sha256=sha256,
        source=name,
        warnings=raster.warnings,
    )


def match_channels(
    tile: Tile, expected: Sequence[str], *, fill_missing: bool = False
) -> tuple[np.ndarray, dict[str, str | None], tuple[str, ...]]:
    """The tile's channels in the order a model expects, found by name.

    Args:
        tile: Any tile.
        expected: M channel names.
        fill_missing: Fill markers that the tile lacks with zeros, as the model was trained.

    Returns:
        `(H, W, M)`, the file's name for each expected name (None where filled), and the names that
        were filled with zeros.

    Raises:
        TileError: A channel is missing or there twice; or RGB meets gray or markers.
    """
    try:
        places = channel_places(tile.channels, expected, fill_missing=fill_missing)
    except TileError as error:
        raise TileError(f"{tile.source}: {error}") from error
    matched = np.zeros((*tile.pixels.shape[:2], len(expected)), tile.pixels.dtype)
    for at, place in enumerate(places.values()):
        if place is not None:
            matched[:, :, at] = tile.pixels[:, :, place]
    mapping = {name: None if at is None else tile.channels[at] for name, at in places.items()}
    return matched, mapping, tuple(name for name, at in places.items() if at is None)


def channel_places(
    found: Sequence[str], expected: Sequence[str], *, fill_missing: bool
) -> dict[str, int | None]:
    """Expected name -> place in `found`, or None for a channel to fill; raises as its caller."""
    _check_kinds(found, expected)
    places = {name: find_channel(name, found) for name in expected}
    missing = [name for name, place in places.items() if place is None]
    if missing and (not fill_missing or len(missing) == len(expected)):
        cure = "--fill-missing fills them with zeros if the model was trained for it"
        raise TileError(
            f"lacks {', '.join(missing)}: it has {', '.join(found)}, the model expects "
            f"{', '.join(expected)}; --channels names a file's channels, {cure}"
        )
    taken = [place for place in places.values() if place is not None]
    if len(places) != len(expected) or len(set(taken)) != len(taken):
        raise TileError(
            f"the model expects one marker twice: {', '.join(expected)}; name each once"
        )
    return places


def _check_kinds(found: Sequence[str], expected: Sequence[str]) -> None:
    """RGB, gray and markers do not stand in for each other."""
    if tuple(expected) == RGB and tuple(found) == ("gray",):
        raise TileError("is gray, the model expects RGB: give the colour image; gray H&E fails")
    if (tuple(expected) == RGB) != (tuple(found) == RGB):
        raise TileError(
            f"has the channels {', '.join(found)}, the model expects {', '.join(expected)}: "
            "give a tile of the stain that the model was trained on"
        )


def _read(path: Path, wanted: int, z: Z) -> tuple[Raster, str]:
    return _read_folder(path, wanted, z) if path.is_dir() else _read_file(path, wanted, z)


def _read_file(path: Path, wanted: int, z: Z) -> tuple[Raster, str]:
    """Decode one file by its magic bytes, never by its suffix; arguments as of `read_tiff`."""
    if not path.exists():
        raise TileError("no such file or folder")
    if not path.is_file():
        raise TileError("is not a regular file; expected a TIFF, PNG or JPEG")
    with path.open("rb") as file:
        raster = _decode(file, wanted, z)
        file.seek(0)
        return raster, hashlib.file_digest(file, "sha256").hexdigest()


def _decode(file: BinaryIO, wanted: int, z: Z) -> Raster:
    magic = file.read(8)
    if not magic:
        raise TileError("is empty (0 bytes): fetch it again")
    if magic[:4] in _TIFF_MAGIC:
        from cdt_runtime.tiff import read_tiff

        return read_tiff(file, wanted, z)
    if isinstance(z, int) and z != 1:
        raise TileError(f"--z {z}: it is no OME-TIFF with planes in Z: leave --z out")
    from cdt_runtime.photo import read_jpeg, read_png

    readers = {b"\x89PNG\r\n\x1a\n": read_png, b"\xff\xd8\xff": read_jpeg}
    for mark, reader in readers.items():
        if magic.startswith(mark):
            file.seek(0)
            data = file.read(MAX_PHOTO_BYTES + 1)
            if len(data) > MAX_PHOTO_BYTES:
                raise TileError(f"is over {MAX_PHOTO_BYTES // 2**20} MiB: crop a tile")
            return reader(data)
    raise TileError("is not a TIFF, PNG or JPEG: save it as one")


def _read_folder(folder: Path, wanted: int, z: Z) -> tuple[Raster, str]:
    """One image a marker, or one multi-channel image; everything else in the folder is skipped."""
    paths = images_in(folder)
    if not paths:
        below = sorted(printable(path.name) for path in folder.iterdir() if path.is_dir())[:3]
        hint = f"; it has the folders {', '.join(below)}: name one region" if below else ""
        raise TileError(f"is a folder without TIFF, PNG or JPEG images{hint}")
    if len(paths) > MAX_MARKER_FILES:
        raise TileError(f"is a folder of {len(paths)} images, expected one a marker: name one tile")
    if len(paths) == 1:
        return _read_member(paths[0], wanted, z)
    names = names_of_stems([path.name.split(".")[0] for path in paths])
    members = [_read_member(path, 1, z) for path in paths]
    digest = hashlib.sha256("".join(sha for _, sha in members).encode()).hexdigest()
    files = [printable(path.name) for path in paths]
    return _stack([raster for raster, _ in members], names, files), digest


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name; hidden ones and folders are left out."""
    return sorted(filter(_is_image, folder.iterdir()), key=lambda path: path.name)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _read_member(path: Path, wanted: int, z: Z) -> tuple[Raster, str]:
    try:
        return _read_file(path, wanted, z)
    except TileError as error:
        raise TileError(f"{last_part(path)}: {error}") from error


def _stack(rasters: Sequence[Raster], names: Sequence[str], files: Sequence[str]) -> Raster:
    """Single-channel images of one region as one raster."""
    first = rasters[0]
    for raster, file in zip(rasters, files, strict=True):
        if raster.pixels.shape[2] != 1:
            count = raster.pixels.shape[2]
            raise TileError(
                f"{file} has {count} channels among marker images; expected one: save gray"
            )
        same = (
            raster.pixels.shape == first.pixels.shape and raster.pixels.dtype == first.pixels.dtype
        )
        if not same or raster.bits != first.bits:
            raise TileError(
                f"{file} is {_form(raster)} but {files[0]} is {_form(first)}: the images of one "
                "region must agree"
            )
    known = {raster.mpp for raster in rasters} - {None}
    if len(known) > 1:
        raise TileError(
            f"its images differ in microns a pixel ({sorted(map(str, known))}): export them alike"
        )
    return replace(
        first,
        pixels=np.concatenate([raster.pixels for raster in rasters], axis=2),
        names=tuple(names),
        mpp=known.pop() if known else None,
        warnings=tuple(dict.fromkeys(note for raster in rasters for note in raster.warnings)),
        renamable=False,
    )


def _form(raster: Raster) -> str:
    height, width = raster.pixels.shape[:2]
    return f"{width} x {height} {raster.pixels.dtype} of {raster.bits} bits"


def _named(raster: Raster, given: Sequence[str] | None) -> Raster:
    """Put the caller's names on a file without names; check them against a file with names."""
    count = raster.pixels.shape[2]
    has = f"has {counted(count, 'channel')}"
    if given is not None and len(given) != count:
        raise TileError(f"{has} but --channels names {len(given)}: name each once")
    if given is None and raster.names is None:
        raise TileError(f"{has} without names: name them in the file's order with --channels")
    names = raster.names if given is None else tuple(given)
    assert names is not None
    if len(set(map(spelling, names))) != len(names):
        raise TileError(f"has one channel name twice: {', '.join(names)}; every name once")
    notes = () if given is None else _renamed(raster, given)
    return replace(raster, names=names, warnings=(*raster.warnings, *notes))


def _renamed(raster: Raster, given: Sequence[str]) -> tuple[str, ...]:
    """What to say of the caller's names where the file has its own: a dye may be given its marker.

    Raises:
        TileError: The file names another marker at that place, or its samples can't be markers.
    """
    own = raster.names
    if own is None or own == ("gray",) or (own == RGB and raster.renamable):
        return ()
    pairs = [pair for pair in zip(own, given, strict=True) if len(set(map(canonical, pair))) > 1]
    if pairs and (own == RGB or any(is_marker(name) for name, _ in pairs)):
        raise TileError(
            f"names its channels {', '.join(own)} but --channels says {', '.join(given)}: "
            "leave --channels out"
        )
    return tuple(f"channel {name!r} is taken as {other!r} (--channels)" for name, other in pairs)


def _scaled(raster: Raster, mpp: float | None) -> Raster:
    """Microns a pixel: the caller's, else the file's, else None with a warning."""
    if mpp is not None and not (math.isfinite(mpp) and 0.01 <= mpp <= 100):
        raise TileError(f"--mpp is {mpp}, expected 0.01 to 100 microns a pixel")
    if mpp is not None:
        return replace(raster, mpp=float(mpp))
    if raster.mpp is None:
        note = "no resolution in the file: give it with --mpp"
        return replace(raster, warnings=(*raster.warnings, note))
    return raster
