"""Answers as a DICOM structured report: Comprehensive SR after TID 1500, through highdicom.

A measurement group a tile, or one for a slide: the class as a code or the reason why there is none,
a probability a class, the algorithm with the bundle's hash, and the slide's image where that is in
DICOM. The image library holds the CT series and the slide. Patient and study are those of the CT,
or of the slide: a report names the patient, as every object of their study does.

Source: DICOM PS3.16, TID 1500, 1501, 1600 and 4019.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from cdt_runtime import __version__
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.dicom_quiet import quiet
from cdt_runtime.errors import InputError
from cdt_runtime.files import replace_synced
from cdt_runtime.prediction import Prediction

SCHEME = "99CDT"
"""Of codes of our own; private schemes begin with 99."""
CODE_COLUMNS = ("class", "value", "scheme", "meaning")
SHORT, LONG = 16, 64
"""Most characters of a code's value and scheme, and of its meaning."""
CT_SOP = "1.2.840.10008.5.1.4.1.1.2"
MANUFACTURER = "CDT Edge"

_PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
_STUDY = ("AccessionNumber", "StudyID", "StudyDate", "StudyTime")
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
References = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ClassCode:
    """A code of a class: value, coding scheme and meaning."""

    value: str
    scheme: str
    meaning: str


def read_codes(path: Path) -> dict[str, ClassCode]:
    """Read codes of classes: a CSV file with the columns class, value, scheme and meaning.

    Raises:
        InputError: it can't be read; the row is named.
    """
    try:
        text = path.read_text("utf-8-sig")
        lines = list(csv.DictReader(text.splitlines(), strict=True))
    except OSError as error:
        raise InputError(f"--codes {path}: can't be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--codes {path.name}: is no CSV in UTF-8: save it again") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        cells = [(line.get(name) or "").strip() for name in CODE_COLUMNS]
        name, value, scheme, meaning = cells
        if not all(cells) or len(value) > SHORT or len(scheme) > SHORT or len(meaning) > LONG:
            raise InputError(
                f"--codes {path.name} row {number}: expected class, value and scheme of up to "
                f"{SHORT} characters, meaning of up to {LONG}"
            )
        found[name] = ClassCode(value, scheme, meaning)
    return found


def own_code(kind: str, name: str) -> ClassCode:
    """Make a code of our own of a name: the same name has the same code everywhere."""
    digest = hashlib.sha256(name.encode()).hexdigest()[: SHORT - 2].upper()
    return ClassCode(f"{kind}-{digest}", SCHEME, name[:LONG])


def write_report(
    path: Path,
    classifier: FewShotClassifier,
    answers: Sequence[Prediction] | Mapping[str, Any],
    ct: References,
    slide: References,
    codes: Mapping[str, ClassCode],
) -> None:
    """Write the report of a patient's tiles, or of one slide.

    Args:
        path: of the file.
        classifier: that answered.
        answers: of tiles; or of a slide its summary, as `slides.results.write_results` gives it.
        ct: what `ScannedSeries.references` gave; empty for no CT.
        slide: `Slide.references`; empty for one that is not in DICOM.
        codes: of classes; others get one of our own.

    Raises:
        InputError: there is no image in DICOM to refer to, CT and slide are of two patients, the
            headers lack what a report must repeat, or the file can't be written.
    """
    evidence = [_data_set(one) for one in (*ct, *slide)]
    _check_evidence(evidence, len(ct))
    try:
        with quiet():
            content = _document(classifier, answers, evidence, evidence[len(ct) :], codes)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(
            f"--dicom-sr: the headers of the images can't be repeated in a report "
            f"({type(error).__name__}): export them again from the archive"
        ) from error
    try:
        replace_synced(path, content)
    except OSError as error:
        raise InputError(f"--dicom-sr {path}: can't be written ({error.strerror})") from error


