"""The gate: an exported bundle decides as the PyTorch model it was made from, or is not written.

Each graph is compared on real held-out inputs, then the decisions of the whole chain: support
tokens, prototypes and classification all from the exported graphs on one side, all from PyTorch on
the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdt_export.graphs import Graph
from cdt_runtime.backends import Session
from cdt_runtime.errors import ParityError
from cdt_runtime.golden import FULL, HALF, relative_gap
from cdt_runtime.prototypes import fit_prototypes, softmax
from cdt_train.models.features import FeatureTokens
from cdt_train.models.transfer_model import TransferModel

Arrays = dict[str, NDArray[Any]]
BATCH = 16


@dataclass(frozen=True)
class Tolerance:
    """What an export may differ by.

    Attributes:
        relative: largest difference of an output, as a share of its range.
        cosine: smallest cosine between an output and its reference.
        probability: largest change of a class probability.
        tie: two best classes closer than this in probability are a tie.
    """

    relative: float
    cosine: float
    probability: float
    tie: float


TOLERANCES = {
    "fp32": Tolerance(FULL, 0.999999, 1e-3, 2e-3),
    "fp16": Tolerance(HALF, 0.9999, 2e-2, 4e-2),
    "int8": Tolerance(0.2, 0.99, 5e-2, 4e-2),
}
"""By the precision that a graph computes in, and decisions by that of the bundle. Probabilities may
move further in int8 than in half precision, but no more tiles count as ties."""

NOT_WRITTEN = "no bundle was written"


@dataclass(frozen=True)
class GraphParity:
    """How one graph compares with its module.

    Attributes:
        graph: its name.
        precision: that it computes in.
        max_difference: largest absolute difference over all outputs.
        relative: largest difference as a share of the output's range.
        cosine: smallest cosine over all outputs and inputs.
    """

    graph: str
    precision: str
    max_difference: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class DecisionParity:
    """How the decisions compare over held-out tiles, in one CT context.

    Attributes:
        context: "without CT" or "with CT".
        tiles: held-out tiles compared.
        label_flips: tiles whose class differs, ties left out.
        ties: tiles whose two best classes PyTorch itself holds apart by less than the tolerance
            calls a tie: rounding decides them either way.
        max_probability_change: largest change of any class's probability.
        accuracy: of the exported chain on these tiles.
    """

    context: str
    tiles: int
    label_flips: int
    ties: int
    max_probability_change: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Inputs for the comparison, all preprocessed.

    Attributes:
        support: `(S, M, H, W)` tiles of the prototypes.
        support_labels: `(S,)`.
        tiles: `(n, M, H, W)` held-out tiles.
        labels: `(n,)`.
        ct: `(1, W, D, S, S)`, one volume.
        support_ct: `(P, W, D, S, S)`, of the support tiles' patients, where they have one.
        support_ct_of: `(S,)`, which of them is each support tile's; -1 for none.
        support_features: `(S, F)`, what foundation encoders say of the support tiles, side by side;
            None where there are none, as for those of the tiles, the CT and the support's CT.
    """

    support: Tensor
    support_labels: NDArray[np.int64]
    tiles: Tensor
    labels: NDArray[np.int64]
    ct: Tensor
    support_ct: Tensor
    support_ct_of: NDArray[np.int64]
    support_features: Tensor | None = None
    tile_features: Tensor | None = None
    ct_features: Tensor | None = None
    support_ct_features: Tensor | None = None

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Give the held-out tiles in batches, as the graphs take them."""
        for start in range(0, len(self.tiles), BATCH):
            part = slice(start, start + BATCH)
            yield named("tile", self.tiles[part], "features", _part(self.tile_features, part))


def named(name: str, images: Tensor, told: str, features: Tensor | None) -> dict[str, Tensor]:
    """Name images and, where there are any, the features that go with them."""
    return {name: images} if features is None else {name: images, told: features}


def _part(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]


def compare_graph(
    graph: Graph, session: Session, batches: Sequence[Mapping[str, Tensor]], precision: str
) -> GraphParity:
    """Compare one graph with its module on given inputs."""
    difference = relative = 0.0
    cosine = 1.0
    for batch in batches:
        reference = run_module(graph, batch)
        found = session.run({name: value.numpy() for name, value in batch.items()})
        for name, expected in reference.items():
            if found[name].shape != expected.shape or not np.isfinite(found[name]).all():
                raise ParityError(
                    f"{graph.name}: {name} is not finite, or of shape {found[name].shape} where "
                    f"PyTorch gives {expected.shape}: {NOT_WRITTEN}"
                )
            difference = max(difference, float(np.abs(found[name] - expected).max()))
            relative = max(relative, relative_gap(name, found[name], expected))
            cosine = min(cosine, _cosine(found[name], expected))
    return GraphParity(graph.name, precision, difference, relative, cosine)


@torch.no_grad()
def run_module(graph: Graph, inputs: Mapping[str, Tensor]) -> Arrays:
    """Run a graph's PyTorch module; outputs by name."""
    outputs = graph.module(*(inputs[name] for name in graph.inputs))
    listed = (outputs,) if isinstance(outputs, Tensor) else outputs
    return {name: value.numpy() for name, value in zip(graph.outputs, listed, strict=True)}


