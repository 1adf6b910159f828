"""Structured reports: what they say, and that validators of DICOM find no fault with them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from wsi_maker import write_wsi

from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.cli import infer_command
from cdt_runtime.dicom_report import own_code, write_report
from cdt_runtime.errors import InputError
from cdt_runtime.reading import open_slide, scan_series

pytest.importorskip("highdicom")
from dicom_standard import errors_in

Run = Callable[..., tuple[int, str, str]]
PIXELMED = Path("/usr/share/java/pixelmed.jar")


@pytest.fixture
def run(shell: Run, bundle_dir: Path, cache_dir: Path) -> Run:
    engine = ("--bundle", bundle_dir, "--backend", "onnxruntime")
    return lambda *words: shell(infer_command, *words, *engine)


@pytest.fixture(scope="module")
def patient(phantom_dir: Path) -> Path:
    return phantom_dir / "new_patient"


def items(data: Dataset) -> Iterator[Dataset]:
    """All content items."""
    for item in data.get("ContentSequence", ()):
        yield item
        yield from items(item)


def name_of(item: Dataset) -> str:
    return str(item.ConceptNameCodeSequence[0].CodeMeaning)


def groups(data: Dataset) -> list[Dataset]:
    return [
        item
        for item in items(data)
        if item.ValueType == "CONTAINER" and name_of(item) == "Measurement Group"
    ]


def valid(path: Path) -> None:
    """No validator at hand finds an error."""
    assert errors_in(path) == []
    if shutil.which("dciodvfy"):
        said = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True).stderr
        assert "ComprehensiveSR" in said
        assert [line for line in said.splitlines() if line.startswith("Error")] == []
    if shutil.which("java") and PIXELMED.exists():
        limits = [f"-Djdk.xml.xpath{name}Limit=0" for name in ("TotalOp", "ExprOp", "ExprGrp")]
        words = ["-cp", "/usr/share/java/*", "com.pixelmed.validate.DicomSRValidator", str(path)]
        done = subprocess.run(["java", *limits, *words], capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert "Found Root Template TID_1500" in said
        assert "Root Template Validation Complete" in said
        assert "Error" not in said


def test_a_report_says_what_the_answers_say(run: Run, patient: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.dcm"
    tiles = sorted(patient.glob("*.tif"))
    code, out, err = run(patient / "ct", *tiles, "--json", "--dicom-sr", path)
    assert (code, err) == (0, f"report: {path}\n")
    answers = [json.loads(line) for line in out.splitlines()]
    valid(path)
    data = pydicom.dcmread(path)
    found = groups(data)
    assert len(found) == len(answers)
    for group, answer in zip(found, answers, strict=True):
        inside = {name_of(item): item for item in items(group)}
        parameters = [
            item.TextValue for item in items(group) if name_of(item) == "Algorithm Parameters"
        ]
        assert inside["Tracking Identifier"].TextValue == answer["tile"]
        assert f"tile SHA-256 {answer['sha256']}" in parameters
        for name, chance in answer["probabilities"].items():
            value = inside[f"Probability of {name}"].MeasuredValueSequence[0].NumericValue
            assert float(value) == pytest.approx(chance, abs=1e-9)
        if answer["abstained"]:
            why = inside["Reason for abstention"].ConceptCodeSequence[0].CodeMeaning
            assert answer["reason"].startswith(why)
            assert "Finding" not in inside
        else:
            code_of = inside["Finding"].ConceptCodeSequence[0]
            assert (code_of.CodeMeaning, code_of.CodingSchemeDesignator) == (
                answer["label"],
                "99CDT",
            )


def test_it_refers_to_the_ct_and_belongs_to_its_study(
    run: Run, patient: Path, tmp_path: Path
) -> None:
    path = tmp_path / "report.dcm"
    run(patient / "ct", next(patient.glob("*.tif")), "--dicom-sr", path)
    slices = [
        pydicom.dcmread(one, stop_before_pixels=True) for one in (patient / "ct").rglob("*.dcm")
    ]
    data = pydicom.dcmread(path)
    for keyword in ("StudyInstanceUID", "PatientID", "PatientName", "PatientBirthDate"):
        assert data.get(keyword) == slices[0].get(keyword)
    assert data.SeriesInstanceUID != slices[0].SeriesInstanceUID
    (study,) = data.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == slices[0].SeriesInstanceUID
    cited = {one.ReferencedSOPInstanceUID for one in series.ReferencedSOPSequence}
    assert cited == {one.SOPInstanceUID for one in slices}


def test_classes_can_have_codes_of_the_hospital(run: Run, patient: Path, tmp_path: Path) -> None:
    path, table = tmp_path / "report.dcm", tmp_path / "codes.csv"
    table.write_text(
        "class,value,scheme,meaning\ntumor_stroma,1234,99LOCAL,Tumour stroma\n"
        "invasion_front,1235,99LOCAL,Invasion front\n"
    )
    tiles = sorted(patient.glob("*.tif"))
    out = run(patient / "ct", *tiles, "--json", "--dicom-sr", path, "--codes", table)[1]
    valid(path)
    answered = [line for line in map(json.loads, out.splitlines()) if not line["abstained"]]
    found = [
        item.ConceptCodeSequence[0]
        for item in items(pydicom.dcmread(path))
        if name_of(item) == "Finding" and item.ValueType == "CODE"
    ]
    assert len(found) == len(answered)
    assert {one.CodingSchemeDesignator for one in found} <= {"99LOCAL"}


def test_a_blank_tile_is_an_abstention_with_a_code(run: Run, patient: Path, tmp_path: Path) -> None:
    import tifffile

    source = next(patient.glob("*.tif"))
    with tifffile.TiffFile(source) as file:
        pixels, description = file.asarray(), file.ome_metadata
    assert description
    tile = tmp_path / "blank.ome.tif"
    names = json.loads(run("--no-ct", source, "--json")[1])["channels"]
    tifffile.imwrite(
        tile,
        np.full_like(pixels, 7),
        metadata={"axes": "CYX", "Channel": {"Name": list(names)}},
        photometric="minisblack",
    )
    path = tmp_path / "report.dcm"
    code, out, err = run(patient / "ct", tile, "--json", "--dicom-sr", path)
    assert code == 0, err
    assert json.loads(out)["reason"] == "no tissue: every channel is almost flat"
    valid(path)
    (group,) = groups(pydicom.dcmread(path))
    inside = {name_of(item): item for item in items(group)}
    assert inside["Reason for abstention"].ConceptCodeSequence[0].CodeMeaning == "no tissue"


@pytest.fixture
def classifier(bundle_dir: Path, cache_dir: Path) -> FewShotClassifier:
    return FewShotClassifier.open(bundle_dir, backend="onnxruntime")


SUMMARY: dict[str, Any] = {
    "slide": "slide",
    "labels": {"invasion_front": 12, "tumor_stroma": 3},
    "abstained": 5,
    "mean_probabilities": {"invasion_front": 0.8, "tumor_stroma": 0.2},
    "ct": None,
}


def test_a_slide_in_dicom_is_referred_to(
    classifier: FewShotClassifier, patient: Path, tmp_path: Path
) -> None:
    ct = scan_series(patient / "ct").references()
    pixels = np.zeros((100, 100, 3), np.uint8)
    mine = str(pydicom.dcmread(next((patient / "ct").rglob("*.dcm"))).PatientID)
    folder = write_wsi(tmp_path / "slide", pixels, 0.5, levels=2, patient=mine)
    with open_slide(folder) as slide:
        references = slide.references
    path = tmp_path / "report.dcm"
    write_report(path, classifier, SUMMARY, ct, references, {})
    valid(path)
    data = pydicom.dcmread(path)
    (group,) = groups(data)
    image = next(item for item in items(group) if item.ValueType == "IMAGE")
    cited = image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    assert cited == pydicom.dcmread(folder / "level_0.dcm").SOPInstanceUID
    assert len(data.PertinentOtherEvidenceSequence) == 1
    values = {
        name_of(item): float(item.MeasuredValueSequence[0].NumericValue)
        for item in items(group)
        if item.ValueType == "NUM"
    }
    assert values["Number of tiles: abstention"] == 5
    assert values["Mean probability of invasion_front"] == pytest.approx(0.8)
    alone = tmp_path / "alone.dcm"
    write_report(alone, classifier, SUMMARY, (), references, {})
    valid(alone)


def test_two_patients_in_one_report_are_refused(
    classifier: FewShotClassifier, patient: Path, tmp_path: Path
) -> None:
    ct = scan_series(patient / "ct").references()
    folder = write_wsi(tmp_path / "slide", np.zeros((64, 64, 3), np.uint8), 0.5, levels=1)
    with open_slide(folder) as slide, pytest.raises(InputError, match="are of two patients") as why:
        write_report(tmp_path / "r.dcm", classifier, SUMMARY, ct, slide.references, {})
    assert "Doe" not in str(why.value)
    assert not (tmp_path / "r.dcm").exists()


def refused(call: Callable[[], None]) -> str | None:
    try:
        call()
    except InputError as error:
        return str(error)
    return None


def test_headers_that_say_odd_things_give_a_report_or_one_line(
    classifier: FewShotClassifier, patient: Path, tmp_path: Path
) -> None:
    ct = scan_series(patient / "ct").references()
    path = tmp_path / "report.dcm"
    for keyword in ct[0]:
        for value in (None, [], [""], ["x" * 200], ["9" * 40], [{"Alphabetic": "A^B"}]):
            changed = [{**ct[0], keyword: {**ct[0][keyword], "Value": value}}, ct[1]]
            path.unlink(missing_ok=True)
            said = refused(lambda: write_report(path, classifier, SUMMARY, changed, (), {}))  # noqa: B023
            if said is None:
                pydicom.dcmread(path)
            else:
                assert said.startswith("--dicom-sr: ")
                assert "\n" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--no-ct", "{tile}", "--dicom-sr", "r"),
            "--dicom-sr: a report refers to images in DICOM",
        ),
        (("{ct}", "{tile}", "--codes", "c.csv"), "--codes is for --dicom-sr: give both"),
        (
            ("{ct}", "{tile}", "--dicom-sr", "r", "--codes", "gone.csv"),
            "--codes gone.csv: can't be read",
        ),
        (
            ("{ct}", "{tile}", "--dicom-sr", "no/such/r.dcm"),
            "--dicom-sr no/such/r.dcm: can't be written",
        ),
        (("--manifest", "m.csv", "--dicom-sr", "r"), "--manifest names the inputs"),
    ],
)
def test_what_can_not_be_done_is_one_line(
    run: Run, patient: Path, words: tuple[str, ...], said: str
) -> None:
    known = {"ct": patient / "ct", "tile": next(patient.glob("*.tif"))}
    code, _, err = run(*(word.format(**known) for word in words))
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_codes_are_checked(run: Run, patient: Path, tmp_path: Path) -> None:
    table = tmp_path / "codes.csv"
    table.write_text("class,value,scheme,meaning\na,12345678901234567,99X,A\n")
    tile = next(patient.glob("*.tif"))
    code, _, err = run(patient / "ct", tile, "--dicom-sr", tmp_path / "r", "--codes", table)
    assert code == 2
    assert "--codes codes.csv row 1: expected class, value and scheme" in err
    assert len(own_code("C", "a name of any length " * 9).value) == 16
