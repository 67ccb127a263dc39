"""From CLIP image embeddings to the tokens of a U-Net's cross-attention: one adapter per kind of U-Net. Pure functions.

``native``  U-Nets fine-tuned on image embeddings: the embedding is the token.
``text``    U-Nets trained on text: the hidden state whose projection is the embedding, behind a start token.
``paper``   what the public code of ID-NeRF does: the unit embedding, linearly stretched to the U-Net's width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from idnerf.priors.ray_maps import relative_ray_maps
from idnerf.types import Cameras


def stretched_tokens(
    embeddings: Float[Tensor, "batch token embedding"], width: int
) -> Float[Tensor, "batch token width"]:
    """Unit embeddings as signals of ``embedding`` samples, linearly interpolated to ``width``: `paper`."""
    unit = F.normalize(embeddings, dim=-1)
    return F.interpolate(unit, size=width, mode="linear", align_corners=False)


def text_space_tokens(
    embeddings: Float[Tensor, "batch token embedding"],
    inverse_projection: Float[Tensor, "hidden embedding"],
    empty_prompt: Float[Tensor, "prompt_token hidden"],
) -> Float[Tensor, "batch token_and_start hidden"]:
    """Text hidden states that CLIP would project onto the image embeddings: `text`.

    CLIP's image and text embeddings share one space, text's are W h of the last hidden state h: so h = W^+ e (the least
    squares solution) is a text that says what the picture shows. Its length is not determined; it is given that of the
    empty prompt's end token. The prompt's start token goes before, as every text U-Net has seen it.

    Args:
        inverse_projection: W^+, the pseudo-inverse of W.
        empty_prompt: hidden states: start, end, padding.
    """
    hidden = embeddings @ inverse_projection.T
    hidden = F.normalize(hidden, dim=-1) * empty_prompt[1].norm()
    return torch.cat([empty_prompt[:1].expand(len(hidden), -1, -1), hidden], 1)


def ray_pictures(
    source: Cameras, target: Cameras, size: tuple[int, int]
) -> Float[Tensor, "batch two_per_view 3 height width"]:
    """Ray maps of the sources as pairs of pictures, origins and directions, mapped from [-1, 1] to [0, 1]."""
    maps = relative_ray_maps(source, target, size)
    return ((maps + 1) / 2).clamp(0, 1).unflatten(2, (2, 3)).flatten(1, 2)
