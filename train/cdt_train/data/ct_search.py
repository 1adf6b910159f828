"""CT series below a folder: folders of DICOM files, and npz volumes.

CT_DIR/PATIENT/.../*.dcm   every folder with DICOM files is one series; its patient is the
                           first folder name
CT_DIR/*.dcm               one series, of the patient CT_DIR
CT_DIR/NAME.npz            a volume with `hu`, of the patient NAME; in a folder, of the first
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cdt_runtime.errors import DatasetError
from cdt_runtime.printable import counted
from cdt_train.data.dataset import CtSeries

_DICOM_SUFFIXES = {".dcm", ".dicom", ".ima"}


def find_ct(ct_dir: Path) -> tuple[list[CtSeries], list[str]]:
    """List the CT series of a folder, sorted by path; none is opened.

    Returns:
        The series, and warnings.

    Raises:
        DatasetError: there are none.
    """
    if not ct_dir.is_dir():
        raise DatasetError(f"{ct_dir}: no such folder: --ct-dir holds PATIENT/.../*.dcm or *.npz")
    found = [*_dicom(ct_dir), *_volumes(ct_dir)]
    if not found:
        raise DatasetError(f"{ct_dir} has no CT: expected PATIENT/.../*.dcm, or *.npz with 'hu'")
    return sorted(found, key=lambda one: one.path), _unread(ct_dir)


def dicom_folders(ct_dir: Path) -> list[Path]:
    """Every folder from `ct_dir` on that has DICOM files of its own, sorted."""
    return sorted(
        folder for folder in _walk(ct_dir) if any(is_dicom(path) for path in folder.iterdir())
    )


def is_dicom(path: Path) -> bool:
    """By its suffix, or, as archives often write files without one, by the mark at byte 128."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() in _DICOM_SUFFIXES:
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _dicom(ct_dir: Path) -> Iterator[CtSeries]:
    for folder in dicom_folders(ct_dir):
        below = folder.relative_to(ct_dir)
        own = ct_dir.resolve().name
        yield CtSeries(folder, below.parts[0] if below.parts else own, _name(below, own))


def _volumes(ct_dir: Path) -> Iterator[CtSeries]:
    for file in _files(ct_dir, ".npz"):
        below = file.relative_to(ct_dir)
        patient = below.parts[0] if len(below.parts) > 1 else file.stem
        yield CtSeries(file, patient, below.as_posix())


def _name(below: Path, own: str) -> str:
    return below.as_posix() if below.parts else own


def _unread(ct_dir: Path) -> list[str]:
    """Other formats of volumes are passed over, but not without a word."""
    nifti = _files(ct_dir, ".nii.gz", ".nii")
    if not nifti:
        return []
    files = counted(len(nifti), "NIfTI file")
    return [f"{files} in {ct_dir} not read, first {nifti[0].name}: CT is read from DICOM and npz"]


def _files(top: Path, *suffixes: str) -> list[Path]:
    """Files of these suffixes from `top` on, sorted."""
    return sorted(
        path
        for folder in _walk(top)
        for path in folder.iterdir()
        if path.name.lower().endswith(suffixes) and not path.name.startswith(".") and path.is_file()
    )


def _walk(top: Path) -> Iterator[Path]:
    """Folders from `top` on, through links too (archives are often linked in), each only once."""
    seen = set()
    for name, below, _ in os.walk(top, followlinks=True):
        real = os.path.realpath(name)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(folder for folder in below if not folder.startswith("."))
        yield Path(name)
