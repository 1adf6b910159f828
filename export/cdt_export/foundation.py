"""Foundation encoders to ONNX, in fewer bits where that is asked for, and what it costs."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cdt_export.onnx import OPSET, quiet_exporter, rename_values, strip_notes
from cdt_export.weight_only import Quantize, quantise, weight_bytes
from cdt_runtime.backends import open_session
from cdt_runtime.bundle import write_folder
from cdt_runtime.encoder_card import EncoderCard, InputSpec
from cdt_runtime.encoder_input import image_input
from cdt_runtime.encoders import rgb_bytes
from cdt_runtime.errors import ExportError
from cdt_runtime.reading import read_tile
from cdt_train.encoders.foundation import FoundationEncoder

if TYPE_CHECKING:
    from onnx import ModelProto

OPTIMUM = ("siglip_vision_model", "dinov2", "vit")
"""Architectures whose export optimum describes."""

LEAST_COSINE: dict[Quantize, float] = {
    "none": 0.99999,
    "fp16": 0.9999,
    "int8": 0.999,
    "int8-qdq": 0.99,
    "int4": 0.95,
    "nf4": 0.9,
}
"""Least cosine of an embedding with PyTorch's."""

LIMIT = 2**31 - 1
"""Bytes that a single ONNX file can hold."""

TRIALS = 4
"""Images of noise that an export is compared on."""

NOTICE = (
    "{title}\nsource: {source}\nlicence: {licence}\n{licence_url}\nweights: {origin}\n\n"
    "This graph is derived from those weights: the licence holds for it, too. Under the terms of "
    "Health AI Developer Foundations handing on a derivative is distribution.\n"
)


@dataclass(frozen=True, eq=False)
class ExportedEncoder:
    """An encoder as a bundle ships it.

    Attributes:
        onnx: graph from `images` to `embedding` and, where it gives them, `tokens`.
        card: with origin and identity of the weights.
        report: what was covered and what it cost, for JSON.
    """

    onnx: bytes
    card: EncoderCard
    report: dict[str, Any]

    @property
    def files(self) -> dict[str, bytes]:
        """What a bundle keeps of it, by name."""
        return {
            f"{self.card.graph}.onnx": self.onnx,
            f"{self.card.graph}.txt": notice(self.card).encode(),
        }


def export_encoder(encoder: FoundationEncoder, method: Quantize = "none") -> ExportedEncoder:
    """Export an encoder and compare it with PyTorch.

    Args:
        encoder: as `load_encoder` gives it.
        method: how its weights are kept.

    Raises:
        ExportError: too little is covered, it is too large for one file, answers do not hang on
            the image, or are too far from PyTorch's.
    """
    images = trial_images(encoder.card.input)
    expected = encoder.encode(torch.from_numpy(images))
    _require_difference(encoder.card, expected.embedding.numpy())
    way, model = _exported(encoder)
    before = weight_bytes(model)
    model, coverage = quantise(model, method)
    data = _serialised(encoder.card, model)
    found = open_session("onnxruntime", data).run({"images": images})
    figures = compared(expected.embedding.numpy(), found["embedding"])
    least = LEAST_COSINE[method]
    if not figures["min_cosine"] >= least:
        raise ExportError(
            f"encoder {encoder.card.key}: in {method} its embeddings have a cosine of "
            f"{figures['min_cosine']:.4f} with PyTorch's, at least {least} is expected: take "
            f"another --quantize"
        )
    report = {
        "encoder": encoder.card.key,
        "origin": encoder.card.origin,
        "exported_by": way,
        "quantize": method,
        "bytes": len(data),
        "bytes_before": before,
        "nodes_covered": coverage.nodes,
        "bytes_covered": coverage.bytes,
        "embedding": figures,
    }
    if expected.tokens is not None:
        report["tokens"] = compared(expected.tokens.flatten(1).numpy(), found["tokens"])
    return ExportedEncoder(data, encoder.card, report)