def _document(
    classifier: FewShotClassifier,
    answers: Sequence[Prediction] | Mapping[str, Any],
    evidence: Sequence[Any],
    slide: Sequence[Any],
    codes: Mapping[str, ClassCode],
) -> bytes:
    """Make the file."""
    from highdicom.sr import ComprehensiveSR
    from pydicom.uid import generate_uid

    told = _Told(classifier, codes, slide)
    groups = (
        [told.slide(answers)]
        if isinstance(answers, Mapping)
        else [told.tile(answer) for answer in answers]
    )
    content = told.report(groups, evidence)
    made_of = [told.bundle_sha256, *(one.SOPInstanceUID for one in evidence), *told.named]
    document = ComprehensiveSR(
        evidence=evidence,
        content=content,
        series_instance_uid=generate_uid(entropy_srcs=["series", *made_of]),
        series_number=1,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        specific_character_set="ISO_IR 192",
        manufacturer_model_name=MANUFACTURER,
        software_versions=__version__,
        device_serial_number=told.bundle_sha256[:LONG],
        series_description="Few-shot classification of pathology (research use only)",
    )
    stream = BytesIO()
    document.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _data_set(reference: Mapping[str, Any]) -> Any:
    """Make a data set of a header in DICOM's JSON."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.dataset import Dataset

    tagged = {f"{tag_for_keyword(keyword):08X}": value for keyword, value in reference.items()}
    try:
        with quiet():
            data = Dataset.from_json(tagged)
    except Exception as error:  # any kind: pydicom converts on access, from values of any content
        raise InputError(
            "--dicom-sr: the headers of the images can't be repeated in a report: export them again"
        ) from error
    for keyword in (*_PATIENT, *_STUDY):
        if keyword not in data:
            setattr(data, keyword, "")
    return data


def _check_evidence(evidence: Sequence[Any], of_ct: int) -> None:
    if not evidence:
        raise InputError(
            "--dicom-sr: a report refers to images in DICOM: give CT_DIR, or a slide in DICOM"
        )
    for one in evidence:
        lacking = [keyword for keyword in _NEEDED if not one.get(keyword)]
        if lacking:
            raise InputError(
                f"--dicom-sr: an image lacks {lacking[0]}: export it again from the archive"
            )
    patients = {str(one.PatientID).strip() for one in (evidence[0], *evidence[of_ct : of_ct + 1])}
    if len(patients) > 1:
        raise InputError(
            "--dicom-sr: the CT and the slide are of two patients: check which belong here"
        )


class _Told:
    """Makes the parts of a report.

    Args:
        classifier: that answered.
        codes: of classes.
        slide: data sets of a slide in DICOM, the finest level among them.
    """

    def __init__(
        self, classifier: FewShotClassifier, codes: Mapping[str, ClassCode], slide: Sequence[Any]
    ) -> None:
        self._classifier, self._codes, self._slide = classifier, codes, slide
        self.bundle_sha256 = classifier.bundle.manifest_sha256
        self.named: list[str] = []

    def tile(self, answer: Prediction) -> Any:
        """A group of one tile."""
        from pydicom.sr.codedict import codes

        chances = {
            own_code("P", f"Probability of {name}"): (value, codes.UCUM.NoUnits)
            for name, value in answer.probabilities.items()
        }
        used = "without CT" if answer.ct is None or answer.ct.off else "with CT"
        facts = [f"tile SHA-256 {answer.sha256}", used]
        return self._group(answer.tile, answer.label, answer.reason, chances, facts)

    def slide(self, summary: Mapping[str, Any]) -> Any:
        """A group of a whole slide: how many tiles are what, and mean probabilities."""
        from highdicom.sr import CodedConcept
        from pydicom.sr.codedict import codes

        tiles = CodedConcept("{tiles}", "UCUM", "tiles")
        values = {
            own_code("P", f"Mean probability of {name}"): (value, codes.UCUM.NoUnits)
            for name, value in (summary["mean_probabilities"] or {}).items()
        }
        counts = {**summary["labels"], "abstention": summary["abstained"]}
        values |= {
            own_code("N", f"Number of tiles: {name}"): (count, tiles)
            for name, count in counts.items()
        }
        used = "without CT" if summary["ct"] is None or summary["ct"]["off"] else "with CT"
        return self._group(summary["slide"], None, None, values, [used])

    def _group(
        self,
        name: str,
        label: str | None,
        reason: str | None,
        values: Mapping[ClassCode, tuple[float, Any]],
        facts: Sequence[str],
    ) -> Any:
        from highdicom import sr
        from pydicom.sr.codedict import codes
        from pydicom.uid import generate_uid

        self.named += [name, *facts]
        said = []
        if label is not None:
            code = self._codes.get(label) or own_code("C", label)
            said.append(sr.QualitativeEvaluation(codes.DCM.Finding, _coded(code)))
        if reason is not None:
            why = own_code("R", reason.split(":")[0])
            asked = own_code("Q", "Reason for abstention")
            said.append(sr.QualitativeEvaluation(_coded(asked), _coded(why)))
        source = [
            sr.SourceImageForMeasurementGroup(one.SOPClassUID, one.SOPInstanceUID)
            for one in self._slide[:1]
        ]
        uid = generate_uid(entropy_srcs=[self.bundle_sha256, name, *facts])
        return sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(uid, name[:LONG]),
            algorithm_id=self._algorithm(facts),
            measurements=[
                sr.Measurement(_coded(code), float(value), unit)
                for code, (value, unit) in values.items()
            ],
            qualitative_evaluations=said or None,
            source_images=source or None,
        )

    def _algorithm(self, facts: Sequence[str]) -> Any:
        from highdicom.sr import AlgorithmIdentification

        bundle, least = self._classifier.bundle, self._classifier.prototypes.min_confidence
        return AlgorithmIdentification(
            name=f"{MANUFACTURER}: {bundle.path.name}"[:LONG],
            version=f"{__version__} {bundle.identity}",
            parameters=[
                f"bundle SHA-256 {self.bundle_sha256}",
                f"engine {self._classifier.engine}",
                f"least probability {least:.2f}",
                *facts,
            ],
            manufacturer=MANUFACTURER,
        )

    def report(self, groups: Sequence[Any], evidence: Sequence[Any]) -> Any:
        """The document's content."""
        from highdicom import sr
        from pydicom.sr.codedict import codes
        from pydicom.uid import generate_uid

        device = sr.DeviceObserverIdentifyingAttributes(
            uid=generate_uid(entropy_srcs=["device", self.bundle_sha256]),
            name=MANUFACTURER,
            manufacturer_name=MANUFACTURER,
            model_name=self._classifier.bundle.path.name[:LONG],
        )
        return sr.MeasurementReport(
            observation_context=sr.ObservationContext(
                observer_device_context=sr.ObserverContext(codes.DCM.Device, device)
            ),
            procedure_reported=codes.SCT.ImagingProcedure,
            imaging_measurements=groups,
            title=codes.DCM.ImagingMeasurementReport,
            referenced_images=evidence,
        )


def _coded(code: ClassCode) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, code.meaning)
