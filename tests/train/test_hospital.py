"""The hospital layout: labels are read, and each fault of them is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cdt_runtime.errors import DatasetError
from cdt_train.data import DATASETS, read_hospital

HEADER = "patient,region,label"


def touch(path: Path, content: bytes = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Two patients with two regions each (names only), one CT series, no labels yet."""
    for patient in ("P1", "P2"):
        for region in ("a", "b"):
            touch(tmp_path / "pathology_data" / patient / region / "tile.tif")
    touch(tmp_path / "ct_data" / "R_001" / "20000101" / "S1" / "1-01.dcm")
    return tmp_path


def label(hospital: Path, *lines: str, where: str = "pathology_data/labels.csv") -> Path:
    path = hospital / where
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


GOOD = (HEADER, "P1,a,front", "P1,b,nest", "P2,a,front", "P2,b,nest")


def fails(hospital: Path, message: str) -> None:
    with pytest.raises(DatasetError) as caught:
        read_hospital(hospital)
    text = str(caught.value).replace(str(hospital), "DATA")
    assert message in text
    assert "\n" not in text


class TestPatientRegionLabel:
    @pytest.mark.parametrize("where", ["labels.csv", "pathology_data/labels.csv"])
    def test_reads_the_labels_it_is_given(self, hospital: Path, where: str) -> None:
        label(hospital, *GOOD, where=where)
        dataset = read_hospital(hospital)
        assert [(t.patient, t.label) for t in dataset.tiles] == [
            ("P1", "front"),
            ("P1", "nest"),
            ("P2", "front"),
            ("P2", "nest"),
        ]
        assert dataset.classes == ("front", "nest")
        assert dataset.grouped_by == "patient"
        assert dataset.warnings == ()

    def test_a_region_is_one_file_a_folder_of_markers_or_a_named_file(self, hospital: Path) -> None:
        pathology = hospital / "pathology_data"
        touch(pathology / "P1" / "b" / "PanCK.tif")
        touch(pathology / "P2" / "a" / "._tile.tif")
        touch(pathology / "P2" / "c.ome.tif")
        label(hospital, HEADER, "P1,a,front", "P1,b,nest", "P2,a,nest", "P2,c,front")
        paths = [t.path.relative_to(pathology).as_posix() for t in read_hospital(hospital).tiles]
        assert paths == ["P1/a/tile.tif", "P1/b", "P2/a/tile.tif", "P2/c.ome.tif"]

    def test_spreadsheet_export_with_byte_order_mark_and_blank_lines(self, hospital: Path) -> None:
        text = "\r\n".join([" Patient, Region ,LABEL", *GOOD[1:], "", ",,"])
        (hospital / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(read_hospital(hospital).tiles) == 4

    def test_two_files_with_the_name_of_the_region(self, hospital: Path) -> None:
        for suffix in ("tif", "png"):
            touch(hospital / "pathology_data" / "P1" / f"c.{suffix}")
        label(hospital, *GOOD, "P1,c,nest")
        fails(hospital, "labels.csv line 6: DATA/pathology_data/P1/c.* is c.png and c.tif")

    def test_a_region_folder_without_an_image(self, hospital: Path) -> None:
        touch(hospital / "pathology_data" / "P1" / "c" / "notes.txt")
        label(hospital, *GOOD, "P1,c,nest")
        fails(hospital, "line 6: DATA/pathology_data/P1/c has no image: expected .jpeg, .jpg, .png")


class TestPathLabel:
    @pytest.fixture
    def tiles(self, hospital: Path) -> Path:
        for name in "abcd":
            touch(hospital / "pathology_data" / "all" / f"{name}.png")
        return hospital

    @pytest.mark.parametrize("column", ["patient", "group"])
    def test_grouped_by_the_column_that_is_there(self, tiles: Path, column: str) -> None:
        label(tiles, f"path,label,{column}", "all/a.png,x,G1", "all/b.png,y,G2")
        dataset = read_hospital(tiles)
        assert dataset.grouped_by == column
        assert [t.patient for t in dataset.tiles] == ["G1", "G2"]
        assert dataset.warnings == ()

    def test_paths_are_relative_to_the_csv(self, tiles: Path) -> None:
        label(
            tiles,
            "path,label,patient",
            "pathology_data/all/a.png,x,1",
            "pathology_data/P1/a,y,2",
            where="labels.csv",
        )
        paths = [t.path.relative_to(tiles).as_posix() for t in read_hospital(tiles).tiles]
        assert paths == ["pathology_data/all/a.png", "pathology_data/P1/a/tile.tif"]

    def test_without_patients_it_warns_loudly(self, tiles: Path) -> None:
        label(tiles, "path,label", "all/a.png,x", "all/b.png,y")
        dataset = read_hospital(tiles)
        assert dataset.grouped_by == "tile"
        assert [t.patient for t in dataset.tiles] == ["all/a.png", "all/b.png"]
        assert len(dataset.warnings) == 1
        assert "results must not be called patient-level" in dataset.warnings[0]

    def test_the_same_tile_by_two_spellings(self, tiles: Path) -> None:
        label(tiles, "path,label,patient", "all/a.png,x,1", "./all/a.png,x,1")
        fails(tiles, "labels.csv line 3: the tile stands on line 2 already")


FAULTS = {
    "missing column": (
        ["patient,label", "P1,front"],
        "labels.csv line 1: column 'region' is missing from 'patient,label'; expected "
        "'patient,region,label' or 'path,label' (with 'patient' or 'group' if known)",
    ),
    "semicolons": (["patient;region;label", "P1;a;x"], "line 1: columns are parted by ';'"),
    "column twice": ([f"{HEADER},label", "P1,a,x,y"], "line 1: column 'label' stands there twice"),
    "header only": ([HEADER], "labels.csv: no line follows the header"),
    "empty label": ([*GOOD, "P1,a, "], "labels.csv line 6: label is empty"),
    "empty patient": ([*GOOD, ",a,front"], "labels.csv line 6: patient is empty"),
    "missing path": (
        [*GOOD, "P9,a,front"],
        "labels.csv line 6: neither DATA/pathology_data/P9/a nor DATA/pathology_data/P9/a.* exists",
    ),
    "path of nothing": (
        ["path,label,patient", "P1/x.png,front,P1"],
        "labels.csv line 2: DATA/pathology_data/P1/x.png does not exist",
    ),
    "twice": ([*GOOD, "P1,a,front"], "labels.csv line 6: the tile stands on line 2 already"),
    "conflict": (
        [*GOOD, "P1,a,nest"],
        "labels.csv line 6: label 'nest', but line 2 gave the same tile 'front'",
    ),
    "dots": (
        [*GOOD, "../ct_data,R_001,x"],
        "labels.csv line 6: '../ct_data' leads out of DATA/pathology_data",
    ),
    "dots in region": ([*GOOD, "P1,../P2/a,x"], "labels.csv line 6: '../P2/a' leads out of"),
    "backslashes": ([*GOOD, r"P1,..\P2\a,x"], r"labels.csv line 6: '..\P2\a' leads out of"),
    "absolute": (
        ["path,label,patient", "/etc/hosts,front,P1"],
        "labels.csv line 2: '/etc/hosts' leads out of DATA/pathology_data",
    ),
    "too many cells": (
        [*GOOD, "P1,a,front,maybe"],
        "labels.csv line 6: 4 cells, the header has 3 columns (a cell with a comma needs quotes)",
    ),
    "line break": ([*GOOD, 'P1,a,"fr\nont"'], "line 7: a cell has a line break or another control"),
    "long name": ([*GOOD, f"P1,{'a' * 300},x"], "labels.csv line 6: File name too long: "),
    "open quote": ([*GOOD, 'P1,a,"front'], "labels.csv line 6: unexpected end of data"),
    "one class": (
        [HEADER, "P1,a,front", "P2,a,front"],
        "labels.csv has one class only, 'front': at least 2 are needed",
    ),
}


@pytest.mark.parametrize(("lines", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_every_fault_of_the_labels_names_its_line(
    hospital: Path, lines: list[str], message: str
) -> None:
    label(hospital, *lines)
    fails(hospital, message)


def test_labels_that_are_not_utf8(hospital: Path) -> None:
    (hospital / "labels.csv").write_bytes(HEADER.encode() + b"\nP1,a,Gr\xfcn\n")
    fails(hospital, "DATA/labels.csv is not UTF-8 (byte 28): save it as CSV UTF-8")


def test_labels_that_look_alike(hospital: Path) -> None:
    label(hospital, HEADER, "P1,a,Tumor Stroma", "P2,a,tumor_stroma")
    assert read_hospital(hospital).warnings == (
        "labels 'Tumor Stroma' and 'tumor_stroma' are two classes: is that meant?",
    )


def test_two_label_files(hospital: Path) -> None:
    label(hospital, *GOOD)
    label(hospital, *GOOD, where="labels.csv")
    fails(hospital, "DATA/labels.csv and DATA/pathology_data/labels.csv both exist: keep the one")


class TestClassFolders:
    @pytest.fixture
    def empty(self, tmp_path: Path) -> Path:
        touch(tmp_path / "ct_data" / "R_001" / "1.dcm")
        (tmp_path / "pathology_data").mkdir()
        return tmp_path

    def test_with_patient_folders(self, empty: Path) -> None:
        for name in (
            "front/P1/a.png",
            "front/P2/r1/DAPI.tif",
            "front/P2/r1/CD3.tif",
            "nest/P1/b.jpg",
        ):
            touch(empty / "pathology_data" / name)
        dataset = read_hospital(empty)
        assert [(t.path.name, t.label, t.patient) for t in dataset.tiles] == [
            ("a.png", "front", "P1"),
            ("r1", "front", "P2"),
            ("b.jpg", "nest", "P1"),
        ]
        assert dataset.grouped_by == "patient"

    def test_without_patients_it_warns_loudly(self, empty: Path) -> None:
        for name in ("front/1.png", "nest/1.png", "notes/readme.txt"):
            touch(empty / "pathology_data" / name)
        dataset = read_hospital(empty)
        assert [(t.label, t.patient) for t in dataset.tiles] == [
            ("front", "front/1.png"),
            ("nest", "nest/1.png"),
        ]
        assert dataset.grouped_by == "tile"
        assert dataset.warnings[0].endswith("notes has no tiles and is left out")
        assert "results must not be called patient-level" in dataset.warnings[1]

    def test_some_with_patients_and_some_without(self, empty: Path) -> None:
        for name in ("front/1.png", "nest/P1/1.png"):
            touch(empty / "pathology_data" / name)
        fails(
            empty, "front/1.png belongs to no patient and DATA/pathology_data/nest/P1/1.png to 'P1'"
        )

    @pytest.mark.parametrize("names", [("Patient_001", "Patient_002"), ("P1", "P2"), ("17", "18")])
    def test_patients_are_never_taken_for_classes(
        self, empty: Path, names: tuple[str, str]
    ) -> None:
        for name in names:
            touch(empty / "pathology_data" / name / "region_001" / "tile.tif")
        fails(
            empty,
            f"has no labels and '{names[0]}' looks like a patient, not a class: write a labels.csv "
            "with the header 'patient,region,label' or 'path,label,patient', or sort the tiles "
            "into pathology_data/CLASS/PATIENT/",
        )

    def test_nothing_labelled(self, empty: Path) -> None:
        fails(empty, "DATA has no labelled tiles: write a labels.csv with the header 'patient,reg")

    def test_one_class(self, empty: Path) -> None:
        touch(empty / "pathology_data" / "front" / "P1" / "a.png")
        fails(empty, "DATA/pathology_data has one class only, 'front': at least 2 are needed")


class TestCt:
    def test_every_folder_with_dicom_files_is_a_series_of_its_first_folder(
        self, hospital: Path
    ) -> None:
        label(hospital, *GOOD)
        ct = hospital / "ct_data"
        touch(ct / "R_002" / "1.2.840" / "1.2.841" / "IM.1", b"\0" * 128 + b"DICM")
        touch(ct / "R_002" / "1.2.840" / "report" / "report.pdf")
        touch(ct / "R_002" / "DICOMDIR", b"\0" * 128 + b"DICM")
        touch(ct / "R_003" / "IM1.DCM")
        touch(ct / "R_003" / ".hidden" / "IM1.DCM")
        series = [
            (s.patient, s.path.relative_to(ct).as_posix()) for s in read_hospital(hospital).ct
        ]
        assert series == [
            ("R_001", "R_001/20000101/S1"),
            ("R_002", "R_002/1.2.840/1.2.841"),
            ("R_003", "R_003"),
        ]

    def test_linked_archives_are_followed_once(self, hospital: Path, tmp_path: Path) -> None:
        label(hospital, *GOOD)
        archive = touch(tmp_path / "archive" / "R_9" / "S" / "1.dcm").parents[1]
        (hospital / "ct_data" / "R_9").symlink_to(archive, target_is_directory=True)
        (archive / "again").symlink_to(archive, target_is_directory=True)
        assert [s.patient for s in read_hospital(hospital).ct] == ["R_001", "R_9"]

    def test_missing_folder(self, tmp_path: Path) -> None:
        touch(tmp_path / "pathology_data" / "P1" / "a.tif")
        fails(tmp_path, "DATA/ct_data is not a folder: the CT series are expected there")

    def test_missing_tiles(self, tmp_path: Path) -> None:
        fails(tmp_path, "DATA/pathology_data is not a folder: the tiles are expected there")

    def test_no_dicom(self, hospital: Path) -> None:
        label(hospital, *GOOD)
        (hospital / "ct_data" / "R_001" / "20000101" / "S1" / "1-01.dcm").unlink()
        fails(hospital, "DATA/ct_data has no DICOM files: expected PATIENT/DATE/SERIES/*.dcm")

    def test_files_of_no_patient(self, hospital: Path) -> None:
        label(hospital, *GOOD)
        touch(hospital / "ct_data" / "1.dcm")
        fails(hospital, "DATA/ct_data has DICOM files of no patient: move them to ct_data/PATIENT/")


def test_the_registry_loads_nothing_heavy() -> None:
    code = (
        "import sys, cdt_train.data as d; assert 'hospital' in d.DATASETS; "
        "print({'torch', 'pydicom', 'tifffile', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert DATASETS["hospital"] is read_hospital
