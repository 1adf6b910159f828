"""Every error that a user can mend.

    CdtError
    ├── InputError              a file or folder that was handed in can't be used
    │   ├── SeriesError         ... a CT series (DICOM)
    │   ├── TileError           ... a pathology tile (TIFF, PNG, JPEG)
    │   └── DatasetError        ... a training data set: layout, labels, splits
    ├── RecipeError             a recipe: unknown key, wrong type, value out of range
    ├── TrainingError           a training run that can't go on, such as a loss that is not finite
    ├── CheckpointError         a training checkpoint: missing, damaged, of another model
    ├── BundleError             a bundle: missing, altered, of another version
    ├── PrototypeError          a support set or prototypes that can't be used
    ├── BackendError            an inference engine that can't run here
    ├── ExportError             an export that can't be made as it was asked for
    ├── ParityError             an export that does not decide as the model it came from
    └── MissingDependencyError  an optional part that is not installed

Each message is one line: the thing, its value, what was expected, and the cure. Commands print it
on stderr and exit with code 2. Anything else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CdtError(Exception):
    """Base of every error that a user can mend."""

    exit_code = 2


class InputError(CdtError):
    """A file or folder that was handed in can't be used."""


class SeriesError(InputError):
    """A CT series can't be used."""


class TileError(InputError):
    """A pathology tile can't be used."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of the file before what is wrong with it."""
    try:
        yield
    except TileError as error:
        raise TileError(f"{name}: {error}") from error


class DatasetError(InputError):
    """A training data set can't be used."""


class RecipeError(CdtError):
    """A recipe holds an unknown key, a wrong type or a value out of range."""


class TrainingError(CdtError):
    """A training run can't go on."""


class CheckpointError(CdtError):
    """A training checkpoint is missing, damaged or of another model."""


class BundleError(CdtError):
    """A bundle is missing, altered or of another version."""


class PrototypeError(CdtError):
    """A support set or a set of prototypes can't be used."""


class BackendError(CdtError):
    """An inference engine can't run on this machine."""


class ExportError(CdtError):
    """An export can't be made as it was asked for."""


class ParityError(CdtError):
    """An exported graph does not decide as the model it was made from."""


class MissingDependencyError(CdtError):
    """An optional part is not installed; the message names the pip command that adds it."""
