"""The typed values that travel between the parts (conventions: docs/conventions.md).

All are frozen: a batch is never changed in place. ``Cameras`` indexes and stacks like a tensor over its
leading axes. Pure camera geometry (inverting, cropping, projecting) is in ``idnerf.geometry``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Cameras:
    """Pinhole cameras of one image size, any leading (batch) shape.

    Attributes:
        c2w: camera-to-world, OpenCV axes.
        K: intrinsics, in pixels of ``size``, pixel centres at +0.5.
        size: (width, height) in pixels.
        near, far: depth range (z) in scene units, 0 < near < far.
    """

    c2w: Float[Tensor, "*batch 4 4"]
    K: Float[Tensor, "*batch 3 3"]
    size: tuple[int, int]
    near: Float[Tensor, "*batch"]
    far: Float[Tensor, "*batch"]

    @property
    def width(self) -> int:
        return self.size[0]

    @property
    def height(self) -> int:
        return self.size[1]

    @property
    def shape(self) -> torch.Size:
        """Leading (batch) shape."""
        return self.near.shape

    @property
    def device(self) -> torch.device:
        return self.c2w.device

    @property
    def centers(self) -> Float[Tensor, "*batch 3"]:
        """Camera centres in the world."""
        return self.c2w[..., :3, 3]

    def __len__(self) -> int:
        return self.near.shape[0]

    def __getitem__(self, index: Any) -> "Cameras":
        """Index the leading axes like a tensor (int, slice, list, None, tuple of these)."""
        return Cameras(self.c2w[index], self.K[index], self.size, self.near[index], self.far[index])

    def to(self, device: torch.device | str) -> "Cameras":
        return Cameras(self.c2w.to(device), self.K.to(device), self.size, self.near.to(device), self.far.to(device))

    def float(self) -> "Cameras":
        """The same cameras in float32."""
        return Cameras(self.c2w.float(), self.K.float(), self.size, self.near.float(), self.far.float())

    def with_bounds(self, near: Float[Tensor, "..."], far: Float[Tensor, "..."]) -> "Cameras":
        """The same cameras with another depth range (broadcast to the batch shape)."""
        return replace(self, near=near.expand(self.shape), far=far.expand(self.shape))


def stack_cameras(cameras: Sequence[Cameras]) -> Cameras:
    """Stack cameras of one size along a new leading axis."""
    return Cameras(
        torch.stack([c.c2w for c in cameras]),
        torch.stack([c.K for c in cameras]),
        cameras[0].size,
        torch.stack([c.near for c in cameras]),
        torch.stack([c.far for c in cameras]),
    )


@dataclass(frozen=True)
class Views:
    """Images with their cameras: ``images[i]`` was taken by ``cameras[i]``; RGB in [0, 1]."""

    images: Float[Tensor, "*batch 3 height width"]
    cameras: Cameras

    def __len__(self) -> int:
        return len(self.cameras)

    def __getitem__(self, index: Any) -> "Views":
        return Views(self.images[index], self.cameras[index])

    def to(self, device: torch.device | str) -> "Views":
        return Views(self.images.to(device), self.cameras.to(device))

    def float(self) -> "Views":
        """The same views in float32."""
        return Views(self.images.float(), self.cameras.float())


@dataclass(frozen=True)
class Rays:
    """Rays in the world; directions have unit length; ``cos`` turns distance t into depth: z = t * cos."""

    origins: Float[Tensor, "*batch 3"]
    directions: Float[Tensor, "*batch 3"]
    cos: Float[Tensor, "*batch"]


@dataclass(frozen=True)
class RenderOutput:
    """What rendering one target gives, as images.

    Attributes:
        rgb: colour in [0, 1].
        depth: expected depth (z), scene units.
        opacity: sum of the compositing weights, in [0, 1].
        confidence: in [0, 1]; low where fewer than two sources see the surface or they disagree.
    """

    rgb: Float[Tensor, "*batch 3 height width"]
    depth: Float[Tensor, "*batch height width"]
    opacity: Float[Tensor, "*batch height width"]
    confidence: Float[Tensor, "*batch height width"] | None = None

    def map(self, function: Any) -> "RenderOutput":
        """Apply ``function`` to every tensor."""
        confidence = None if self.confidence is None else function(self.confidence)
        return RenderOutput(function(self.rgb), function(self.depth), function(self.opacity), confidence)


@dataclass(frozen=True)
class Batch:
    """A training example: source views, one target view, and what procedural scenes know exactly.

    Attributes:
        source: [batch, view] source views.
        target: [batch] target view (one per scene), the truth to render.
        depth: exact target depth (z), 0 where unknown; None when the data has none.
        seen: number of sources that see the surface at each target pixel; None when not known.
        scenes: scene names, for messages.
    """

    source: Views
    target: Views
    depth: Float[Tensor, "batch height width"] | None
    seen: Float[Tensor, "batch height width"] | None
    scenes: tuple[str, ...]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            self.source.to(device),
            self.target.to(device),
            None if self.depth is None else self.depth.to(device),
            None if self.seen is None else self.seen.to(device),
            self.scenes,
        )
