"""What the published MatchNeRF weights expect, and what we do instead: the one place where the two differ.

``Behaviour`` is ours and follows docs/conventions.md; ``PublishedBehaviour`` is what the released weights
were trained with (donydchen/matchnerf, ``legacy_coord``). The model asks these few questions and knows no
more about it. docs/matchnerf.md has the table.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.geometry.cameras import crop, invert_rigid
from idnerf.geometry.projection import project, safe_depth, scaled, visible
from idnerf.models.gmflow import CELL_OFFSET
from idnerf.rendering.sampling import depths_linear
from idnerf.types import Cameras


def stratified(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """Where in their bins samples lie, in [0, 1), on the generator's device."""
    return torch.rand(shape, generator=generator, device=generator.device)


class Behaviour:
    """The conventions of this project."""

    def cameras(self, cameras: Cameras) -> Cameras:
        """The cameras as the weights see them."""
        return cameras

    def map_positions(
        self, pixels: Float[Tensor, "*batch 2"], image_size: tuple[int, int], map_size: tuple[int, int]
    ) -> Float[Tensor, "*batch 2"]:
        """Pixels of an image to positions in its feature map, centres at +0.5 in both; sizes (w, h).

        A cell describes the pixels around its first one, hence the offset.
        """
        return scaled(pixels + CELL_OFFSET, map_size[0] / image_size[0], map_size[1] / image_size[1])

    def visible(
        self, pixels: Float[Tensor, "*batch 2"], depth: Float[Tensor, "*batch"], size: tuple[int, int]
    ) -> Bool[Tensor, "*batch"]:
        """In front and inside."""
        return visible(pixels, depth, size)

    def pair_weights(
        self, first: Bool[Tensor, "batch pair point"], second: Bool[Tensor, "batch pair point"]
    ) -> Float[Tensor, "batch pair point"]:
        """Weights of the pairs in a point's mean similarity: only pairs that both see it count."""
        both = (first & second).float()
        return both / both.sum(1, keepdim=True).clamp_min(1)

    def sample_depths(
        self, cameras: Cameras, rays: int, count: int, generator: torch.Generator | None
    ) -> Float[Tensor, "batch ray sample"]:
        """Depths (z) of the samples, one per bin of equal depth: its middle, or stratified."""
        inside = 0.5 if generator is None else stratified((*cameras.shape, rays, count), generator)
        return self._at_bins(cameras, inside, count, count).expand(-1, rays, -1)

    def frame_coordinates(
        self, points: Float[Tensor, "batch point 3"], cameras: Cameras
    ) -> Float[Tensor, "batch point 3"]:
        """Points in a camera's frame, to be position-encoded: (x/z, y/z, depth as a fraction of near to far).

        Slopes, not pixels: the coordinates of a point do not change when the camera is cropped or resized.
        """
        w2c = invert_rigid(cameras.c2w)
        in_camera = points @ w2c[:, :3, :3].transpose(-1, -2) + w2c[:, None, :3, 3]
        slopes = in_camera[..., :2] / safe_depth(in_camera[..., 2:])
        return torch.cat([slopes, self._depth_fraction(in_camera[..., 2:], cameras)], -1)

    def attention_masks(
        self, seen_by: Float[Tensor, "*ray sample"]
    ) -> tuple[Bool[Tensor, "*ray sample"] | None, Bool[Tensor, "*ray sample"] | None]:
        """(Samples that ask, samples that answer) in the ray transformer; None is all."""
        return None, seen_by > 0

    def sigmas(self, raw: Float[Tensor, "*ray sample"]) -> Float[Tensor, "*ray sample"]:
        """Densities, above 0. A softplus cannot die as a ReLU can; shifted, rays do not start opaque."""
        return F.softplus(raw - 4)

    def expected_depth(
        self, weights: Float[Tensor, "*ray sample"], depths: Float[Tensor, "*ray sample"]
    ) -> Float[Tensor, "*ray"]:
        """Mean depth under the compositing weights; the mean of all samples where nothing is hit."""
        weights = weights + 1e-6
        return (weights * depths).sum(-1) / weights.sum(-1)

    def _at_bins(
        self, cameras: Cameras, inside: float | Float[Tensor, "batch ray sample"], count: int, bins: int
    ) -> Float[Tensor, "batch #ray sample"]:
        """Depths of ``count`` samples, each so far ``inside`` its bin, in [0, 1]."""
        inside = inside.to(cameras.device) if isinstance(inside, Tensor) else inside
        fraction = (torch.arange(count, device=cameras.device) + inside) / bins
        near, far = cameras.near[:, None, None], cameras.far[:, None, None]
        return near + fraction * (far - near)

    def _depth_fraction(self, depth: Float[Tensor, "batch point 1"], cameras: Cameras) -> Tensor:
        near, far = cameras.near[:, None, None], cameras.far[:, None, None]
        return (depth - near) / (far - near)


