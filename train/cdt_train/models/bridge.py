"""The cross-dimensional bridge: tile tokens look at the patient's CT tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdt_train.models.layers import Centre, Offset, softmax, unit_length

HIDDEN = -1e4
"""Added to the score of a token that is not there; float16 holds it, and its softmax is 0."""


class Bridge(nn.Module):
    """Gated residual cross-attention from a tile to its context, then the embedding.

    The context is the patient's CT and, where there are any, tokens of foundation encoders. Each
    scale of the tile and of the CT has a learnt embedding, so that attention can tell them apart.
    The gate starts at zero and the residual is multiplied by the context's presence, so that with
    a closed gate or without context the embedding is exactly, bit for bit, that of the tile alone.
    A null key of value zero lets a tile look away. What all tiles draw alike is taken off the
    residual: it would push every embedding the same way and tell nothing of any.

    Args:
        feature_dim: C, width of the tokens and E, width of the embedding.
        num_heads: attention heads; C is a multiple of it.
        n_classes: classes of training, whose differences the embedding favours.
        bank_size: tokens of the context bank, a multiple of `ct_scales`.
        tile_scales: scales among the tile tokens, as many tokens of each.
        ct_scales: scales among the CT tokens, as many tokens of each.

    Attributes:
        bank: `(1, bank_size, C)`, a learnt context that may stand in for a missing CT.
    """

    def __init__(
        self,
        feature_dim: int,
        num_heads: int,
        n_classes: int,
        bank_size: int = 16,
        tile_scales: int = 2,
        ct_scales: int = 2,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(feature_dim, feature_dim)
        self.key = nn.Linear(feature_dim, feature_dim)
        self.value = nn.Linear(feature_dim, feature_dim)
        self.output = nn.Linear(feature_dim, feature_dim)
        self.tile_scale = nn.Parameter(0.02 * torch.randn(tile_scales, feature_dim))
        self.ct_scale = nn.Parameter(0.02 * torch.randn(ct_scales, feature_dim))
        self.extra_type = nn.Parameter(0.02 * torch.randn(feature_dim))
        self.null_key = nn.Parameter(torch.zeros(1, 1, feature_dim))
        self.bank = nn.Parameter(torch.randn(1, bank_size, feature_dim))
        self.gate = nn.Parameter(torch.zeros(1))
        self.centre = Centre(feature_dim, n_classes - 1)
        self.offset = Offset(feature_dim)

    def forward(
        self,
        tile_tokens: Tensor,
        ct_tokens: Tensor,
        ct_present: Tensor,
        extra_tokens: Tensor | None = None,
        extra_present: Tensor | None = None,
    ) -> Tensor:
        """Embed tiles in their context.

        Args:
            tile_tokens: `(B, N, C)`.
            ct_tokens: `(1, T, C)`, shared by the batch, or `(B, T, C)`; zeros where there is none.
            ct_present: `(1,)` or `(B,)`, 1 with a CT and 0 without.
            extra_tokens: `(1, X, C)` or `(B, X, C)` tokens of foundation encoders, or None.
            extra_present: which of them are there, `(1, X)` or `(B, X)`, 1 or 0; None for all.

        Returns:
            `(B, E)` float32 unit vectors, E = C.
        """
        if extra_tokens is None:
            return self.combine(tile_tokens, self.residual(tile_tokens, ct_tokens), ct_present)
        there = torch.ones_like(extra_tokens[..., 0]) if extra_present is None else extra_present
        residual = self._residual_with(tile_tokens, ct_tokens, ct_present, extra_tokens, there)
        return self.combine(tile_tokens, residual, torch.maximum(ct_present, there.amax(dim=-1)))

    def residual(self, tile_tokens: Tensor, ct_tokens: Tensor) -> Tensor:
        """What the tiles draw from the CT, before the gate; `(B, E)` float32."""
        return self._drawn(tile_tokens, self._scaled(ct_tokens, self.ct_scale), None)

    def combine(self, tile_tokens: Tensor, residual: Tensor, present: Tensor) -> Tensor:
        """Add the gated residual to the pooled tile tokens; unit vectors `(B, E)`."""
        pooled = tile_tokens.float().mean(dim=1)
        gate = torch.tanh(self.gate.float()) * present.float().reshape(-1, 1)
        return unit_length(self.centre(pooled + gate * self.offset(residual)))

    def attention(self, tile_tokens: Tensor, ct_tokens: Tensor) -> Tensor:
        """Read out where each tile token looks.

        Returns:
            `(B, H, N, T + 1)` weights that sum to 1; the last is the look away.
        """
        return self._weights(tile_tokens, self._scaled(ct_tokens, self.ct_scale), None)

    def projected(self, tile_tokens: Tensor, ct_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Bring both sides into the space where they meet; domain alignment works on these.

        Both sides are cut off from their encoders: alignment must neither blur what classifies
        nor undo what the CT encoder learnt in phase 1.

        Returns:
            `(B, N, C)` of the tiles and `(1, T, C)` of the CT.
        """
        return self.query(tile_tokens.detach()), self.key(ct_tokens.detach())

    @torch.no_grad()
    def settle(self, tile_tokens: Tensor, ct_tokens: Tensor) -> None:
        """Take the mean of the residual from training tiles `(n, N, C)` with CT `(A, T, C)`."""
        drawn = [self.residual(tile_tokens, ct).mean(dim=0) for ct in torch.split(ct_tokens, 1)]
        self.offset.mean.copy_(torch.stack(drawn).mean(dim=0))

    def _residual_with(
        self, tiles: Tensor, ct: Tensor, ct_present: Tensor, extra: Tensor, there: Tensor
    ) -> Tensor:
        memory, seen = self._scaled(ct, self.ct_scale), ct_present.reshape(-1, 1)
        batch = max(len(ct), len(extra), len(ct_present), len(there))
        parts = [memory, extra + self.extra_type]
        masks = [seen.expand(-1, ct.shape[1]), there]
        keys = torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)
        shown = torch.cat([mask.expand(batch, -1) for mask in masks], dim=1)
        return self._drawn(tiles, keys, (1.0 - shown) * HIDDEN)

    def _drawn(self, tile_tokens: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        values = self.value(memory)
        values = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)
        weights = self._weights(tile_tokens, memory, mask)
        gathered = torch.matmul(weights, self._heads(values)).transpose(1, 2).flatten(2)
        drawn: Tensor = self.output(gathered.mean(dim=1))
        return drawn.float()

    def _weights(self, tile_tokens: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """Explicit matrix products and softmax, which every inference engine runs."""
        query = self._heads(self.query(self._scaled(tile_tokens, self.tile_scale)))
        null = self.null_key.to(memory.dtype).expand(len(memory), -1, -1)
        keys = self._heads(torch.cat([self.key(memory), null], dim=1))
        scores = torch.matmul(query * query.shape[-1] ** -0.5, keys.transpose(-1, -2))
        if mask is not None:
            looked_away = torch.zeros_like(mask[:, :1])
            scores = scores + torch.cat([mask, looked_away], dim=1)[:, None, None]
        return softmax(scores)

    def _scaled(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Add to each token the embedding of its scale; every scale has as many tokens."""
        return tokens + embedding.repeat_interleave(tokens.shape[1] // len(embedding), dim=0)

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        return tokens.reshape(batch, count, self.num_heads, width // self.num_heads).transpose(1, 2)
