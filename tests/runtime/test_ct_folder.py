"""The walk over a folder, and the rules that hold for it: no traceback, no patient, no waste."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dicom_maker import data_set, enhanced, every, save, without, write_series
from pydicom import uid as uids

from cdt_runtime import ct_folder, ct_walk
from cdt_runtime.ct import load_reduced, load_volume, read_series, scan_series
from cdt_runtime.ct_folder import holds_dicom
from cdt_runtime.errors import SeriesError

GIVE = "give the folder that holds the CT series"


def refusing(error: type[OSError], code: int, when: Callable[[Path], bool]) -> Callable[..., Any]:
    """`Path.stat` of a system that refuses some paths; tests run as root, whom nothing stops."""
    real = Path.stat

    def stat(self: Path, **options: Any) -> os.stat_result:
        if when(self):
            raise error(code, os.strerror(code), str(self))
        return real(self, **options)

    return stat


class TestTheSystemRefuses:
    def test_a_folder_below_one_without_permission(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        refused = refusing(PermissionError, 13, lambda path: path.name == "case")
        monkeypatch.setattr(Path, "stat", refused)
        says = r"^case can't be opened \(Permission denied\): check its path and permissions$"
        with pytest.raises(SeriesError, match=says):
            scan_series(tmp_path / "case")
        with pytest.raises(SeriesError, match=says):
            holds_dicom(tmp_path / "case")

    def test_a_name_too_long(self, tmp_path: Path) -> None:
        says = r"^x+ can't be opened \(File name too long\): check"
        with pytest.raises(SeriesError, match=says):
            scan_series(tmp_path / ("x" * 300))
        with pytest.raises(SeriesError, match=says):
            holds_dicom(tmp_path / ("x" * 300))

    def test_links_in_a_circle(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(tmp_path / "a")
        with pytest.raises(SeriesError, match=r"^a can't be opened \(Too many levels of symb"):
            scan_series(tmp_path / "a")

    def test_nothing_there_and_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x")
        for path in ("gone", "file/inside", "a\0b"):
            with pytest.raises(SeriesError, match=rf": no such folder: {GIVE}$"):
                scan_series(tmp_path / path)
            assert not holds_dicom(tmp_path / path)
        with pytest.raises(SeriesError, match=f"^file is not a folder: {GIVE}$"):
            scan_series(tmp_path / "file")
        assert not holds_dicom(tmp_path / "file")

    def test_a_folder_that_cannot_be_listed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_series(tmp_path / "case" / "DOE")
        real = os.scandir

        def scandir(path: Path) -> Any:
            if path.name == "DOE":
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, "scandir", scandir)
        for ask in (scan_series, holds_dicom):
            with pytest.raises(SeriesError) as caught:
                ask(tmp_path / "case")
            assert str(caught.value) == (
                "a folder inside case can't be listed (Permission denied): check its path and "
                "permissions"
            )

    def test_a_file_that_vanishes_after_the_listing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths = write_series(tmp_path)
        real = ct_walk.entries

        def entries(folder: ct_walk.Folder) -> Any:
            found = list(real(folder))
            paths[0].unlink(missing_ok=True)
            return iter(found)

        monkeypatch.setattr(ct_folder, "entries", entries)
        says = r"^file 8 of 8 \(008\.dcm\) can't be read \(No such file or directory\): check its"
        with pytest.raises(SeriesError, match=says):
            scan_series(tmp_path)
        assert holds_dicom(tmp_path)

    def test_a_disk_that_fails_after_the_scan(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_series(tmp_path)
        series = scan_series(tmp_path)

        class FailingDisk:
            def __enter__(self) -> FailingDisk:
                return self

            def __exit__(self, *_: object) -> None: ...

            def seek(self, _: int) -> None: ...

            def readinto(self, _: memoryview) -> int:
                raise OSError(5, "Input/output error")

        says = r"^file \d of 8 \(00\d\.dcm\) can't be read \(Input/output error\): check"
        monkeypatch.setattr("cdt_runtime.dicom_pixels.open_raw", lambda file: FailingDisk())
        for load in (load_volume, lambda found: load_reduced(found, (4, 4, 4))):
            with pytest.raises(SeriesError, match=says):
                load(series)


@pytest.fixture
def nested(tmp_path: Path) -> Iterator[Path]:
    """A folder with 1100 folders in each other; pytest could not remove them: it recurses."""
    here = tmp_path
    chain = [here := here / "d" for _ in range(1100)]
    for folder in chain:
        folder.mkdir()
    yield tmp_path
    for folder in reversed(chain):
        folder.rmdir()


class TestTheWalk:
    def test_a_thousand_nested_folders(self, nested: Path) -> None:
        write_series(nested / "z")
        assert len(scan_series(nested).frames) == 8
        assert holds_dicom(nested)

    def test_files_come_in_order_of_their_names(self, tmp_path: Path) -> None:
        names = ["a/2", "a/b/1", "a/c", "b", "c/0", "d"]
        for name in reversed(names):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        found = ct_walk.entries(ct_walk.open_folder(tmp_path))
        assert [str(Path(entry.path).relative_to(tmp_path)) for entry in found] == names

    def test_too_many_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_series(tmp_path / "case")
        monkeypatch.setattr(ct_folder, "MAX_FILES", 7)
        with pytest.raises(SeriesError, match=r"^case holds over 7 files: give the folder of one"):
            scan_series(tmp_path / "case")


class TestHoldsDicom:
    def test_what_the_reader_reads_without_the_mark(self, tmp_path: Path) -> None:
        for path in write_series(tmp_path, syntax=uids.ImplicitVRLittleEndian):
            data = path.read_bytes()
            path.write_bytes(data[data.index(b"\x08\x00\x08\x00") :])
        assert len(scan_series(tmp_path).frames) == 8
        assert holds_dicom(tmp_path)

    def test_a_folder_of_images_does_not(self, tmp_path: Path) -> None:
        (tmp_path / "tile.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
        assert not holds_dicom(tmp_path)

    def test_it_stops_looking(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_series(tmp_path / "z")
        (tmp_path / "a").write_bytes(b"x")
        (tmp_path / "b").write_bytes(b"x")
        assert holds_dicom(tmp_path)
        monkeypatch.setattr(ct_folder, "MAX_LOOKED", 2)
        assert not holds_dicom(tmp_path)


class TestNoPatientInMessages:
    PLACE = "DOE^JANE_19600101/20000101/SERIES"

    def fails(self, folder: Path) -> str:
        with pytest.raises(SeriesError) as caught:
            scan_series(folder)
        return str(caught.value)

    def test_folders_are_not_named(self, tmp_path: Path) -> None:
        write_series(tmp_path / "case" / self.PLACE, change=without("PixelSpacing"))
        for folder in ("case", f"case/{self.PLACE}"):
            says = self.fails(tmp_path / folder)
            assert says.startswith("file 1 of 8 (001.dcm): PixelSpacing is missing")

    @pytest.mark.parametrize(
        "name",
        [
            "1.2.826.0.1.3680043.8.498.77",
            "DOE.CT.THORAX.0003.0005.2000.01.01.10.20.30.12345.77.IMA",
            "DOE^JANE.dcm",
            "19600101.dcm",
            "DOE 1960-01-01.dcm",
        ],
    )
    def test_a_file_name_that_may_tell_the_patient_is_not_shown(
        self, name: str, tmp_path: Path
    ) -> None:
        first = write_series(tmp_path, change=without("PixelSpacing"))[0]
        first.rename(tmp_path / name)
        for path in tmp_path.glob("0*.dcm"):
            path.unlink()
        assert self.fails(tmp_path).startswith("file 1 of 1: PixelSpacing is missing")

    @pytest.mark.parametrize("name", ["1-005.dcm", "IM-0001-0005.dcm", "slice12", "i12.CTDC.5"])
    def test_a_file_name_that_only_counts_is_shown(self, name: str, tmp_path: Path) -> None:
        write_series(tmp_path, 1, without("PixelSpacing"))[0].rename(tmp_path / name)
        assert self.fails(tmp_path).startswith(f"file 1 of 1 ({name}): PixelSpacing is missing")

    def test_of_the_folder_given_the_last_part_at_most(self, tmp_path: Path) -> None:
        for place, shown in (("DOE^JANE/CT", "CT"), ("DOE/20000101", "the folder")):
            (tmp_path / place).mkdir(parents=True)
            assert self.fails(tmp_path / place).startswith(
                f"no DICOM images in {shown} (0 files seen)"
            )

    def test_the_folder_here_has_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "case").mkdir()
        monkeypatch.chdir(tmp_path / "case")
        assert self.fails(Path(".")).startswith("no DICOM images in case (0 files")


class TestPatients:
    def mixed(self, folder: Path, **others: str) -> None:
        """Eight slices with an ID and a name, one with other attributes."""
        write_series(folder, change=every(PatientID="7", PatientName="DOE^JANE"))
        ds = data_set(8)
        every(**others)(ds, 0)
        save(ds, folder / "000.dcm")

    @pytest.mark.parametrize(
        "others",
        [
            {"PatientID": "", "PatientName": "DOE^JANE"},
            {"PatientID": "7", "PatientName": ""},
            {"PatientID": "", "PatientName": ""},
            {"PatientID": "7", "PatientName": "Doe^Jane^^"},
        ],
    )
    def test_one_that_lacks_an_attribute_is_no_other(
        self, others: dict[str, str], tmp_path: Path
    ) -> None:
        self.mixed(tmp_path, **others)
        assert len(read_series(tmp_path).hu) == 9

    @pytest.mark.parametrize(
        ("keyword", "others"),
        [
            ("PatientID", {"PatientID": "8", "PatientName": "DOE^JANE"}),
            ("PatientName", {"PatientID": "", "PatientName": "ROE^JANE"}),
            ("PatientName", {"PatientID": "7", "PatientName": "ROE^JANE"}),
        ],
    )
    def test_another_is_told_by_the_right_attribute(
        self, keyword: str, others: dict[str, str], tmp_path: Path
    ) -> None:
        self.mixed(tmp_path / "case", **others)
        says = rf"^case holds 2 patients \({keyword} differs between file 1 of 9 \(000\.dcm\) and "
        with pytest.raises(SeriesError, match=says):
            read_series(tmp_path / "case")


def test_frames_given_twice_are_read_once_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(enhanced(), tmp_path / "a")
    shutil.copy(tmp_path / "a", tmp_path / "b")
    reads: list[str] = []
    real = ct_folder.payloads

    def payloads(file: Any, layout: Any) -> Any:
        reads.append(file.name)
        return real(file, layout)

    monkeypatch.setattr(ct_folder, "payloads", payloads)
    assert scan_series(tmp_path).warnings == ("dropped 8 slices given twice",)
    assert sorted(reads) == ["file 1 of 2 (a)", "file 2 of 2 (b)"]


def test_a_warning_counts_one_slice_as_one(tmp_path: Path) -> None:
    write_series(tmp_path, change=lambda ds, i: i == 2 and every(PixelPaddingValue=0)(ds, i))
    assert scan_series(tmp_path).warnings == (
        "PixelPaddingValue lies inside the range of tissue: not masked (1 slice)",
    )
