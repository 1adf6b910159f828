"""The cross-dimensional bridge: tile tokens look at the patient's CT tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdt_train.models.layers import Centre, softmax, unit_length


class Bridge(nn.Module):
    """Gated residual cross-attention from tile to CT, then the embedding.

    The gate starts at zero and the residual is multiplied by the CT's presence, so that with a
    closed gate or without CT the embedding is exactly, bit for bit, that of the tile alone. A null
    key of value zero lets a tile look away from the CT.

    Args:
        feature_dim: C, width of the tokens and E, width of the embedding.
        num_heads: attention heads; C is a multiple of it.
    """

    def __init__(self, feature_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(feature_dim, feature_dim)
        self.key = nn.Linear(feature_dim, feature_dim)
        self.value = nn.Linear(feature_dim, feature_dim)
        self.output = nn.Linear(feature_dim, feature_dim)
        self.null_key = nn.Parameter(torch.zeros(1, 1, feature_dim))
        self.gate = nn.Parameter(torch.zeros(1))
        self.centre = Centre(feature_dim)

    def forward(self, tile_tokens: Tensor, ct_tokens: Tensor, ct_present: Tensor) -> Tensor:
        """Embed tiles in the context of one CT.

        Args:
            tile_tokens: `(B, N, C)`.
            ct_tokens: `(1, T, C)`, shared by the batch; zeros where there is no CT.
            ct_present: `(1,)`, 1 with a CT and 0 without.

        Returns:
            `(B, E)` float32 unit vectors, E = C.
        """
        return self.combine(tile_tokens, self.residual(tile_tokens, ct_tokens), ct_present)

    def residual(self, tile_tokens: Tensor, ct_tokens: Tensor) -> Tensor:
        """What the tiles draw from the CT, before the gate; `(B, E)` float32."""
        drawn: Tensor = self.output(self.attend(tile_tokens, ct_tokens).mean(dim=1))
        return drawn.float()

    def combine(self, tile_tokens: Tensor, residual: Tensor, ct_present: Tensor) -> Tensor:
        """Add the gated residual to the pooled tile tokens; unit vectors `(B, E)`."""
        pooled = tile_tokens.float().mean(dim=1)
        gate = torch.tanh(self.gate.float()) * ct_present.float()
        return unit_length(self.centre(pooled + gate * residual))

    def attend(self, tile_tokens: Tensor, ct_tokens: Tensor) -> Tensor:
        """Let each tile token gather from the CT.

        Explicit matrix products and softmax, which every inference engine runs.

        Returns:
            `(B, N, C)`.
        """
        query = self._heads(self.query(tile_tokens))  # (B, H, N, C/H)
        keys = torch.cat([self.key(ct_tokens), self.null_key.to(ct_tokens.dtype)], dim=1)
        values = self.value(ct_tokens)
        values = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)
        scale = query.shape[-1] ** -0.5
        scores = torch.matmul(query * scale, self._heads(keys).transpose(-1, -2))
        gathered = torch.matmul(softmax(scores), self._heads(values))
        return gathered.transpose(1, 2).flatten(2)

    def projected(self, tile_tokens: Tensor, ct_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Pool both sides in the space where they meet; domain alignment works on these.

        Both sides are cut off from their encoders: alignment must neither blur what classifies
        nor undo what the CT encoder learnt in phase 1.

        Returns:
            `(B, C)` of the tiles and `(1, C)` of the CT.
        """
        tiles = self.query(tile_tokens.detach()).mean(dim=1)
        return tiles, self.key(ct_tokens.detach()).mean(dim=1)

    def _heads(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        return tokens.reshape(batch, count, self.num_heads, width // self.num_heads).transpose(1, 2)
