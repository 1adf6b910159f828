"""Fixtures shared by every test."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("CDT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real files; tests that need it are skipped, with a reason, where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"real data not found at {SHARED} (set CDT_SHARED_DATA)")
    return SHARED


def _unpacked(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def chest_series(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 contiguous axial slices of a real chest CT, 512 x 512, explicit VR little endian."""
    archive = real_data / "ct" / "lidc_idri_0001_64slices.tar.xz"
    return _unpacked(archive, tmp_path_factory.mktemp("chest")) / "lidc_idri_0001"


@pytest.fixture(scope="session")
def tilted_series(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head phantom scanned with a tilted gantry, its localizer and a summary page in one folder."""
    archive = real_data / "dicom_odd" / "philips_phantom_tilt_mixed.tar.xz"
    return _unpacked(archive, tmp_path_factory.mktemp("tilt")) / "phantom_tilt_mixed"


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for CT tokens."""
    monkeypatch.setenv("CDT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