def notice(card: EncoderCard) -> str:
    """What has to go with a graph that holds an encoder's weights."""
    return NOTICE.format(**asdict(card))


def write_encoder(exported: ExportedEncoder, folder: Path) -> None:
    """Write an encoder to a folder of its own, replacing an older one in one step."""
    write_folder(
        folder,
        {
            "encoder.onnx": exported.onnx,
            "card.json": json.dumps(exported.card.to_dict(), indent=1).encode(),
            "report.json": json.dumps(exported.report, indent=1).encode(),
            "NOTICE.txt": notice(exported.card).encode(),
        },
    )


@dataclass(frozen=True)
class LabelledTiles:
    """Tiles of a folder `CLASS/*`.

    Attributes:
        paths: of each.
        labels: number of each one's class.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]


def labelled_tiles(folder: Path) -> LabelledTiles:
    """Find the tiles of a folder with a folder for each class.

    Raises:
        ExportError: fewer than two classes of three tiles.
    """
    paths = tuple(path for path in sorted(folder.glob("*/*")) if path.is_file())
    labels = np.unique([path.parent.name for path in paths], return_inverse=True)[1]
    counts = np.bincount(labels) if len(labels) else np.zeros(0, int)
    if len(counts) < 2 or counts.min() < 3:
        raise ExportError(f"--tiles {folder}: expected 2 classes or more, CLASS/*, of 3 tiles each")
    return LabelledTiles(paths, labels)


def few_shot_change(
    encoder: FoundationEncoder, exported: ExportedEncoder, tiles: LabelledTiles
) -> dict[str, float]:
    """Compare few-shot accuracy on real tiles before and after.

    Args:
        encoder: in PyTorch.
        exported: the same as it ships.
        tiles: RGB.

    Returns:
        5-shot accuracy of nearest prototypes over the same 1000 episodes, or with as many tiles a
        class as there are: `before`, `after` and their difference, and the `tiles`.
    """
    images = np.stack([_prepared(path, encoder.card.input) for path in tiles.paths])
    session = open_session("onnxruntime", exported.onnx)
    batches = [images[n : n + TRIALS] for n in range(0, len(images), TRIALS)]
    after = np.concatenate([session.run({"images": part})["embedding"] for part in batches])
    before = encoder.encode(torch.from_numpy(images)).embedding.numpy()
    labels = tiles.labels
    k = min(5, int(np.bincount(labels).min()) - 1)
    rng = np.random.default_rng(0)
    episodes = [_episode(labels, k, rng) for _ in range(1000)]
    found = [
        float(np.mean([_accuracy(one, labels, *e) for e in episodes])) for one in (before, after)
    ]
    change = found[1] - found[0]
    return {
        **{"k": k, "before": found[0], "after": found[1]},
        **{"change": change, "tiles": len(tiles.paths)},
    }


def _prepared(path: Path, spec: InputSpec) -> NDArray[np.float32]:
    tile = read_tile(path)
    return image_input(rgb_bytes(tile.pixels, tile.bits, tile.channels, path.name), spec)


def _episode(
    labels: NDArray[np.int64], k: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw k support tiles a class and one query of each."""
    drawn = [rng.permutation(np.flatnonzero(labels == c))[: k + 1] for c in np.unique(labels)]
    return np.stack([one[:k] for one in drawn]), np.array([one[k] for one in drawn])


def _accuracy(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    support: NDArray[np.int64],
    query: NDArray[np.int64],
) -> float:
    centred = embeddings - embeddings[support.ravel()].mean(axis=0)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    means = unit[support].mean(axis=1)
    gaps = np.linalg.norm(unit[query][:, None] - means[None], axis=2)
    return float((gaps.argmin(axis=1) == labels[query]).mean())


