"""Phase 1: contrastive pretraining of the CT encoder, without labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdt_train.augment import paired_views
from cdt_train.encoders.conv3d import CtEncoder
from cdt_train.seeding import step_seed


class ContrastivePhase:
    """Two views of a sub-volume must find each other among those of all others.

    Args:
        encoder: trained in place.
        volumes: `(n, W, D, S, S)`.
        batch_size: sub-volumes a step, spread evenly over the volumes.
        temperature: of the contrast.
        seed: of every random number.
        device: where the model lives.

    Source: Chen et al. 2020 (SimCLR), on volumes.
    """

    name = "phase 1 (CT)"

    def __init__(
        self,
        encoder: CtEncoder,
        volumes: Tensor,
        *,
        batch_size: int,
        temperature: float,
        seed: int,
        device: torch.device,
    ) -> None:
        width = encoder.project.out_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # Without the normalisation the common part of all volumes wins and the views collapse.
            projector = nn.Sequential(
                nn.BatchNorm1d(width), nn.Linear(width, 128), nn.BatchNorm1d(128, affine=False)
            )
        self.model: nn.Module = nn.ModuleDict({"encoder": encoder, "projector": projector})
        self.model.to(device)
        self._encoder, self._projector = encoder, projector
        self._volumes, self._device = volumes, device
        self._batch_size = batch_size
        self._temperature, self._seed = temperature, seed
        self._generator = torch.Generator()
        self._losses: list[float] = []

    def step(self, index: int, progress: float) -> dict[str, Tensor]:
        """Contrast one batch; `progress` is not used."""
        self._generator.manual_seed(step_seed(self._seed, index))
        count = len(self._volumes)
        rounds = -(-self._batch_size // count)
        order = [torch.randperm(count, generator=self._generator) for _ in range(rounds)]
        chosen = torch.cat(order)[: self._batch_size]
        views = paired_views(self._volumes[chosen], self._generator).to(self._device)
        projected = self._projector(self._encoder(views).mean(dim=1))
        loss, accuracy = contrast(projected, self._temperature)
        self._losses.append(loss.item())
        return {"loss": loss, "accuracy": accuracy}

    def validate(self) -> dict[str, float]:
        """Score the epoch by its training loss: there are no labels to hold out."""
        score = -sum(self._losses) / len(self._losses)
        self._losses.clear()
        return {"score": score}


def contrast(projected: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Normalised temperature-scaled cross-entropy over two views.

    Args:
        projected: `(2 n, P)`, row i and row n + i being views of one volume.
        temperature: divides the cosines.

    Returns:
        The loss, and the share of views whose nearest other view is their own.

    Source: Chen et al. 2020, eq. 1.
    """
    unit = functional.normalize(projected.float(), dim=-1)
    cosines = unit @ unit.T / temperature
    cosines.fill_diagonal_(-torch.inf)
    count = len(unit) // 2
    partner = (torch.arange(2 * count, device=unit.device) + count) % (2 * count)
    loss = functional.cross_entropy(cosines, partner)
    return loss, (cosines.argmax(dim=1) == partner).float().mean()
