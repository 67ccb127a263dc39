"""Training examples of the small prior as a function of the step: crops for the autoencoder, latents for the U-Net."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.view_selection import target_bounds
from idnerf.geometry.cameras import crop, view_distances
from idnerf.priors.latent_diffusion import FACTOR, EncodedSources, SmallPrior
from idnerf.priors.view_alignment import ALIGNED_CHANNELS, align_sources
from idnerf.training.examples import Example, draw_int, recolour, seeded
from idnerf.training.prior_scenes import ViewGroups
from idnerf.types import Cameras, Views, stack_cameras

CROPS_PER_GROUP = 4
"""Crops taken from each scene that is read for an autoencoder step: reading costs as much as four crops."""
CACHED_GROUPS = 4000
"""Encoded scenes kept in memory, about 0.2 MB each."""
CACHED_TARGETS = 30_000
"""View-aligned features of targets kept in memory, about 13 kB each."""


@dataclass(frozen=True)
class LatentBatch:
    """Target latents [batch], their cameras (of the window that the latents span), and the encoded sources.

    ``aligned``: the sources reprojected into the target (``align_sources``); None where nobody has computed them yet.
    """

    latents: Float[Tensor, "batch 4 height width"]
    target: Cameras
    source: EncodedSources
    aligned: Float[Tensor, "batch aligned_channel height width"] | None = None


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
    """Groups encoded by a frozen autoencoder, recoloured (each always the same way), the last ones kept in memory.

    So are the view-aligned features of whole targets: their plane sweep costs twice the U-Net's step. That is why a
    target always has the same sources, as long as their number is the same.
    """

    def __init__(self, groups: ViewGroups, prior: SmallPrior, *, augment: bool):
        self.groups, self.prior, self.augment = groups, prior, augment
        self._kept: OrderedDict[int, EncodedSources] = OrderedDict()
        self._aligned: OrderedDict[tuple[int, int, int], Tensor] = OrderedDict()

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

    @torch.no_grad()
    def example(
        self, index: int, target: int, num_sources: int
    ) -> tuple[Float[Tensor, "4 h w"], Cameras, EncodedSources, Float[Tensor, "aligned_channel h w"]]:
        """A whole target of a group: its latents and camera, its sources, and their view-aligned features."""
        group = self.group(index)
        latents, camera, source = choose_views(group, target, num_sources, seeded(index, target, num_sources, 16))
        key = (index, target, num_sources)
        if key not in self._aligned:
            size = (latents.shape[-1], latents.shape[-2])
            planes, batch = self.prior.config.planes, stack_sources([source])
            aligned = align_sources(
                batch.thumbnails, batch.latents, batch.cameras, stack_cameras([camera]), size, planes
            )
            self._aligned[key] = aligned[0].half()
            if len(self._aligned) > CACHED_TARGETS:
                self._aligned.popitem(last=False)
        return latents, camera, source, self._aligned[key].float()


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
    latents, cameras, sources, features = [], [], [], []
    for _ in range(batch_size):
        index = draw_int(0, len(groups) - 1, generator)
        target = draw_int(0, len(groups.group(index).latents) - 1, generator)
        encoded, camera, source, aligned = groups.example(index, target, num_sources)
        height, width = encoded.shape[-2:]
        if not whole:
            h, w = window_side(height, float(share[0])), window_side(width, float(share[1]))
            top, left = draw_int(0, height - h, generator), draw_int(0, width - w, generator)
            both, camera = cut_latents(torch.cat([encoded, aligned]), camera, (left, top), (w, h))
            encoded, aligned = both.split([len(encoded), ALIGNED_CHANNELS])
        latents.append(encoded)
        cameras.append(camera)
        sources.append(source)
        features.append(aligned)
    return LatentBatch(
        torch.stack(latents), stack_cameras(cameras), stack_sources(sources), aligned=torch.stack(features)
    )


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
    latents: Float[Tensor, "channel height width"], camera: Cameras, corner: tuple[int, int], size: tuple[int, int]
) -> tuple[Float[Tensor, "channel h w"], Cameras]:
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
