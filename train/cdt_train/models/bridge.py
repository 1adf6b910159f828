"""The cross-dimensional bridge: tile tokens look at the patient's CT tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdt_train.models.layers import Centre, Offset, softmax, unit_length

HIDDEN = -1e4
"""Added to the score of a token that is not there; float16 holds it, and its softmax is 0."""


class Bridge(nn.Module):
    """Gated residual cross-attention from a tile to its context, then the embedding.

    The context is the patient's CT and, where there are any, tokens of foundation encoders: those
    that looked at the tile follow its tokens, those that looked at the CT follow the CT's, and a
    token of zeros is one that is not there. Each scale of the tile and of the CT, and the
    foundation tokens, have a learnt embedding, so that attention can tell them apart.
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
        tile_extras: tokens of foundation encoders behind the tile's own.
        ct_extras: the same behind the CT's.

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
        tile_extras: int = 0,
        ct_extras: int = 0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(feature_dim, feature_dim)
        self.key = nn.Linear(feature_dim, feature_dim)
        self.value = nn.Linear(feature_dim, feature_dim)
        self.output = nn.Linear(feature_dim, feature_dim)
        self.tile_scale = nn.Parameter(0.02 * torch.randn(tile_scales, feature_dim))
        self.ct_scale = nn.Parameter(0.02 * torch.randn(ct_scales, feature_dim))
        self.tile_extras, self.ct_extras = tile_extras, ct_extras
        self.extra_type = nn.Parameter(0.02 * torch.randn(feature_dim))
        self.null_key = nn.Parameter(torch.zeros(1, 1, feature_dim))
        self.bank = nn.Parameter(torch.randn(1, bank_size, feature_dim))
        self.gate = nn.Parameter(torch.zeros(1))
        self.centre = Centre(feature_dim, n_classes - 1)
        self.offset = Offset(feature_dim)

    def forward(self, tile_tokens: Tensor, ct_tokens: Tensor, ct_present: Tensor) -> Tensor:
        """Embed tiles in their context.

        Args:
            tile_tokens: `(B, N, C)`, then `tile_extras`.
            ct_tokens: `(1, T, C)`, shared by the batch, or `(B, T, C)`, then `ct_extras`; zeros
                where there is none.
            ct_present: `(1,)` or `(B,)`, 1 with a CT and 0 without.

        Returns:
            `(B, E)` float32 unit vectors, E = C.
        """
        residual = self.residual(tile_tokens, ct_tokens, ct_present)
        return self.combine(tile_tokens, residual, ct_present)

    def residual(self, tile_tokens: Tensor, ct_tokens: Tensor, ct_present: Tensor) -> Tensor:
        """What the tiles draw from their context, before the gate; `(B, E)` float32."""
        return self._drawn(
            self.of_tile(tile_tokens), *self._memory(tile_tokens, ct_tokens, ct_present)
        )

    def combine(self, tile_tokens: Tensor, residual: Tensor, ct_present: Tensor) -> Tensor:
        """Add the gated residual to the pooled tile tokens; unit vectors `(B, E)`."""
        pooled = self.of_tile(tile_tokens).float().mean(dim=1)
        present = ct_present.float().reshape(-1, 1)
        if self.tile_extras:
            present = torch.maximum(present, _there(self._behind_tile(tile_tokens)).amax(1, True))
        gate = torch.tanh(self.gate.float()) * present
        return unit_length(self.centre(pooled + gate * self.offset(residual)))

    def of_tile(self, tile_tokens: Tensor) -> Tensor:
        """Return the tile's own tokens, without those of foundation encoders; `(B, N, C)`."""
        return tile_tokens[:, : tile_tokens.shape[1] - self.tile_extras]

    def of_ct(self, ct_tokens: Tensor) -> Tensor:
        """Return the CT's own tokens, without those of foundation encoders; `(1 | B, T, C)`."""
        return ct_tokens[:, : ct_tokens.shape[1] - self.ct_extras]

    def bank_context(self) -> Tensor:
        """Return the bank as CT tokens, with no foundation encoder behind it."""
        if not self.ct_extras:
            return self.bank
        none = self.bank.new_zeros(1, self.ct_extras, self.bank.shape[2])
        return torch.cat([self.bank, none], dim=1)

    def attention(self, tile_tokens: Tensor, ct_tokens: Tensor) -> Tensor:
        """Read out where each tile token looks, among the tokens of the CT alone.

        Returns:
            `(B, H, N, T + 1)` weights that sum to 1; the last is the look away.
        """
        memory = self._scaled(self.of_ct(ct_tokens), self.ct_scale)
        return self._weights(self.of_tile(tile_tokens), memory, None)

    def projected(self, tile_tokens: Tensor, ct_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Bring both sides into the space where they meet; domain alignment works on these.

        Both sides are cut off from their encoders: alignment must neither blur what classifies
        nor undo what the CT encoder learnt in phase 1.

        Returns:
            `(B, N, C)` of the tiles and `(1, T, C)` of the CT.
        """
        tiles, ct = self.of_tile(tile_tokens), self.of_ct(ct_tokens)
        return self.query(tiles.detach()), self.key(ct.detach())

    @torch.no_grad()
    def settle(self, tile_tokens: Tensor, ct_tokens: Tensor) -> None:
        """Take the mean of the residual from training tiles `(n, N, C)` with CT `(A, T, C)`."""
        there = ct_tokens.new_ones(1)
        drawn = [
            self.residual(tile_tokens, ct, there).mean(dim=0) for ct in torch.split(ct_tokens, 1)
        ]
        self.offset.mean.copy_(torch.stack(drawn).mean(dim=0))

    def _memory(
        self, tile_tokens: Tensor, ct_tokens: Tensor, ct_present: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the tile looks at, `(1 | B, X, C)`, and what is added to its scores."""
        ct = self.of_ct(ct_tokens)
        parts = [self._scaled(ct, self.ct_scale)]
        if not (self.tile_extras or self.ct_extras):
            return parts[0], None
        shown = [ct_present.to(ct.dtype).reshape(-1, 1).expand(-1, ct.shape[1])]
        for extra in (ct_tokens[:, ct.shape[1] :], self._behind_tile(tile_tokens)):
            parts.append(extra + self.extra_type)
            shown.append(_there(extra).to(ct.dtype))
        batch = tile_tokens.shape[0]  # len() would make it a constant of the graph
        memory = torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)
        seen = torch.cat([mask.expand(batch, -1) for mask in shown], dim=1)
        return memory, (1.0 - seen) * HIDDEN

    def _behind_tile(self, tile_tokens: Tensor) -> Tensor:
        return tile_tokens[:, tile_tokens.shape[1] - self.tile_extras :]

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
        null = self.null_key.to(memory.dtype).expand(memory.shape[0], -1, -1)
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


def _there(tokens: Tensor) -> Tensor:
    """Tell which tokens are there, `(B, X)`: 1, or 0 for one of zeros."""
    return (tokens.abs().amax(dim=-1) > 0).float()
