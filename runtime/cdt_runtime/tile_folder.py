"""What a folder stands for: one tile with an image a marker, or many tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cdt_runtime.errors import TileError
from cdt_runtime.markers import find_channel, names_of_stems
from cdt_runtime.printable import last_part
from cdt_runtime.tile import MAX_MARKER_FILES, RGB, images_in


def tiles_under(
    path: str, expected: Sequence[str], channels: Sequence[str] | None = None
) -> list[str]:
    """List the tiles that a path stands for.

    A folder whose files' names say most of the model's markers, or which holds as many files as
    `channels` has names, is one tile. Any other folder holds a tile a file and, in its own folders,
    further tiles.

    Args:
        path: of a file or folder.
        expected: the model's channels.
        channels: names that the caller gives to a tile's channels.

    Returns:
        Paths, sorted within each folder; the path itself where it is no folder, or there is no
        image in it.

    Raises:
        TileError: a folder can't be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [path]
    try:
        return _tiles_in(folder, expected, channels) or [path]
    except OSError as error:
        raise TileError(
            f"{last_part(folder)}: can't be read ({error.strerror}): check the folder"
        ) from error


def _tiles_in(folder: Path, expected: Sequence[str], channels: Sequence[str] | None) -> list[str]:
    if _is_one_tile(folder, expected, channels):
        return [str(folder)]
    found = [str(image) for image in images_in(folder)]
    for inner in sorted(folder.iterdir(), key=lambda path: path.name):
        if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
            found += _tiles_in(inner, expected, channels)
    return found


def _is_one_tile(folder: Path, expected: Sequence[str], channels: Sequence[str] | None) -> bool:
    if tuple(expected) == RGB:
        return False
    images = images_in(folder)
    if not 1 < len(images) <= MAX_MARKER_FILES:
        return False
    if channels is not None and len(channels) == len(images):
        return True
    names = names_of_stems([image.name.split(".")[0] for image in images])
    said = [name for name in expected if find_channel(name, names) is not None]
    return 2 * len(said) > len(expected)
