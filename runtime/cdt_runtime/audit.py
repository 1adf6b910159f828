"""An append-only log of what was answered, whose lines hang on one another.

Each line is a JSON object with the hash of the line before it and its own, so that a line that was
changed, taken out or put in shows. A log that was cut at its end does not show it: keep the last
hash, which `cdt-doctor audit` prints, elsewhere. No names and no text of headers go in: inputs are
known by their hashes alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from cdt_runtime import __version__
from cdt_runtime.bundle import Bundle
from cdt_runtime.classifier import FewShotClassifier
from cdt_runtime.errors import InputError
from cdt_runtime.prediction import Context, Prediction
from cdt_runtime.prototypes import TENSORS
from cdt_runtime.slides.dicom_wsi import slide_files
from cdt_runtime.tile_stream import Failure

FIRST = "0" * 64
"""What the first line gives for the hash of the one before it."""

LONGEST = 1 << 20
"""Most bytes of a line that are read back."""


@dataclass(frozen=True)
class AuditState:
    """A log that was read to its end.

    Attributes:
        entries: how many lines it has.
        last: hash of the last one.
    """

    entries: int
    last: str


class AuditLog:
    """Appends to a log; several processes may do so at once.

    Args:
        path: of the file; it is made where there is none.

    Raises:
        InputError: it can't be written, or does not end in a whole line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with self._locked() as file:
                _last(file, path)
        except OSError as error:
            raise _unwritable(path, error) from error

    def append(self, content: Mapping[str, Any]) -> None:
        """Write a line and wait until it is on the disk.

        Raises:
            InputError: it can't be written.
        """
        try:
            with self._locked() as file:
                last = _last(file, self._path)
                entry = {
                    "entry": last.entries + 1,
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    **content,
                    "previous": last.last,
                }
                line = json.dumps(entry | {"hash": _hash(entry)}, ensure_ascii=False)
                file.seek(0, os.SEEK_END)
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def _locked(self) -> BinaryIO:
        """Open the file and wait until no other process holds it; closing gives it free."""
        file = self._path.open("a+b")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file


def verify(path: Path) -> AuditState:
    """Read a log from its first line to its last.

    Raises:
        InputError: it can't be read, or a line does not follow from those before it; it is named.
    """
    state = AuditState(0, FIRST)
    try:
        with path.open("rb") as file:
            for line in iter(lambda: file.readline(LONGEST), b""):
                state = _next(line, state, path)
    except OSError as error:
        raise InputError(f"{path.name}: can't be read ({error.strerror})") from error
    return state


def of_answer(
    answer: Prediction | Failure, classifier: FewShotClassifier, context: Context
) -> dict[str, Any]:
    """What the log says of a tile, answered or not."""
    if isinstance(answer, Failure):
        return of_failure(answer.error, classifier, context)
    return of_prediction(answer, classifier, context)


def of_prediction(
    prediction: Prediction, classifier: FewShotClassifier, context: Context
) -> dict[str, Any]:
    """What the log says of an answer."""
    return {
        **_by(classifier, context),
        "input": prediction.sha256,
        "label": prediction.label,
        "probabilities": {name: round(p, 6) for name, p in prediction.probabilities.items()},
        "abstained": prediction.abstained,
        "reason": prediction.reason,
        "unlikeness": round(prediction.unlikeness, 6),
        "prediction_set": prediction.prediction_set,
        "warnings": len(prediction.warnings),
    }


def of_slide(
    path: Path, summary: Mapping[str, Any], classifier: FewShotClassifier, context: Context
) -> dict[str, Any]:
    """What the log says of a slide.

    Args:
        path: of the slide, which is read once more for its hash.
        summary: as `slides.results.write_results` gives it.
        classifier: that answered.
        context: the CT's, or none.
    """
    digest = _digest_of(slide_files(path))
    counts = {name: summary[name] for name in ("tiles", "labels", "abstained", "reasons")}
    unread = {"unreadable": summary["unreadable"], "warnings": len(summary["warnings"])}
    return {**_by(classifier, context), "input": digest, **counts, **unread}


def _digest_of(files: Sequence[Path]) -> str:
    """Hash of a file's content; of several that of their hashes."""
    digests = []
    for one in files:
        with one.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def of_change(
    what: str, before: Bundle, after: Bundle, inputs: Sequence[str] = ()
) -> dict[str, Any]:
    """What the log says of a change of a bundle by `cdt-enroll`.

    Args:
        what: "enroll", "remove", "adapt" or "undo"; class names do not go in.
        before: the bundle as it was.
        after: as it is.
        inputs: hash of each tile that was added.
    """
    return {
        "tool": f"cdt-enroll {__version__}",
        "change": what,
        "bundle": before.manifest_sha256,
        "prototypes": before.manifest["files"][TENSORS]["sha256"],
        "bundle_after": after.manifest_sha256,
        "prototypes_after": after.manifest["files"][TENSORS]["sha256"],
        "inputs": list(inputs),
    }


def of_failure(
    error: InputError, classifier: FewShotClassifier, context: Context
) -> dict[str, Any]:
    """What the log says of an input that could not be used: its message may hold a name."""
    return {**_by(classifier, context), "input": None, "error": type(error).__name__}


def _by(classifier: FewShotClassifier, context: Context) -> dict[str, Any]:
    """What answered."""
    return {
        "tool": f"cdt-infer {__version__}",
        "bundle": classifier.bundle.manifest_sha256,
        "prototypes": classifier.bundle.manifest["files"][TENSORS]["sha256"],
        "engine": classifier.engine,
        "precision": classifier.precision,
        "tta": classifier.tta,
        "ct": context.key,
    }


def _next(line: bytes, state: AuditState, path: Path) -> AuditState:
    """Take up a line.

    Raises:
        InputError: it does not follow.
    """
    number = state.entries + 1
    if not line.endswith(b"\n"):
        raise InputError(f"{path.name} line {number}: is torn: what follows was not written")
    try:
        entry = json.loads(line)
        said = entry.pop("hash")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path.name} line {number}: is no entry of a log") from error
    if entry.get("previous") != state.last or entry.get("entry") != number:
        raise InputError(f"{path.name} line {number}: does not follow the line before it")
    if said != _hash(entry):
        raise InputError(f"{path.name} line {number}: was changed after it was written")
    return AuditState(number, said)


def _last(file: BinaryIO, path: Path) -> AuditState:
    """The state that the last line gives, without reading the others.

    Raises:
        InputError: it is torn, or no entry.
    """
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return AuditState(0, FIRST)
    file.seek(max(0, size - LONGEST))
    tail = file.read()
    if tail.endswith(b"\n"):
        try:
            entry = json.loads(tail[:-1].rpartition(b"\n")[2])
            return AuditState(int(entry["entry"]), str(entry["hash"]))
        except (ValueError, KeyError, TypeError):
            pass
    raise InputError(
        f"--audit {path.name}: its last line is torn or no entry of a log: keep it, and give "
        f"another file"
    )


def _hash(entry: Mapping[str, Any]) -> str:
    plain = json.dumps(entry, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"--audit {path}: can't be written ({error.strerror}): give another file")