def compare_graphs(
    graphs: Sequence[Graph],
    sessions: Mapping[str, Session],
    held_out: HeldOut,
    precisions: Mapping[str, str],
) -> list[GraphParity]:
    """Compare every graph on held-out tiles and a real volume, and what comes of them."""
    by_name = {graph.name: graph for graph in graphs}
    ct = named("ct", held_out.ct, "ct_features", held_out.ct_features)
    ct_tokens = _outputs(by_name["ct_encoder"], ct)
    batches = []
    for tiles in held_out.batches():
        values = {**ct, **ct_tokens, **tiles}
        for name in ("path_encoder", "bridge"):
            values |= _outputs(by_name[name], values)
        batches.append(values)
    return [
        compare_graph(
            graph,
            sessions[graph.name],
            [
                {key: values.get(key, graph.inputs[key]) for key in graph.inputs}
                for values in batches
            ],
            precisions[graph.name],
        )
        for graph in graphs
    ]


def _outputs(graph: Graph, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a graph's module on the values that are known, and on its example for the rest."""
    inputs = {key: values.get(key, example) for key, example in graph.inputs.items()}
    return {key: torch.from_numpy(array) for key, array in run_module(graph, inputs).items()}


def compare_decisions(
    model: TransferModel,
    sessions: Mapping[str, Session],
    held_out: HeldOut,
    shipped: HeldOut,
    scales: tuple[float, float],
    fit: str,
    tolerance: Tolerance,
) -> list[DecisionParity]:
    """Compare the decisions of the exported chain with PyTorch's, without and with CT.

    Args:
        model: in evaluation mode.
        sessions: the exported graphs by name.
        held_out: support, held-out tiles and a CT.
        shipped: the same as exported foundation encoders see them.
        scales: calibrated factor of the negative squared distance, without CT and with.
        fit: how the support becomes prototypes, a key of `cdt_runtime.prototypes.FITS`.
        tolerance: what counts as a tie.
    """
    with torch.no_grad():
        tokens = _ct_tokens(model, held_out.ct, held_out.ct_features)
        present = tokens.new_ones(1)
    exported = exported_ct_tokens(sessions["ct_encoder"], shipped.ct, shipped.ct_features)[0]
    rows = []
    contexts = zip(("without CT", "with CT"), (0.0, 1.0), scales, strict=True)
    for context, there, scale in contexts:
        expected = _torch_chances(model, held_out, tokens * there, present * there, scale, fit)
        present_array = np.array([there], dtype=np.float32)
        found = exported_chances(sessions, shipped, exported * there, present_array, scale, fit)
        best = found.argmax(axis=1)
        ordered = np.sort(expected, axis=1)
        tied = ordered[:, -1] - ordered[:, -2] < tolerance.tie
        rows.append(
            DecisionParity(
                context,
                len(best),
                int(((best != expected.argmax(axis=1)) & ~tied).sum()),
                int(tied.sum()),
                float(np.abs(found - expected).max()),
                float((best == held_out.labels).mean()),
            )
        )
    return rows


def exported_chances(
    sessions: Mapping[str, Session],
    held_out: HeldOut,
    ct_tokens: NDArray[Any],
    ct_present: NDArray[Any],
    scale: float,
    fit: str,
) -> NDArray[np.float64]:
    """Return class probabilities `(n, K)` of the held-out tiles from the exported graphs alone."""
    context = {"ct_tokens": ct_tokens, "ct_present": ct_present}
    means = _prototypes(_exported_support(sessions, held_out, context), held_out, fit)
    head = {"prototypes": means, "scale": np.array([scale], dtype=np.float32)}
    parts = [
        sessions["tile_classifier"].run({**_arrays(tiles), **context, **head})["logits"]
        for tiles in held_out.batches()
    ]
    return softmax(np.concatenate(parts))


def chances_without_ct(
    sessions: Mapping[str, Session], held_out: HeldOut, scale: float, fit: str
) -> NDArray[np.float64]:
    """Return class probabilities `(n, K)` of the held-out tiles alone."""
    shape = exported_ct_tokens(sessions["ct_encoder"], held_out.ct, held_out.ct_features)[0]
    absent = np.zeros(1, np.float32)
    return exported_chances(sessions, held_out, np.zeros_like(shape), absent, scale, fit)


def exported_support_tokens(sessions: Mapping[str, Session], held_out: HeldOut) -> NDArray[Any]:
    """Encode the support tiles, `(S, N, C)`."""
    inputs = named("tile", held_out.support, "features", held_out.support_features)
    return sessions["path_encoder"].run(_arrays(inputs))["tile_tokens"]


def _exported_support(
    sessions: Mapping[str, Session], held_out: HeldOut, context: Mapping[str, NDArray[Any]]
) -> NDArray[Any]:
    """Embed the support tiles in the context, or with a CT each with its own patient's."""
    tokens = exported_support_tokens(sessions, held_out)
    if not (context["ct_present"].any() and len(held_out.support_ct)):
        return sessions["bridge"].run({"tile_tokens": tokens, **context})["embedding"]
    own = np.concatenate(exported_support_ct(sessions["ct_encoder"], held_out))
    parts = []
    for token, index in zip(tokens, held_out.support_ct_of, strict=True):
        there = {
            "ct_tokens": own[index : index + 1] if index >= 0 else np.zeros_like(own[:1]),
            "ct_present": np.array([index >= 0], dtype=np.float32),
        }
        parts.append(sessions["bridge"].run({"tile_tokens": token[None], **there})["embedding"])
    return np.concatenate(parts)


def exported_support_ct(ct_encoder: Session, held_out: HeldOut) -> list[NDArray[Any]]:
    """Encode the CT of the support tiles' patients one by one."""
    return exported_ct_tokens(ct_encoder, held_out.support_ct, held_out.support_ct_features)


def exported_ct_tokens(
    ct_encoder: Session, volumes: Tensor, features: Tensor | None
) -> list[NDArray[Any]]:
    """Encode volumes `(P, W, D, S, S)` one by one, with their features `(P, F)` if there are."""
    found = []
    for index in range(len(volumes)):
        one = slice(index, index + 1)
        inputs = named("ct", volumes[one], "ct_features", _part(features, one))
        found.append(ct_encoder.run(_arrays(inputs))["ct_tokens"])
    return found


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: value.numpy() for name, value in tensors.items()}


