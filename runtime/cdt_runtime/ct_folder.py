"""A folder of DICOM files -> the frames of the one CT series in it.

The walk follows no links and builds no path from an attribute; messages name files relative to the
folder and series by their UID, which `--series` needs, and nothing else of the headers.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from cdt_runtime.ct_geometry import COS_45, along, headward_normal, normal_of, tolerance
from cdt_runtime.dicom_frame import UNIT_TOLERANCE, Frame
from cdt_runtime.dicom_header import Header, printable, read_header
from cdt_runtime.dicom_pixels import payloads
from cdt_runtime.errors import SeriesError

MAX_FILES = 100_000
LISTED = 20
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
SLICE, LOCALIZER, SECONDARY = "slice", "localizer", "secondary capture"
OTHER_MODALITY = "file of another modality"
SAME_PLACE_MM = 1e-3
DICOM_SUFFIXES = frozenset({"", ".dcm", ".dicom", ".ima"})


@dataclass(frozen=True, eq=False)
class Scan:
    """Every DICOM file below a folder."""

    folder: str
    headers: tuple[Header, ...]
    links: int
    not_dicom: int


def _count(number: int, thing: str) -> str:
    """Such as `1 file of another modality` and `2 files of another modality`."""
    noun, *rest = thing.split(" of ")
    return " of ".join([f"{number} {noun}{'s' * (number != 1)}", *rest])


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Files and links below a folder, by name; folders are entered, links are not."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise SeriesError(f"{printable(str(folder))} can't be listed: {error.strerror}") from None
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(Path(entry.path))
        else:
            yield entry


def _should_be_dicom(path: PurePath) -> bool:
    """By its name: a known suffix, or none (a UID as a name ends in digits after a dot)."""
    suffix = path.suffix.lower()
    return not path.name.startswith(".") and (suffix in DICOM_SUFFIXES or suffix[1:].isdigit())


def _read(path: Path, name: str) -> Header | None:
    try:
        if path.stat().st_size == 0 and _should_be_dicom(path):
            raise SeriesError(f"{name}: the file is empty: copy it again")
        header = read_header(path, name)
    except OSError as error:
        raise SeriesError(f"{name}: the file can't be read: {error.strerror}") from None
    if header is None and path.suffix.lower() in DICOM_SUFFIXES - {""}:
        raise SeriesError(f"{name}: not a DICOM file in spite of its name: copy it again")
    return header


def scan_folder(folder: Path) -> Scan:
    """Parses the header of every DICOM file; call it inside `quiet`."""
    shown = printable(str(folder))
    if not folder.is_dir():
        raise SeriesError(f"{shown} is not a folder: give the folder that holds the CT series")
    headers: list[Header] = []
    inodes: set[tuple[int, int]] = set()
    links = seen = not_dicom = 0
    for seen, entry in enumerate(_entries(folder), start=1):
        if seen > MAX_FILES:
            raise SeriesError(
                f"{shown} holds over {MAX_FILES} files: give the folder of one series"
            )
        if not entry.is_file(follow_symlinks=False):
            links += 1
            continue
        stat = entry.stat(follow_symlinks=False)
        if (stat.st_dev, stat.st_ino) in inodes:
            continue
        inodes.add((stat.st_dev, stat.st_ino))
        path = Path(entry.path)
        header = _read(path, printable(str(path.relative_to(folder))))
        if header is None:
            not_dicom += 1
        elif not header.is_directory:
            headers.append(header)
    if not headers:
        linked = f", {_count(links, 'link')} not followed" if links else ""
        raise SeriesError(
            f"no DICOM images in {shown} ({_count(seen - links, 'file')} seen{linked}): give the "
            "folder that holds the CT series"
        )
    return Scan(shown, tuple(headers), links, not_dicom)


def holds_dicom(folder: Path) -> bool:
    """Tell whether a path is a folder with at least one DICOM file in it, at any depth."""
    if not folder.is_dir():
        return False
    return any(
        _has_mark(Path(entry.path))
        for entry in _entries(folder)
        if entry.is_file(follow_symlinks=False)
    )


def _has_mark(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
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
    """Two patients in one folder are a mix-up, whichever series is asked for."""
    first: dict[str, str] = {}
    for header in scan.headers:
        key = header.patient_key()
        if key:
            first.setdefault(key, header.file.name)
    if len(first) > 1:
        names = list(first.values())
        raise SeriesError(
            f"{scan.folder} holds {len(first)} patients (PatientID differs between {names[0]} and "
            f"{names[1]}): keep one patient a folder"
        )


def _series_of(headers: Sequence[Header]) -> dict[str, list[Header]]:
    """By SeriesInstanceUID. Anonymised files may have none: those are one series together."""
    series: dict[str, list[Header]] = {}
    for header in headers:
        series.setdefault(header.fields.text("SeriesInstanceUID"), []).append(header)
    return series


def _shown_uid(uid: str) -> str:
    """Only what really is a UID may be shown."""
    return uid if uid and len(uid) <= 64 and set(uid) <= set("0123456789.") else "(no valid UID)"


def _listing(series: dict[str, list[Header]]) -> str:
    sizes = {
        uid: sum(h.fields.integer("NumberOfFrames", default=1) for h in headers)
        for uid, headers in series.items()
    }
    shown = [f"{_shown_uid(uid)} ({_count(n, 'slice')})" for uid, n in list(sizes.items())[:LISTED]]
    more = [f"{len(sizes) - LISTED} more"] if len(sizes) > LISTED else []
    return ", ".join([*shown, *more])


def choose(scan: Scan, series_uid: str | None) -> tuple[list[Header], list[str]]:
    """The files of the one CT series, and warnings about what was left out."""
    _check_patient(scan)
    kinds: dict[str, list[Header]] = {SLICE: []}
    for header in scan.headers:
        kinds.setdefault(_kind(header), []).append(header)
    slices = kinds.pop(SLICE)
    others = [_count(len(found), kind) for kind, found in sorted(kinds.items())]
    others += [_count(scan.not_dicom, "non-DICOM file")] if scan.not_dicom else []
    others += [f"{_count(scan.links, 'link')} (not followed)"] if scan.links else []
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
            f"{odd[0][0].name}: ImageOrientationPatient differs from {len(main)} other slices: "
            "keep one orientation a series"
        )
    return main, [f"dropped {_count(number, 'slice')} of another orientation"] if odd else []


def check_alike(frames: Sequence[Frame]) -> None:
    """Size and pixel spacing are the same in every slice."""
    checks: tuple[tuple[str, Callable[[Frame], tuple[float, ...]], str], ...] = (
        ("Rows x Columns", lambda f: (f.layout.rows, f.layout.columns), ""),
        ("PixelSpacing", lambda f: (round(f.spacing[0], 4), round(f.spacing[1], 4)), " mm"),
    )
    for what, value_of, unit in checks:
        values = Counter(map(value_of, frames))
        usual = values.most_common(1)[0][0]
        odd = next((f for f in frames if value_of(f) != usual), None)
        if odd is not None:
            is_now, should_be = (" x ".join(f"{v:g}" for v in v2) for v2 in (value_of(odd), usual))
            raise SeriesError(
                f"{odd.name}: {what} is {is_now}{unit}, expected {should_be}{unit} as in the other "
                "slices: take the odd slice out"
            )


def _pixel_digest(frame: Frame) -> tuple[bytes, float, float]:
    for index, payload in enumerate(payloads(frame.file, frame.layout)):
        if index == frame.index:
            digest = hashlib.sha256(payload).digest()
            return digest, frame.rescale.slope, frame.rescale.intercept
    raise SeriesError(f"{frame.name}: the frame is missing: copy the file again")


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
    for i in map(int, order):
        if depth[i] - last > SAME_PLACE_MM:
            kept.append(frames[i])
            last = depth[i]
        elif _is_copy(kept[-1], frames[i]):
            copies += 1
        else:
            raise SeriesError(
                f"{kept[-1].name} and {frames[i].name} lie at one position with different pixels: "
                "give one phase of the scan, or one reconstruction"
            )
    return kept, [f"dropped {_count(copies, 'slice')} given twice"] if copies else []


def _is_copy(a: Frame, b: Frame) -> bool:
    apart = np.linalg.norm(np.subtract(a.position, b.position))
    return bool(apart <= tolerance(0)) and _pixel_digest(a) == _pixel_digest(b)
