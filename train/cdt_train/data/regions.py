"""Regions on disk: a region is one image file, or a folder with one file a marker."""

from __future__ import annotations

from pathlib import Path

from cdt_runtime.errors import DatasetError

TILE_SUFFIXES = frozenset({".tif", ".tiff", ".png", ".jpg", ".jpeg"})


def region_files(folder: Path) -> list[Path]:
    """The image files that lie directly in `folder`, sorted; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _is_image(path))


def region_tile(folder: Path, where: str = "") -> Path:
    """The one image file of a region folder, or the folder itself where it has one a marker.

    Args:
        folder: The region.
        where: Opens the message: the line that names the region.

    Raises:
        DatasetError: the folder has no image.
    """
    files = region_files(folder)
    if not files:
        suffixes = ", ".join(sorted(TILE_SUFFIXES))
        raise DatasetError(f"{where}{folder} has no image: expected {suffixes}")
    return files[0] if len(files) == 1 else folder


def subfolders(folder: Path) -> list[Path]:
    """The folders that lie directly in `folder`, sorted, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_image(path: Path) -> bool:
    hidden = path.name.startswith(".")  # "._tile.tif" beside each file copied from a Mac
    return not hidden and path.suffix.lower() in TILE_SUFFIXES and path.is_file()
