"""Path Foundation: an encoder of H&E patches, handed out as a TensorFlow SavedModel.

`cdt-train convert path-foundation` makes ONNX of it once, where TensorFlow is installed; training,
export and the runtime then use that. Its architecture is not published in full: it is never
rebuilt, and the small one here is a stand-in of another make.

Source: the model card of google/path-foundation.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cdt_runtime.encoder_card import EncoderCard, InputSpec
from cdt_train.encoders.entry import Entry
from cdt_train.encoders.medsiglip import LICENCE, LICENCE_URL

if TYPE_CHECKING:
    from torch import nn

ONNX = "path_foundation.onnx"
PIXELS = InputSpec(
    size=224,
    layout="NHWC",
    resize="bilinear",
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
    mpp=(0.5, 1.0, 2.0),
)
CARD = EncoderCard(
    key="path-foundation",
    title="Path Foundation",
    modality="tile",
    source="google/path-foundation",
    licence=LICENCE,
    licence_url=LICENCE_URL,
    gated=True,
    commercial=True,
    embedding_dim=384,
    pooling="as the SavedModel gives it",
    input=PIXELS,
    preparation="cdt-train convert path-foundation FOLDER",
    verified="random",
)
TINY = replace(CARD, embedding_dim=16, input=replace(PIXELS, size=56))


def stand_in(card: EncoderCard) -> nn.Module:
    """Build a small transformer that takes and gives what Path Foundation does."""
    from cdt_train.encoders.onnx_module import PatchTransformer

    return PatchTransformer(card.embedding_dim, card.input.size)


def load(path: Path, card: EncoderCard) -> nn.Module:
    """Load the converted encoder.

    Raises:
        CheckpointError: the graph can't be used.
    """
    from cdt_train.encoders.onnx_module import OnnxModule

    return OnnxModule(path if path.is_file() else path / ONNX)


ENTRY = Entry(CARD, TINY, stand_in, load, files=(ONNX,))
