"""The cross-domain transfer module: token mixers, blended for each image.

The published module (staged fine-tuning with a cross-domain transfer module, JBHI 2023) holds K
maps between the positions of a backbone's tokens and blends them by how much each image resembles
K keys. Four things are repaired here:

- its blending weights are a softmax over some 300 cosines without a temperature: cosines lie within
  -1 to 1, so the weights stay all but uniform and the module is one fixed mixer for every image.
  Here the temperature is learnt and starts low, and there are fewer maps;
- its maps are free N by N matrices from random values, so that at the start it scrambles what the
  backbone knows. Here each is the identity plus a product of low rank that starts at zero;
- it replaces the tokens. Here a residual goes around it;
- it blends by repeating all maps for each image, hundreds of megabytes. Here it is one matrix
  product of the weights with the flattened maps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdt_runtime.errors import TrainingError
from cdt_train.models.layers import softmax


class TransferMaps(nn.Module):
    """Blend K maps between token positions by the image's resemblance to K learnt keys.

    Args:
        token_count: N, tokens an image.
        width: C, of a token.
        maps: K.
        rank: of what each map adds to the identity.
        temperature: divides the cosines at the start; learnt from there.
    """

    def __init__(
        self,
        token_count: int,
        width: int,
        *,
        maps: int = 16,
        rank: int = 4,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        rank = min(rank, token_count)
        self.keys = nn.Parameter(torch.randn(maps, width))
        self.left = nn.Parameter(torch.zeros(maps, token_count, rank))
        self.right = nn.Parameter(torch.randn(maps, rank, token_count) / math.sqrt(token_count))
        self.log_temperature = nn.Parameter(torch.tensor([temperature]).log())

    @property
    def token_count(self) -> int:
        """N, the number of tokens it is made for."""
        return self.left.shape[1]

    def maps(self) -> Tensor:
        """The K maps, identity plus low rank, `(K, N, N)`."""
        identity = torch.eye(self.token_count, dtype=self.left.dtype, device=self.left.device)
        return identity + torch.matmul(self.left, self.right)

    def weights(self, tokens: Tensor) -> Tensor:
        """Share of each map in the blend of each image, `(B, K)`, rows of sum 1."""
        pooled = functional.normalize(tokens.float().mean(dim=1), dim=-1)
        cosines = pooled @ functional.normalize(self.keys.float(), dim=-1).T
        return softmax(cosines / self.log_temperature.float().exp()).to(tokens.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix the positions of tokens `(B, N, C)`, with a residual around it.

        Raises:
            TrainingError: another number of tokens than the module was made for.
        """
        count = self.token_count
        if tokens.shape[1] != count:
            raise TrainingError(
                f"the transfer module was made for {count} tokens an image, not {tokens.shape[1]}: "
                f"give images of the size that it was trained with"
            )
        blended = self.weights(tokens) @ self.maps().reshape(-1, count * count).to(tokens.dtype)
        return tokens + torch.matmul(blended.view(-1, count, count), tokens)


def transfer_module(token_count: int, width: int, *, maps: int, rank: int) -> nn.Sequential:
    """Build the module as it stands between a backbone and the token mean: LN, block, LN."""
    return nn.Sequential(
        nn.LayerNorm(width),
        TransferMaps(token_count, width, maps=maps, rank=rank),
        nn.LayerNorm(width),
    )