def require_parity(
    graphs: Sequence[GraphParity], decisions: Sequence[DecisionParity], tolerance: Tolerance
) -> None:
    """Refuse an export that does not decide as before.

    Args:
        graphs: each is held to what its own precision allows.
        decisions: of the whole chain.
        tolerance: that decisions are held to.

    Raises:
        ParityError: naming the first figure out of bounds.
    """
    for row in graphs:
        own = TOLERANCES[row.precision]
        if not (row.relative <= own.relative and row.cosine >= own.cosine):
            raise ParityError(
                f"{row.graph}: differs from PyTorch by {row.relative:.2g} of its range, cosine "
                f"{row.cosine:.6f}; allowed {own.relative:g} and {own.cosine}: {NOT_WRITTEN}"
            )
    for decision in decisions:
        if decision.label_flips or not decision.max_probability_change <= tolerance.probability:
            raise ParityError(
                f"{decision.context}: {decision.label_flips} of {decision.tiles} held-out tiles "
                f"change class, probabilities by up to {decision.max_probability_change:.2g}; "
                f"allowed 0 and {tolerance.probability:g}: {NOT_WRITTEN}"
            )


def as_record(
    graphs: Sequence[GraphParity], decisions: Sequence[DecisionParity], tolerance: Tolerance
) -> dict[str, Any]:
    """Return the parity figures as the manifest keeps them."""
    return {
        "graphs": [asdict(row) for row in graphs],
        "decisions": [asdict(row) for row in decisions],
        "tolerance": asdict(tolerance),
    }


