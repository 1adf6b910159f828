"""Phase 1: the CT encoder learns, without labels, what lies where in the body."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cdt_train.augment import jitter_ct, paired_views, stretch_cubes
from cdt_train.cubes import SIDE, draw_pairs, windowed
from cdt_train.encoders.conv3d import CtEncoder
from cdt_train.seeding import step_seed

POSITION_BETA = 0.3
"""Where the position loss turns from square to linear."""


VIEWS_EVERY = 4
"""Of so many steps one is on views of whole volumes, which cost more and teach less."""


class CtPhase:
    """Contrast and relative position, on small cubes and now and then on views of whole volumes.

    Two views of one place must find each other among all others, and the encoder must tell how far
    apart any two views of one patient lie.

    Args:
        encoder: trained in place.
        volumes: `(n, W, D, S, S)`.
        fine: the same series as `(D, H, W)` int16 HU at 2 mm; without any, whole volumes alone.
        windows: of the HU, for `fine`.
        batch_size: places a step, two views of each; spread evenly over the volumes.
        temperature: of the contrast.
        contrast_weight: of the contrastive loss.
        position_weight: of the relative-position loss.
        seed: of every random number.
        device: where the model lives.

    Source: Chen et al. 2020 (SimCLR), on volumes; relative position after Doersch et al. 2015, as
    a regression.
    """

    name = "phase 1 (CT)"

    def __init__(
        self,
        encoder: CtEncoder,
        volumes: Tensor,
        fine: Sequence[Tensor],
        *,
        windows: Sequence[tuple[float, float]],
        batch_size: int,
        temperature: float,
        contrast_weight: float,
        position_weight: float,
        seed: int,
        device: torch.device,
    ) -> None:
        width = encoder.feature_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = {
                f"{task}_{kind}": _head(width, outputs)
                for kind in ("cubes", "views")
                for task, outputs in (("contrast", 64), ("position", 3))
            }
        self.model: nn.Module = nn.ModuleDict({"encoder": encoder, **heads}).to(device)
        encoder.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self._encoder, self._heads = encoder, heads
        self._volumes, self._fine, self._windows = volumes, tuple(fine), tuple(windows)
        self._batch_size, self._temperature = batch_size, temperature
        self._contrast_weight, self._position_weight = contrast_weight, position_weight
        self._seed, self._device = seed, device
        self._losses: list[float] = []

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        """Learn from one batch of cubes, or of views of whole volumes; `progress` is not used."""
        generator = torch.Generator().manual_seed(step_seed(self._seed, index))
        kind = "views" if not self._fine or (index + 1) % VIEWS_EVERY == 0 else "cubes"
        draw = self._cubes if kind == "cubes" else self._views
        views, places, owners = draw(generator, np.random.default_rng([self._seed, index]))
        placed = views.to(self._device, memory_format=torch.channels_last_3d)
        pooled = self._encoder(placed).mean(dim=1)
        contrasted, accuracy = contrast(self._heads[f"contrast_{kind}"](pooled), self._temperature)
        guess = self._heads[f"position_{kind}"](pooled)
        position = relative_position(guess, places.to(self._device), owners.to(self._device))
        loss = self._contrast_weight * contrasted + self._position_weight * position
        self._losses.append(loss.item())
        return {
            "loss": loss,
            f"contrast_{kind}": contrasted,
            f"accuracy_{kind}": accuracy,
            f"position_{kind}": position,
        }

    def validate(self) -> dict[str, float]:
        """Score the epoch by its training loss: there are no labels to hold out."""
        score = -sum(self._losses) / len(self._losses)
        self._losses.clear()
        return {"score": score}

    def _cubes(
        self, generator: torch.Generator, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        cubes = draw_pairs(self._fine, self._batch_size, rng)
        pixels = windowed(stretch_cubes(cubes.pixels, SIDE, generator), self._windows)
        return jitter_ct(pixels, generator), cubes.places, cubes.volume

    def _views(
        self, generator: torch.Generator, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        count = len(self._volumes)
        rounds = -(-self._batch_size // count)
        order = np.concatenate([rng.permutation(count) for _ in range(rounds)])
        chosen = torch.from_numpy(order[: self._batch_size])
        views, places = paired_views(self._volumes[chosen], generator)
        return views, places, chosen.repeat(2)


def contrast(projected: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Normalised temperature-scaled cross-entropy over two views.

    Args:
        projected: `(2 n, P)`, row i and row n + i being views of one place.
        temperature: divides the cosines.

    Returns:
        The loss, and the share of views whose nearest other view is their own.

    Source: Chen et al. 2020, eq. 1.
    """
    unit = functional.normalize(projected.float(), dim=-1)
    cosines = unit @ unit.T / temperature
    cosines = cosines.masked_fill(
        torch.eye(len(unit), dtype=torch.bool, device=unit.device), -torch.inf
    )
    count = len(unit) // 2
    partner = (torch.arange(2 * count, device=unit.device) + count) % (2 * count)
    loss = functional.cross_entropy(cosines, partner)
    return loss, (cosines.argmax(dim=1) == partner).float().mean()


def relative_position(guess: Tensor, places: Tensor, owners: Tensor) -> Tensor:
    """How far the guessed displacements of all pairs of one volume are from the true ones.

    Args:
        guess: `(B, 3)`, a place up to a constant.
        places: `(B, 3)`, the true ones.
        owners: `(B,)`, the volume of each.

    Returns:
        The mean smooth absolute error.
    """
    same = owners[:, None] == owners[None]
    guessed = (guess[:, None] - guess[None]).float()[same]
    return functional.smooth_l1_loss(
        guessed, (places[:, None] - places[None])[same], beta=POSITION_BETA
    )


def _head(width: int, outputs: int) -> nn.Sequential:
    # Without the normalisation the common part of all volumes wins and the views collapse.
    return nn.Sequential(
        nn.BatchNorm1d(width), nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, outputs)
    )