class PublishedBehaviour(Behaviour):
    """The conventions the released weights were trained with, defects included."""

    def cameras(self, cameras: Cameras) -> Cameras:
        """Pixel centres are integers there: the same K means a principal point half a pixel further here."""
        half = torch.full_like(cameras.near, -0.5)
        return crop(cameras, half, half, cameras.size)

    def map_positions(
        self, pixels: Float[Tensor, "*batch 2"], image_size: tuple[int, int], map_size: tuple[int, int]
    ) -> Float[Tensor, "*batch 2"]:
        """First and last pixel centres fall on first and last cell centres (``align_corners``)."""
        steps = [(cells - 1) / (size - 1) for cells, size in zip(map_size, image_size, strict=True)]
        return scaled(pixels - 0.5, *steps) + 0.5

    def visible(
        self, pixels: Float[Tensor, "*batch 2"], depth: Float[Tensor, "*batch"], size: tuple[int, int]
    ) -> Bool[Tensor, "*batch"]:
        """Strictly between the outer pixel centres, behind the camera or not."""
        u, v = pixels[..., 0] - 0.5, pixels[..., 1] - 0.5
        return (u > 0) & (u < size[0] - 1) & (v > 0) & (v < size[1] - 1)

    def pair_weights(
        self, first: Bool[Tensor, "batch pair point"], second: Bool[Tensor, "batch pair point"]
    ) -> Float[Tensor, "batch pair point"]:
        """All pairs count alike, seen or not."""
        return torch.ones_like(first, dtype=torch.float32) / first.shape[1]

    def sample_depths(
        self, cameras: Cameras, rays: int, count: int, generator: torch.Generator | None
    ) -> Float[Tensor, "batch ray sample"]:
        """Near to far, both included; stratified samples may lie up to one step beyond far."""
        if generator is None:
            return depths_linear(cameras.near, cameras.far, count)[:, None].expand(-1, rays, -1)
        return self._at_bins(cameras, stratified((*cameras.shape, rays, count), generator), count, count - 1)

    def frame_coordinates(
        self, points: Float[Tensor, "batch point 3"], cameras: Cameras
    ) -> Float[Tensor, "batch point 3"]:
        """Pixels as a fraction of the image, and depth as a fraction of near to far."""
        pixels, depth = project(points, cameras)
        u, v = (pixels - 0.5).unbind(-1)
        of_image = torch.stack([u / (cameras.width - 1), v / (cameras.height - 1)], -1)
        return torch.cat([of_image, self._depth_fraction(depth[..., None], cameras)], -1)

    def attention_masks(
        self, seen_by: Float[Tensor, "*ray sample"]
    ) -> tuple[Bool[Tensor, "*ray sample"] | None, Bool[Tensor, "*ray sample"] | None]:
        """The mask is on the asking side: samples that fewer than two views see attend to all alike."""
        return seen_by > 1, None

    def sigmas(self, raw: Float[Tensor, "*ray sample"]) -> Float[Tensor, "*ray sample"]:
        return F.relu(raw)

    def expected_depth(
        self, weights: Float[Tensor, "*ray sample"], depths: Float[Tensor, "*ray sample"]
    ) -> Float[Tensor, "*ray"]:
        """Not divided by the opacity."""
        return (weights * depths).sum(-1)
