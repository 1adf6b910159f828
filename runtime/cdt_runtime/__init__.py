"""CDT Edge runtime: few-shot inference on pathology tiles with a CT as context, without torch.

    from cdt_runtime import FewShotClassifier

    classifier = FewShotClassifier.open("engines/NAME")
    predictions = classifier.predict(["tile.tif"], ct="ct_dir")

The names below are the public face; they are loaded when first used, so that importing the package
(and with it every command's `--help`) costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdt_runtime.bundle import Bundle
    from cdt_runtime.classifier import FewShotClassifier
    from cdt_runtime.errors import CdtError
    from cdt_runtime.prediction import Prediction
    from cdt_runtime.preprocess import Preprocess
    from cdt_runtime.prototypes import Prototypes
    from cdt_runtime.reading import read_series, read_tile
    from cdt_runtime.tile import Tile
    from cdt_runtime.volume import Volume

__version__ = "0.1.0"

_HOME = {
    "Bundle": "bundle",
    "CdtError": "errors",
    "FewShotClassifier": "classifier",
    "Prediction": "prediction",
    "Preprocess": "preprocess",
    "Prototypes": "prototypes",
    "Tile": "tile",
    "Volume": "volume",
    "read_series": "reading",
    "read_tile": "reading",
}

__all__ = [
    "Bundle",
    "CdtError",
    "FewShotClassifier",
    "Prediction",
    "Preprocess",
    "Prototypes",
    "Tile",
    "Volume",
    "read_series",
    "read_tile",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"cdt_runtime.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
