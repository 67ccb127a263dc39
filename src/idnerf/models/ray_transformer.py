"""Attention among the samples of a ray, for density from the whole ray (IBRNet, arXiv 2102.13090, 3.3)."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class RayTransformer(nn.Module):
    """One layer of multi-head attention along the samples, residual and layer norm; no position code."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(
        self,
        tokens: Float[Tensor, "ray sample width"],
        asking: Bool[Tensor, "ray sample"] | None = None,
        answering: Bool[Tensor, "ray sample"] | None = None,
    ) -> Float[Tensor, "ray sample width"]:
        """Tokens of the samples after they have looked at one another.

        Args:
            asking: samples outside of it attend to every sample alike; None is all.
            answering: samples outside of it are ignored by all others; on a ray without any, all answer.
        """
        queries = self.query(tokens)
        if asking is not None:
            # A zero query scores every key alike, which is uniform attention.
            queries = queries * asking[..., None].to(queries.dtype)
        mask = None
        if answering is not None:
            mask = (answering | ~answering.any(-1, keepdim=True))[:, None, None]
        split = (self.heads, -1)
        queries, keys, values = (
            x.unflatten(-1, split).transpose(1, 2) for x in (queries, self.key(tokens), self.value(tokens))
        )
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.norm(tokens + self.merge(attended.transpose(1, 2).flatten(2)))
