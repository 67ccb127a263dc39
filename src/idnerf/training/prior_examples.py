"""Training examples of the small prior as a function of the step: crops for the autoencoder, latents for the U-Net."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.view_selection import target_bounds
from idnerf.geometry.cameras import crop, view_distances
from idnerf.priors.latent_diffusion import FACTOR, EncodedSources, SmallPrior
from idnerf.training.examples import Example, draw_int, recolour, seeded
from idnerf.training.prior_scenes import ViewGroups
from idnerf.types import Cameras, Views, stack_cameras

CROPS_PER_GROUP = 4
"""Crops taken from each scene that is read for an autoencoder step: reading costs as much as four crops."""
CACHED_GROUPS = 4000
"""Encoded scenes kept in memory, about 0.2 MB each."""


@dataclass(frozen=True)
class LatentBatch:
    """Target latents [batch], their cameras (of the window that the latents span), and the encoded sources."""

    latents: Float[Tensor, "batch 4 height width"]
    target: Cameras
    source: EncodedSources


def autoencoder_crops(
    groups: ViewGroups, seed: int, step: int, batch_size: int, side: int
) -> Float[Tensor, "batch 3 side side"]:
    """Square windows of random views, flipped and with colour channels permuted at random."""
    generator = seeded(seed, step, 10)
    crops: list[Tensor] = []
    while len(crops) < batch_size:
        images = groups.group(draw_int(0, len(groups) - 1, generator)).images
        height, width = images.shape[-2:]
        for _ in range(min(CROPS_PER_GROUP, batch_size - len(crops))):
            top, left = draw_int(0, height - side, generator), draw_int(0, width - side, generator)
            window = images[draw_int(0, len(images) - 1, generator), :, top : top + side, left : left + side]
            if draw_int(0, 1, generator):
                window = window.flip(-1)
            crops.append(window[torch.randperm(3, generator=generator)])
    return torch.stack(crops)


class EncodedGroups:
    """Groups encoded by a frozen autoencoder, recoloured (each always the same way), the last ones kept in memory."""

    def __init__(self, groups: ViewGroups, prior: SmallPrior, *, augment: bool):
        self.groups, self.prior, self.augment = groups, prior, augment
        self._kept: OrderedDict[int, EncodedSources] = OrderedDict()

    def __len__(self) -> int:
        return len(self.groups)

    def views(self, index: int) -> Views:
        """The photos, recoloured."""
        views = self.groups.group(index)
        if not self.augment:
            return views
        example = Example(views, views[0], None, None, "")
        return recolour(example, seeded(index, 11)).source

    @torch.no_grad()
    def group(self, index: int) -> EncodedSources:
        """[view] latents, thumbnails and cameras, on the CPU."""
        if index not in self._kept:
            encoded = self.prior.encode_sources(self.views(index).to(self.prior.device))
            self._kept[index] = EncodedSources(
                encoded.latents.half().cpu(), encoded.thumbnails.half().cpu(), encoded.cameras.to("cpu")
            )
            if len(self._kept) > CACHED_GROUPS:
                self._kept.popitem(last=False)
        kept = self._kept[index]
        return EncodedSources(kept.latents.float(), kept.thumbnails.float(), kept.cameras)


def latent_batch(
    groups: EncodedGroups, seed: int, step: int, batch_size: int, source_views: tuple[int, int]
) -> LatentBatch:
    """``batch_size`` targets with sources drawn from their nearest views; half of the steps take whole images, half
    windows of one random size, as trainings on tiles ask for.
    """
    generator = seeded(seed, step, 12)
    num_sources = draw_int(*source_views, generator)
    whole = draw_int(0, 1, generator)
    share = torch.rand(2, generator=generator)
    latents, cameras, sources = [], [], []
    for _ in range(batch_size):
        group = groups.group(draw_int(0, len(groups) - 1, generator))
        target = draw_int(0, len(group.latents) - 1, generator)
        encoded, camera, source = choose_views(group, target, num_sources, generator)
        height, width = encoded.shape[-2:]
        if not whole:
            h, w = window_side(height, float(share[0])), window_side(width, float(share[1]))
            top, left = draw_int(0, height - h, generator), draw_int(0, width - w, generator)
            encoded, camera = cut_latents(encoded, camera, (left, top), (w, h))
        latents.append(encoded)
        cameras.append(camera)
        sources.append(source)
    return LatentBatch(torch.stack(latents), stack_cameras(cameras), stack_sources(sources))


def choose_views(
    group: EncodedSources, target: int, num_sources: int, generator: torch.Generator | None
) -> tuple[Float[Tensor, "4 height width"], Cameras, EncodedSources]:
    """A target's latents and camera, and ``num_sources`` of its ``num_sources + 1`` nearest views (without generator:
    the nearest). The target's depth range is what these sources know."""
    order = view_distances(group.cameras, group.cameras[target]).argsort()
    order = order[order != target][: num_sources + (generator is not None)]
    chosen = order if generator is None else order[torch.randperm(len(order), generator=generator)[:num_sources]]
    source = EncodedSources(group.latents[chosen], group.thumbnails[chosen], group.cameras[chosen])
    camera = group.cameras[target].with_bounds(*target_bounds(source.cameras))
    return group.latents[target], camera, source


def window_side(whole: int, share: float, fewest: int = 8) -> int:
    """From ``fewest`` (or the whole, if that is less) to the whole."""
    low = min(whole, fewest)
    return low + round(share * (whole - low))


def cut_latents(
    latents: Float[Tensor, "4 height width"], camera: Cameras, corner: tuple[int, int], size: tuple[int, int]
) -> tuple[Float[Tensor, "4 h w"], Cameras]:
    """A window of latents at ``corner`` (left, top) of ``size`` (width, height), in latents, and its camera."""
    (left, top), (w, h) = corner, size
    step_x, step_y = camera.width / latents.shape[-1], camera.height / latents.shape[-2]
    assert step_x == FACTOR and step_y == FACTOR, "training images have sides that are multiples of 8"
    window = crop(camera, left * FACTOR, top * FACTOR, (w * FACTOR, h * FACTOR))
    return latents[:, top : top + h, left : left + w], window


def stack_sources(sources: list[EncodedSources]) -> EncodedSources:
    """[view] to [batch view]."""
    return EncodedSources(
        torch.stack([s.latents for s in sources]),
        torch.stack([s.thumbnails for s in sources]),
        stack_cameras([s.cameras for s in sources]),
    )


def sources_to(source: EncodedSources, device: torch.device) -> EncodedSources:
    return EncodedSources(source.latents.to(device), source.thumbnails.to(device), source.cameras.to(device))