def trial_images(spec: InputSpec) -> NDArray[np.float32]:
    """Make smooth noise in the range of prepared images, `(TRIALS, ...)`."""
    rng = np.random.default_rng(0)
    if spec.volume is not None and spec.volume.shape is not None:
        whole = (TRIALS, len(spec.volume.windows), *spec.volume.shape)
        return rng.random(whole).astype(np.float32)
    coarse = rng.random((TRIALS, 3, 8, 8)).astype(np.float32)
    fine = torch.nn.functional.interpolate(
        torch.from_numpy(coarse), size=(spec.size, spec.size), mode="bilinear"
    ).numpy()
    shape = (1, 3, 1, 1)
    made = (fine - np.reshape(spec.mean, shape)) / np.reshape(spec.std, shape)
    ordered = made.transpose(0, 2, 3, 1) if spec.layout == "NHWC" else made
    return np.ascontiguousarray(ordered, dtype=np.float32)


def compared(expected: NDArray[Any], found: NDArray[Any]) -> dict[str, float]:
    """Return least and mean cosine of the rows, and the largest difference."""
    first = expected.reshape(len(expected), -1).astype(np.float64)
    second = found.reshape(len(expected), -1).astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosine = (first * second).sum(axis=1) / np.maximum(norms, 1e-30)
    return {
        "min_cosine": float(cosine.min()),
        "mean_cosine": float(cosine.mean()),
        "max_error": float(np.abs(first - second).max()),
    }


def _serialised(card: EncoderCard, model: ModelProto) -> bytes:
    """Write a graph to bytes.

    Raises:
        ExportError: it is too large for that.
    """
    size = sum(len(one.raw_data) for one in model.graph.initializer)
    if size > LIMIT:
        raise ExportError(
            f"encoder {card.key}: its weights take {size / 2**30:.1f} GiB, one ONNX file holds 2: "
            f"give --quantize int8 or int4"
        )
    data: bytes = model.SerializeToString()
    return data


def _exported(encoder: FoundationEncoder) -> tuple[str, ModelProto]:
    """Export in float32, by optimum where it knows the architecture."""
    import onnx

    module: Any = encoder.module
    if isinstance(getattr(module, "onnx", None), bytes):
        return "as it came", onnx.load_from_string(module.onnx)
    net = getattr(module, "net", None)
    kind = getattr(getattr(net, "config", None), "model_type", None)
    if kind in OPTIMUM:
        return "optimum", _by_optimum(net, kind)
    return "torch.onnx", _by_torch(encoder)


def _by_torch(encoder: FoundationEncoder) -> ModelProto:
    batch = torch.export.Dim("batch")
    names = ["encoder_embedding"]
    names += [] if encoder.card.token_dim is None else ["encoder_tokens"]
    with quiet_exporter():
        program = torch.onnx.export(
            encoder.module,
            (torch.from_numpy(trial_images(encoder.card.input)),),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=names,
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    assert program is not None  # the exporter raises on failure
    model = program.model_proto
    rename_values(model, {name: name.removeprefix("encoder_") for name in names})
    strip_notes(model)
    return model


def _by_optimum(net: Any, kind: str) -> ModelProto:
    """Export a model of transformers by optimum's description of it."""
    import onnx
    from optimum.exporters.onnx import export
    from optimum.exporters.tasks import TasksManager

    describe = TasksManager.get_exporter_config_constructor(
        "onnx", model_type=kind, task="feature-extraction", library_name="transformers"
    )
    with tempfile.TemporaryDirectory() as folder, quiet_exporter():
        path = Path(folder) / "encoder.onnx"
        export(net, describe(net.config), path, opset=OPSET)
        model = onnx.load(path)
    named = {"pixel_values": "images", "pooler_output": "embedding", "last_hidden_state": "tokens"}
    rename_values(model, named)
    strip_notes(model)
    return model


def _require_difference(card: EncoderCard, embeddings: NDArray[Any]) -> None:
    """Refuse an encoder that says the same of every image: any comparison would pass."""
    spread = np.abs(embeddings - embeddings[:1]).max()
    if not spread > 1e-4 * np.abs(embeddings).max():
        raise ExportError(
            f"encoder {card.key}: says the same of every image: its weights are not those of a "
            f"trained encoder"
        )
