"""The one file that talks to the transformers package: CLIP image embeddings, and the empty prompt's hidden states.

Pictures are resized and normalised here with PyTorch: the package's own image processors need torchvision.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from idnerf.errors import InputError
from idnerf.priors.model_source import ModelSource, hub_error

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's training pictures, RGB in [0, 1] (arXiv 2103.00020)."""


def transformers() -> Any:
    """The package. Raises InputError when the extra is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"this prior needs the transformers package ({error}): `pip install '.[prior]'` in a checkout"
        ) from error


class ClipImageEncoder:
    """CLIP's vision tower with its projection, frozen."""

    def __init__(self, network: Any):
        self.network = network.eval().requires_grad_(False)
        self.size = int(network.config.image_size)
        self.width = int(network.config.projection_dim)

    @torch.no_grad()
    def embed(self, images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image embedding"]:
        """Projected embeddings (not normalised) of pictures in [0, 1], float32."""
        pixels = clip_pixels(images, self.size).to(self.network.dtype)
        return self.network(pixel_values=pixels).image_embeds.float()


def clip_pixels(images: Float[Tensor, "image 3 height width"], size: int) -> Float[Tensor, "image 3 size size"]:
    """Resize to a square (bicubic, antialiased, the whole picture) and normalise as CLIP was trained."""
    square = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = square.new_tensor(MEAN)[:, None, None], square.new_tensor(STD)[:, None, None]
    return (square - mean) / std


def load_image_encoder(source: ModelSource, subfolder: str | None, dtype: torch.dtype) -> ClipImageEncoder:
    """From a CLIP repository, or the ``image_encoder`` folder of a diffusers one.

    Raises:
        InputError: it cannot be had.
    """
    return ClipImageEncoder(_load("CLIPVisionModelWithProjection", source, subfolder, dtype))


@torch.no_grad()
def text_projection(source: ModelSource) -> Float[Tensor, "embedding hidden"]:
    """The matrix that takes the text tower's last hidden state to the space CLIP shares with images. Float32."""
    return _load("CLIPTextModelWithProjection", source, None, torch.float32).text_projection.weight.detach().clone()


@torch.no_grad()
def empty_prompt(source: ModelSource) -> Float[Tensor, "token hidden"]:
    """Hidden states of the empty prompt, Stable Diffusion's unconditional input, from the folder's ``text_encoder``.

    The prompt is [start, end, padding ...]: the two last numbers of CLIP's vocabulary, padded with the end token in
    Stable Diffusion 1 (``pad_token_id`` 1 in its file stands for that) and with token 0 in Stable Diffusion 2.
    """
    network = _load("CLIPTextModel", source, "text_encoder", torch.float32)
    config = network.config
    start, end = config.vocab_size - 2, config.vocab_size - 1
    # Stable Diffusion 2 pads with "!" (token 0); it is told apart by its OpenCLIP tower's activation
    padding = 0 if config.hidden_act == "gelu" else end
    ids = torch.full((1, config.max_position_embeddings), padding)
    ids[0, 0], ids[0, 1] = start, end
    return network(input_ids=ids).last_hidden_state[0].detach().clone()


def _load(kind: str, source: ModelSource, subfolder: str | None, dtype: torch.dtype) -> Any:
    classes = transformers()
    if source.folder is not None and subfolder is not None and not (source.folder / subfolder).is_dir():
        raise InputError(f"{source.folder} has no folder {subfolder!r}; expected a model in diffusers' format")
    options = {"subfolder": subfolder} if subfolder is not None else {}
    log = classes.utils.logging
    verbosity = log.get_verbosity()
    log.set_verbosity_error()  # it would list the other tower's weights, which are not wanted
    try:
        network = getattr(classes, kind).from_pretrained(source.location, revision=source.revision or "main", **options)
        return network.to(dtype)  # the name of the option for it changed between versions
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise hub_error(source, subfolder or "the CLIP model", error) from error
    finally:
        log.set_verbosity(verbosity)
