"""Depth maps to export from: rendered at the cameras of photos, or at any others.

A depth map at a photo's own camera is rendered from that photo *and* its neighbours: the photo says where its edges
are, the neighbours how far they lie. On procedural scenes this has less depth error than leaving the photo out
(docs/export.md has the figures). Its colours are then the photo's own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data.view_selection import SAME_POSE, nearest_first, spread_indices, target_bounds
from idnerf.errors import InputError
from idnerf.geometry.cameras import view_distances
from idnerf.types import Cameras, RenderOutput, Views, stack_cameras

Render = Callable[[Views, Cameras], RenderOutput]
"""(source views [view], target camera) -> images without batch axis."""


@dataclass(frozen=True)
class DepthViews:
    """Depth maps with colours and cameras.

    Attributes:
        images: RGB in [0, 1].
        depth: z in scene units; 0 where unknown.
        confidence: in [0, 1].
        cameras: [view].
    """

    images: Float[Tensor, "view 3 height width"]
    depth: Float[Tensor, "view height width"]
    confidence: Float[Tensor, "view height width"]
    cameras: Cameras

    def __len__(self) -> int:
        return len(self.depth)


def nearest_sources(photos: Cameras, target: Cameras, count: int) -> list[int]:
    """Indices of the ``count`` photos nearest to a target camera, nearest first; its own photo comes first.

    Raises:
        InputError: fewer than 2 asked for, or more than there are.
    """
    if not 2 <= count <= len(photos):
        raise InputError(f"expected --num-sources from 2 to the {len(photos)} photos used, got {count}")
    return nearest_first(photos, target)[:count]


def own_photo(photos: Cameras, target: Cameras) -> int | None:
    """Index of the photo taken by the target camera itself, None when there is none."""
    if photos.size != target.size:
        return None
    same_pose = (photos.c2w - target.c2w).abs().amax((-2, -1)) <= SAME_POSE
    same = same_pose & ((photos.K - target.K).abs().amax((-2, -1)) <= 1e-3)
    return int(same.nonzero()[0]) if same.any() else None


def render_depth_views(
    render: Render,
    photos: Views,
    targets: Cameras,
    num_sources: int,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> DepthViews:
    """Render every target camera [view] from its ``num_sources`` nearest photos, its own photo included.

    Images are on the CPU. ``progress`` is told (done, total).

    Raises:
        InputError: a number of sources that the photos do not offer, or a rendering that is not finite.
    """
    rendered = list(_rendered(render, photos, targets, num_sources, progress))
    return DepthViews(
        images=torch.stack([output.rgb for output, _ in rendered]),
        depth=torch.stack([output.depth for output, _ in rendered]),
        confidence=torch.stack(
            [torch.ones_like(o.depth) if o.confidence is None else o.confidence for o, _ in rendered]
        ),
        cameras=stack_cameras([camera for _, camera in rendered]),
    )


def _rendered(
    render: Render,
    photos: Views,
    targets: Cameras,
    num_sources: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[RenderOutput, Cameras]]:
    for number in range(len(targets)):
        target = targets[number]
        chosen = nearest_sources(photos.cameras, target, num_sources)
        target = target.with_bounds(*target_bounds(photos.cameras[chosen]))
        output = render(photos[chosen], target).map(lambda x: x.detach().float().cpu())
        if not output.depth.isfinite().all():
            raise InputError(f"depth map {number} has numbers that are not finite: are the weights sound?")
        own = own_photo(photos.cameras, target)
        if own is not None:
            output = RenderOutput(photos.images[own].cpu(), output.depth, output.opacity, output.confidence)
        yield output, target
        if progress is not None:
            progress(number + 1, len(targets))


def spread_pairs(cameras: Cameras, count: int) -> list[int]:
    """``count`` of the cameras [view] spread over the scene, each with its nearest neighbour, in their own order.

    Cameras merely spread out would hardly see the same things, and none could confirm another's depth. All, when there
    are no more than ``count``.
    """
    if count >= len(cameras):
        return list(range(len(cameras)))
    chosen: list[int] = []
    for i in spread_indices(cameras.centers, len(cameras)):
        if i not in chosen:
            others = [j for j in range(len(cameras)) if j != i and j not in chosen]
            distances = view_distances(cameras, cameras[i])
            chosen += [i, *sorted(others, key=lambda j, d=distances: float(d[j]))[:1]]
        if len(chosen) >= count:
            break
    return sorted(chosen[:count])
