"""The rows of every table: one model in each CT context, and what it has to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdt_runtime.prototypes import softmax
from cdt_train.baselines import colour_statistics, noise_ct, permuted_labels
from cdt_train.calibration import calibrate
from cdt_train.contexts import Contexts
from cdt_train.data.arrays import CtArrays, TileArrays
from cdt_train.embed import Floats, embed_tokens, tile_tokens
from cdt_train.episodes import Episode
from cdt_train.intervals import bootstrap_groups, paired_difference
from cdt_train.metrics import expected_calibration_error, metrics
from cdt_train.models.transfer_model import TransferModel
from cdt_train.scores import EpisodeScores, score_in_contexts

ROWS = {
    "with_ct": "with CT",
    "without_ct": "without CT",
    "without_encoders": "encoders masked",
    "wrong_ct": "wrong patient's CT",
    "noise_ct": "noise for CT",
    "context_bank": "context bank for CT",
    "protonet": "ProtoNet, no bridge",
    "frozen_features": "frozen features",
    "foundation_features": "foundation features",
    "untrained_encoder": "untrained encoder",
    "colour_statistics": "colour statistics",
    "permuted_labels": "permuted labels",
}
CALIBRATED = {
    "with_ct": "with_ct",
    "without_ct": "without_ct",
    "without_encoders": "without_ct",
    "wrong_ct": "with_ct",
    "noise_ct": "with_ct",
    "context_bank": "with_ct",
    "permuted_labels": "without_ct",
}
"""Rows of the model, and whose temperatures they use: a CT that says something makes answers
surer than they are without. Other rows make no probabilities that are claimed."""

PROBABILISTIC = ("ece", "brier", "nll")

DIFFERENCES = {
    "with_ct": ("without_ct", "wrong_ct", "noise_ct"),
    "context_bank": ("without_ct",),
    "without_ct": (
        "without_encoders",
        "protonet",
        "frozen_features",
        "foundation_features",
        "colour_statistics",
    ),
}

EVAL_CONTEXTS = 4
"""Volumes that unpaired evaluation draws from; episodes take turns."""

Embedded = Mapping[str, Sequence[Floats]]
Scores = dict[str, dict[int, EpisodeScores]]


@dataclass(frozen=True, eq=False)
class Surroundings:
    """The CT that tiles of one side are evaluated with.

    Attributes:
        shared: contexts for unpaired tiles, in which episodes take turns.
        contexts: where CT and tiles are paired, every patient's; else None.
        noise: the context that says nothing.
    """

    shared: Sequence[tuple[Tensor, Tensor]]
    contexts: Contexts | None
    noise: tuple[Tensor, Tensor] | None


def surroundings(
    model: TransferModel,
    seen: CtArrays,
    everyone: CtArrays,
    patients: Sequence[str],
    *,
    paired: bool,
    seed: Sequence[int],
    device: torch.device,
) -> Surroundings:
    """Encode what evaluation needs of the CT.

    Args:
        model: its CT encoder.
        seen: volumes that training saw; unpaired tiles meet these.
        everyone: all volumes; paired tiles meet their own patient's.
        patients: names by group number.
        paired: which of the two it is.
        seed: of the choice of volumes and of the noise.
        device: to encode on.
    """
    if not len(seen):
        return Surroundings((), None, None)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(seen))[:EVAL_CONTEXTS]
    some = Contexts.encode(model, seen.take(chosen.tolist()), (), device)
    blank = torch.from_numpy(noise_ct(seen.volumes[:1].numpy(), int(rng.integers(2**31))))
    with torch.no_grad():
        noise = model.context(blank.to(device))
        shared = [some.one(index) for index in range(len(some))]
    own = Contexts.encode(model, everyone, patients, device) if paired else None
    return Surroundings(shared, own, noise)


@torch.no_grad()
def embed_rows(
    model: TransferModel, tiles: TileArrays, around: Surroundings, seed: int, device: torch.device
) -> dict[str, list[Floats]]:
    """Embed tiles in every context of the model's rows.

    Returns:
        For each row the embeddings `(n, E)` of each context that its episodes take turns in.
    """
    tokens = tile_tokens(model, tiles.tiles, device, tiles.features)

    def embedded(context: tuple[Tensor, Tensor]) -> Floats:
        return embed_tokens(model, tokens, context)

    bank = model.bridge.bank_context().detach()
    found = {"without_ct": [embedded(model.context(None))]}
    if tiles.features:
        alone = tile_tokens(model, tiles.tiles, device)
        found["without_encoders"] = [embed_tokens(model, alone, model.context(None))]
    if around.contexts is not None:
        rng = np.random.default_rng(seed)
        found["with_ct"] = [embedded(around.contexts.of_tiles(tiles.groups))]
        found["wrong_ct"] = [embedded(around.contexts.of_others(tiles.groups, rng))]
    elif around.shared:
        in_turn = [embedded(context) for context in around.shared]
        found["with_ct"] = in_turn
        if len(in_turn) > 1:
            found["wrong_ct"] = [*in_turn[1:], in_turn[0]]
    if around.noise is not None:
        found["noise_ct"] = [embedded(around.noise)]
        found["context_bank"] = [embedded((bank, bank.new_ones(1)))]
    return found


def frozen_rows(
    models: Mapping[str, TransferModel], tiles: TileArrays, train: TileArrays, device: torch.device
) -> dict[str, list[Floats]]:
    """Embed tiles by pooled tokens of other models, centred by their mean over training tiles."""
    found = {"colour_statistics": [colour_statistics(tiles.tiles, train.tiles)]}
    for name, model in models.items():
        model.to(device)
        known = _pooled(model, train, device).mean(dim=0)
        pooled = _pooled(model, tiles, device) - known
        found[name] = [torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()]
    if tiles.features:
        found["foundation_features"] = [_foundation(tiles, train)]
    return found


def _pooled(model: TransferModel, tiles: TileArrays, device: torch.device) -> Tensor:
    return model.bridge.of_tile(tile_tokens(model, tiles.tiles, device)).mean(dim=1)


def _foundation(tiles: TileArrays, train: TileArrays) -> Floats:
    """Join what foundation encoders say, each standardised over training tiles, as unit vectors."""
    parts = []
    for key, values in tiles.features.items():
        known, own = train.features[key].flatten(1), values.flatten(1)
        spread = known.std(dim=0).clamp_min(1e-6)
        parts.append(torch.nn.functional.normalize((own - known.mean(dim=0)) / spread, dim=1))
    joined: Floats = torch.nn.functional.normalize(torch.cat(parts, dim=1), dim=1).numpy()
    return joined


def score_rows(
    embedded: Embedded, episodes: Mapping[int, list[Episode]], scale: float, fit: str, seed: int
) -> Scores:
    """Score every row on the same episodes, for each K."""

    def scored(contexts: Sequence[Floats], change: Callable[..., Any] | None = None) -> Any:
        return {
            k: score_in_contexts(contexts, change(drawn, seed) if change else drawn, scale, fit)
            for k, drawn in episodes.items()
        }

    rows = {name: scored(contexts) for name, contexts in embedded.items()}
    rows["permuted_labels"] = scored(embedded["without_ct"], permuted_labels)
    return {name: rows[name] for name in ROWS if name in rows}


def temperatures(scores: Scores) -> dict[str, dict[int, float]]:
    """Fit one temperature for each K, with a CT and without."""
    return {row: calibrate(scores[row]) for row in ("with_ct", "without_ct") if row in scores}


def measure(
    scores: Scores, heat: Mapping[str, Mapping[int, float]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute every metric of every row and K (as text, for JSON).

    Args:
        scores: of each row and K.
        heat: as `temperatures` gives it for the validation tiles.
    """
    return {
        row: {
            str(k): _measured(found, heat.get(CALIBRATED.get(row, "")), k)
            for k, found in by_k.items()
        }
        for row, by_k in scores.items()
    }


def differences(
    scores: Scores, tiles: TileArrays, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Compare rows on the same episodes: `{"with_ct - without_ct": {K: paired_difference}}`."""
    return {
        f"{first} - {second}": {
            str(k): paired_difference(found, scores[second][k], tiles.groups, seed=seed)
            for k, found in scores[first].items()
        }
        for first, others in DIFFERENCES.items()
        for second in others
        if first in scores and second in scores
    }


def over_groups(scores: Scores, tiles: TileArrays, seed: int) -> dict[str, Any]:
    """Bootstrap accuracy over groups: how far other patients would move it."""
    return {
        row: {
            str(k): bootstrap_groups(found.correct, tiles.groups[found.queries], seed=seed)
            for k, found in scores[row].items()
        }
        for row in ("with_ct", "without_ct", "protonet")
        if row in scores
    }


def _measured(scores: EpisodeScores, heat: Mapping[int, float] | None, k: int) -> dict[str, Any]:
    if heat is not None:
        temperature = heat[k]
        raw = expected_calibration_error(softmax(scores.logits), scores.truth)
        return {**metrics(scores, temperature), "ece_before": raw}
    found = metrics(scores)
    return {name: value for name, value in found.items() if name not in PROBABILISTIC}
