"""The CT tokens that tiles meet, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdt_train.data.arrays import CtArrays
from cdt_train.models.transfer_model import TransferModel


class Contexts:
    """Tokens of every volume, computed once: phase 3 leaves the CT encoder as phase 1 made it.

    What foundation encoders say of a volume is brought to tokens anew each time: their projection
    learns in phase 3.

    Args:
        tokens: `(n, T, C)`.
        groups: the group number (patient) of each volume; -1 for a patient without tiles.
        extra: makes the tokens of foundation encoders for some of the volumes, `(m, X, C)`; None
            where there are none.
    """

    def __init__(
        self,
        tokens: Tensor,
        groups: Sequence[int],
        extra: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._tokens, self._extra = tokens, extra
        self._first = {group: index for index, group in reversed(list(enumerate(groups)))}
        self._first.pop(-1, None)

    @classmethod
    @torch.no_grad()
    def encode(
        cls, model: TransferModel, ct: CtArrays, patients: Sequence[str], device: torch.device
    ) -> Contexts:
        """Encode every volume.

        Args:
            model: its CT encoder is put into evaluation mode.
            ct: the volumes.
            patients: names by group number.
            device: where the tokens will live.
        """
        model.ct_encoder.eval()
        project = model.ct_features
        tokens = [
            model.ct_encoder(one.volumes.to(device))
            if project.count
            else model.ct_tokens(one.volumes.to(device), one.features)
            for one in (ct.take([index]) for index in range(len(ct)))
        ]
        number = {name: group for group, name in enumerate(patients)}
        groups = [number.get(patient, -1) for patient in ct.patients]
        if not tokens:
            return cls(torch.zeros(0, 1, model.ct_encoder.feature_dim), groups)
        said = project.flat(ct.features, ct.volumes).to(device) if project.count else None
        extra = None if said is None else lambda chosen: project(said[chosen])
        return cls(torch.cat(tokens), groups, extra)

    def __len__(self) -> int:
        return len(self._tokens)

    def of(self, chosen: Tensor) -> Tensor:
        """Return the tokens of the volumes at these places, `(m, T, C)`."""
        tokens = self._tokens[chosen]
        if self._extra is None:
            return tokens
        return torch.cat([tokens, self._extra(chosen).to(tokens.dtype)], dim=1)

    @property
    def paired(self) -> bool:
        """Whether some patient has both tiles and a CT."""
        return bool(self._first)

    def one(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one volume's tokens `(1, T, C)` and its presence `(1,)`."""
        return self.of(torch.tensor([index], device=self._tokens.device)), self._tokens.new_ones(1)

    def of_tiles(self, groups: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return each tile's own patient's tokens.

        Args:
            groups: `(B,)` group number of each tile.

        Returns:
            `(B, T, C)`, zeros where the patient has no CT, and presence `(B,)`.
        """
        found = [self._first.get(int(group), -1) for group in groups]
        chosen = torch.tensor(found, device=self._tokens.device)
        present = (chosen >= 0).to(self._tokens.dtype)
        return self.of(chosen.clamp_min(0)) * present[:, None, None], present

    def of_others(
        self, groups: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return, for each patient, the tokens of another: the control that must lose any gain.

        Every tile of a patient gets the same wrong CT, as a mix-up in a hospital would give it.

        Args:
            groups: `(B,)` group number of each tile.
            rng: draws the other patients.
        """
        owners = sorted(set(groups.tolist()) & set(self._first))
        swapped = dict(zip(owners, _derangement(owners, rng), strict=True))
        return self.of_tiles(np.array([swapped.get(int(g), int(g)) for g in groups]))


def _derangement(items: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Give each item another one: a shuffled ring, turned by one."""
    ring = [items[i] for i in rng.permutation(len(items))]
    follower = dict(zip(ring, [*ring[1:], *ring[:1]], strict=True))
    return [follower[item] for item in items]
