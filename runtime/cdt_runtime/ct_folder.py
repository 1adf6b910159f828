"""A folder of DICOM files -> the frames of the one CT series in it.

No path is built from an attribute. Messages name files by their place in the folder and series by
their UID, which `--series` needs, and nothing else of the headers.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath

import numpy as np

from cdt_runtime.ct_geometry import COS_45, along, headward_normal, normal_of, tolerance
from cdt_runtime.ct_walk import (
    GIVE_FOLDER,
    Folder,
    entries,
    file_name,
    find_folder,
    is_regular,
    open_folder,
)
from cdt_runtime.dicom_alike import Layouts
from cdt_runtime.dicom_frame import UNIT_TOLERANCE, Frame
from cdt_runtime.dicom_header import HEAD_BYTES, Header, looks_like_dicom, read_header, reading
from cdt_runtime.dicom_pixels import payloads
from cdt_runtime.errors import SeriesError
from cdt_runtime.printable import counted

MAX_FILES = 100_000
MAX_LOOKED = 1000
"""Files whose first bytes are looked at to tell whether a folder holds DICOM."""
LISTED = 20
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SLICE, LOCALIZER, SECONDARY = "slice", "localizer", "secondary capture"
OTHER_MODALITY = "file of another modality"
SAME_PLACE_MM = 1e-3
DICOM_SUFFIXES = frozenset({"", ".dcm", ".dicom", ".ima"})


@dataclass(frozen=True, eq=False)
class Scan:
    """Every DICOM file below a folder; `folder` is how messages call that."""

    folder: str
    headers: tuple[Header, ...]
    links: int
    not_dicom: int


def _should_be_dicom(path: PurePath) -> bool:
    """By its name: a known suffix, or none (a UID as a name ends in digits after a dot)."""
    suffix = path.suffix.lower()
    return not path.name.startswith(".") and (suffix in DICOM_SUFFIXES or suffix[1:].isdigit())


def _read(entry: os.DirEntry[str], size: int, name: str, layouts: Layouts) -> Header | None:
    header = read_header(entry.path, name, layouts) if size else None
    if header is not None:
        return header
    path = PurePath(entry.name)
    if size == 0 and _should_be_dicom(path):
        raise SeriesError(f"{name}: the file is empty: copy it again")
    if path.suffix.lower() in DICOM_SUFFIXES - {""}:
        raise SeriesError(f"{name}: not a DICOM file in spite of its name: copy it again")
    return None


def scan_folder(path: Path) -> Scan:
    """Parses the header of every DICOM file; call it inside `quiet`.

    Raises:
        SeriesError: the folder or a file in it can't be read, or there is no DICOM in it.
    """
    folder = open_folder(path)
    files, links = _files(folder)
    headers: list[Header] = []
    inodes: set[tuple[int, int]] = set()
    not_dicom = 0
    layouts = Layouts()
    for place, entry in enumerate(files, start=1):
        name = file_name(entry, place, len(files))
        with reading(name):
            stat = entry.stat(follow_symlinks=False)
            if (stat.st_dev, stat.st_ino) in inodes:
                continue
            inodes.add((stat.st_dev, stat.st_ino))
            header = _read(entry, stat.st_size, name, layouts)
        if header is None:
            not_dicom += 1
        elif not header.is_directory:
            headers.append(header)
    if not headers:
        linked = f", {counted(links, 'link')} not followed" if links else ""
        raise SeriesError(
            f"no DICOM images in {folder.name} ({counted(len(files), 'file')} seen{linked}): "
            f"{GIVE_FOLDER}"
        )
    return Scan(folder.name, tuple(headers), links, not_dicom)


def _files(folder: Folder) -> tuple[list[os.DirEntry[str]], int]:
    """The files below a folder, and the number of links."""
    found = list(islice(entries(folder), MAX_FILES + 1))
    if len(found) > MAX_FILES:
        raise SeriesError(
            f"{folder.name} holds over {MAX_FILES} files: give the folder of one series"
        )
    files = [entry for entry in found if is_regular(entry)]
    return files, len(found) - len(files)


def holds_dicom(path: Path) -> bool:
    """Tell whether a path is a folder with DICOM among its first MAX_LOOKED files, at any depth.

    Raises:
        SeriesError: the path, or a folder below it, can't be looked into.
    """
    folder = find_folder(path)
    if folder is None:
        return False
    first = islice(entries(folder), MAX_LOOKED)
    return any(_has_dicom_head(Path(entry.path)) for entry in first if is_regular(entry))


def _has_dicom_head(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return looks_like_dicom(file.read(HEAD_BYTES))
    except OSError:
        return False


def _kind(header: Header) -> str:
    """What a file is to a reader of CT slices; all but "slice" are left out."""
    fields = header.fields
    modality = fields.text("Modality").upper()
    if not modality:
        raise fields.error("Modality", "is missing, the header may be cut short", "copy it again")
    if fields.text("SOPClassUID").startswith(SECONDARY_CAPTURE):
        return SECONDARY
    if modality != "CT":
        return OTHER_MODALITY
    return LOCALIZER if "LOCALIZER" in fields.words("ImageType") else SLICE


def _check_patient(scan: Scan) -> None:
    """Two patients in one folder are a mix-up, whichever series is asked for.

    IDs are held against IDs and names against names: a file may lack the one or the other.
    """
    first: dict[str, dict[str, str]] = {}
    for header in scan.headers:
        for keyword, key in header.once(Header.patient).items():
            first.setdefault(keyword, {}).setdefault(key, header.file.name)
    for keyword, names in first.items():
        if len(names) > 1:
            one, other, *_ = names.values()
            raise SeriesError(
                f"{scan.folder} holds {len(names)} patients ({keyword} differs between {one} and "
                f"{other}): keep one patient a folder"
            )


def _series_of(headers: Sequence[Header]) -> dict[str, list[Header]]:
    """By SeriesInstanceUID. Anonymised files may have none: those are one series together."""
    series: dict[str, list[Header]] = {}
    for header in headers:
        series.setdefault(header.once(_series_uid), []).append(header)
    return series


def _series_uid(header: Header) -> str:
    return header.fields.text("SeriesInstanceUID")


def _shown_uid(uid: str) -> str:
    """Only what really is a UID may be shown."""
    return uid if uid and len(uid) <= 64 and set(uid) <= set("0123456789.") else "(no valid UID)"


def _listing(series: dict[str, list[Header]]) -> str:
    sizes = {
        uid: sum(h.fields.integer("NumberOfFrames", default=1) for h in headers)
        for uid, headers in series.items()
    }
    shown = [
        f"{_shown_uid(uid)} ({counted(n, 'slice')})" for uid, n in list(sizes.items())[:LISTED]
    ]
    more = [f"{len(sizes) - LISTED} more"] if len(sizes) > LISTED else []
    return ", ".join([*shown, *more])


def choose(scan: Scan, series_uid: str | None) -> tuple[list[Header], list[str]]:
    """The files of the one CT series, and warnings about what was left out."""
    _check_patient(scan)
    kinds: dict[str, list[Header]] = {SLICE: []}
    for header in scan.headers:
        kinds.setdefault(header.once(_kind), []).append(header)
    slices = kinds.pop(SLICE)
    others = [counted(len(found), kind) for kind, found in sorted(kinds.items())]
    others += [counted(scan.not_dicom, "non-DICOM file")] if scan.not_dicom else []
    others += [f"{counted(scan.links, 'link')} (not followed)"] if scan.links else []
    if not slices:
        raise SeriesError(
            f"no CT slices in {scan.folder}, only {', '.join(others)}: expected files "
            "whose Modality is CT"
        )
    series = _series_of(slices)
    if series_uid is None and len(series) > 1:
        raise SeriesError(
            f"{scan.folder} holds {len(series)} CT series: {_listing(series)}: choose one with "
            "--series UID"
        )
    uid = series_uid or next(iter(series))
    if uid not in series:
        raise SeriesError(
            f"{scan.folder} does not hold the series asked for; it holds {_listing(series)}: "
            "choose one of these with --series UID"
        )
    return series[uid], [f"skipped {', '.join(others)}"] if others else []


def _same_way(a: Frame, b: Frame) -> bool:
    if (a.row_direction, a.column_direction) == (b.row_direction, b.column_direction):
        return True
    pairs = zip(
        a.row_direction + a.column_direction, b.row_direction + b.column_direction, strict=True
    )
    return all(abs(p - q) <= UNIT_TOLERANCE for p, q in pairs)


def drop_odd_orientation(frames: Sequence[Frame]) -> tuple[list[Frame], list[str]]:
    """Leaves out a few slices that cross the others: localizers that do not say so."""
    ways: list[list[Frame]] = []
    for frame in frames:
        way = next((way for way in ways if _same_way(way[0], frame)), None)
        if way is None:
            ways.append([frame])
        else:
            way.append(frame)
    main = max(ways, key=len)
    odd = [way for way in ways if way is not main]
    crossing = all(abs(float(normal_of(way[0]) @ normal_of(main[0]))) < COS_45 for way in odd)
    number = sum(map(len, odd))
    if odd and (not crossing or number > max(3, len(main) // 10) or number >= len(main)):
        raise SeriesError(
            f"{odd[0][0].name}: ImageOrientationPatient differs from "
            f"{counted(len(main), 'other slice')}: keep one orientation a series"
        )
    return main, [f"dropped {counted(number, 'slice')} of another orientation"] if odd else []


def check_alike(frames: Sequence[Frame]) -> None:
    """Size and pixel spacing are the same in every slice."""
    checks: tuple[tuple[str, Callable[[Frame], tuple[float, ...]], str], ...] = (
        ("Rows x Columns", lambda f: (f.layout.rows, f.layout.columns), ""),
        ("PixelSpacing", lambda f: (round(f.spacing[0], 4), round(f.spacing[1], 4)), " mm"),
    )
    for what, value_of, unit in checks:
        values = Counter(map(value_of, frames))
        if len(values) == 1:
            continue
        usual = values.most_common(1)[0][0]
        odd = next(f for f in frames if value_of(f) != usual)
        is_now, should_be = (" x ".join(f"{v:g}" for v in v2) for v2 in (value_of(odd), usual))
        raise SeriesError(
            f"{odd.name}: {what} is {is_now}{unit}, expected {should_be}{unit} as in the other "
            "slices: take the odd slice out"
        )


class _Digests:
    """Digests of the pixels of frames; a file of many frames is read once for all of them."""

    def __init__(self) -> None:
        self._of_file: dict[str, list[bytes]] = {}

    def same(self, a: Frame, b: Frame) -> bool:
        scales = [(frame.rescale.slope, frame.rescale.intercept) for frame in (a, b)]
        return scales[0] == scales[1] and self._of(a) == self._of(b)

    def _of(self, frame: Frame) -> bytes:
        path = frame.file.path
        if path not in self._of_file:
            stored = payloads(frame.file, frame.layout)
            self._of_file[path] = [hashlib.sha256(payload).digest() for payload in stored]
        return self._of_file[path][frame.index]


def in_order(frames: Sequence[Frame]) -> tuple[list[Frame], list[str]]:
    """Slices ordered towards the head, each once.

    Raises:
        SeriesError: two slices lie at one place and differ, as in a scan over time.
    """
    depth = along(frames, headward_normal(frames[0]))
    order = np.argsort(depth, kind="stable")
    kept: list[Frame] = []
    last = -np.inf
    copies = 0
    digests = _Digests()
    for i in map(int, order):
        if depth[i] - last > SAME_PLACE_MM:
            kept.append(frames[i])
            last = depth[i]
        elif _near(kept[-1], frames[i]) and digests.same(kept[-1], frames[i]):
            copies += 1
        else:
            raise SeriesError(
                f"{kept[-1].name} and {frames[i].name} lie at one position with different pixels: "
                "give one phase of the scan, or one reconstruction"
            )
    return kept, [f"dropped {counted(copies, 'slice')} given twice"] if copies else []


def _near(a: Frame, b: Frame) -> bool:
    return bool(np.linalg.norm(np.subtract(a.position, b.position)) <= tolerance(0))