@torch.no_grad()
def _torch_chances(
    model: TransferModel,
    held_out: HeldOut,
    tokens: Tensor,
    present: Tensor,
    scale: float,
    fit: str,
) -> NDArray[np.float64]:
    def embed(tile: Tensor, features: Tensor | None = None) -> Tensor:
        embedded: Tensor = model.bridge(_tile_tokens(model, tile, features), tokens, present)
        return embedded

    means = _prototypes(_torch_support(model, held_out, tokens, present).numpy(), held_out, fit)
    parts = [
        model.head(embed(**tiles), torch.from_numpy(means), torch.tensor([scale]))[0].numpy()
        for tiles in held_out.batches()
    ]
    return softmax(np.concatenate(parts))


def _torch_support(
    model: TransferModel, held_out: HeldOut, tokens: Tensor, present: Tensor
) -> Tensor:
    """Embed the support tiles as `Contexts.of_tiles` has the evaluation do it."""
    if present.any() and len(held_out.support_ct):
        own = _ct_tokens(model, held_out.support_ct, held_out.support_ct_features)
        index = torch.from_numpy(held_out.support_ct_of)
        present = (index >= 0).to(own.dtype)
        tokens = own[index.clamp_min(0)] * present[:, None, None]
    own_tokens = _tile_tokens(model, held_out.support, held_out.support_features)
    embedded: Tensor = model.bridge(own_tokens, tokens, present)
    return embedded


def _tile_tokens(model: TransferModel, tiles: Tensor, features: Tensor | None) -> Tensor:
    return _with_features(model.path_encoder(tiles), model.tile_features, features)


def _ct_tokens(model: TransferModel, volumes: Tensor, features: Tensor | None) -> Tensor:
    own = torch.cat([model.ct_encoder(one) for one in torch.split(volumes, 1)])
    return _with_features(own, model.ct_features, features)


def _with_features(tokens: Tensor, project: FeatureTokens, features: Tensor | None) -> Tensor:
    return tokens if features is None else torch.cat([tokens, project(features)], dim=1)


def _prototypes(support: NDArray[Any], held_out: HeldOut, fit: str) -> NDArray[np.float32]:
    labels = held_out.support_labels
    return fit_prototypes(support, labels, int(labels.max()) + 1, fit)


def _cosine(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Smallest cosine over the rows of two arrays, each row being all but the first axis."""
    a = found.reshape(len(found), -1).astype(np.float64)
    b = expected.reshape(len(expected), -1).astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(norms, 1e-30)).min())
