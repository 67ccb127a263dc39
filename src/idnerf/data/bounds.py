"""Depth ranges for scenes whose format gives none (docs/data.md has the rule in words).

With 3D points (COLMAP): percentiles of the depths each camera observes. Without: a small plane sweep between
thumbnails gives confident surface points, and each camera takes percentiles of the points in its view. When
nothing matches, the arrangement of the cameras alone decides.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from idnerf.data.view_selection import spread_indices
from idnerf.geometry.cameras import resize
from idnerf.geometry.projection import frustum_homography, project, visible
from idnerf.geometry.rays import pixel_centers, rays_at_pixels
from idnerf.processors import decoders
from idnerf.types import Cameras

NEAR_SLACK, FAR_SLACK = 0.8, 1.2
"""The slack LLFF's protocol gives its own percentile bounds (PROTOCOL.md)."""

FIRST_FAR_SLACK = 10.0
"""The far one where the first sweep alone found points: there is hardly any parallax to tell far from farther by."""

LOW, HIGH = 0.01, 0.998
"""Quantiles of depth, LLFF's way of making bounds (there 0.1 % and 99.9 %). The far end is the more generous
one: in inverse depth, where planes are spaced, it costs next to nothing."""

MIN_POINTS = 10
"""A camera that sees fewer points takes the range of the others."""

THUMBNAIL = 120
"""Longer side of the pictures that are swept, in pixels."""

FIRST_PLANES, SECOND_PLANES = 96, 64
"""Inverse depths of each sweep: about one thumbnail pixel of parallax apart."""

REFERENCES = 8
"""Views that are swept; the others project their points."""

NEIGHBOURS = 3
"""Views that each is matched against."""

WINDOW, STRIDE = 5, 2
"""Side of the correlated windows and the step between them, in thumbnail pixels."""

MIN_SCORE, MIN_LEAD, MIN_CONTRAST = 0.8, 0.1, 0.02
"""A match counts when its correlation is high and leads every other peak, and its window has texture."""

SUPPORT = 5
"""... and when this many of the 8 windows around it found the same plane."""

ReadThumbnail = Callable[[int, tuple[int, int]], Float[Tensor, "3 height width"]]
Bounds = tuple[Float[Tensor, "view"], Float[Tensor, "view"]]


def bounds_from_depths(depths: Sequence[np.ndarray | Tensor | None]) -> Bounds | None:
    """0.8 x the 1 % and 1.2 x the 99.8 % quantile of the depths (z > 0) that each camera sees.

    A camera with fewer than ``MIN_POINTS`` depths takes the smallest near and largest far of the others; None
    when no camera has as many.
    """
    ranges = []
    for values in depths:
        if values is None or len(values) < MIN_POINTS:
            ranges.append((np.nan, np.nan))
            continue
        low, high = np.quantile(np.asarray(values, dtype=np.float64), [LOW, HIGH])
        ranges.append((NEAR_SLACK * low, FAR_SLACK * high))
    near, far = np.array(ranges).T
    if np.isnan(near).all():
        return None
    near, far = np.where(np.isnan(near), np.nanmin(near), near), np.where(np.isnan(far), np.nanmax(far), far)
    return torch.from_numpy(near).float(), torch.from_numpy(far).float()


def bounds_from_images(cameras: Cameras, read_thumbnail: ReadThumbnail) -> Bounds:
    """Depth ranges measured from the pictures, in two sweeps over thumbnails.

    The first sweep, over a few views and from infinity to where neighbours stop overlapping, tells the scale
    of the scene. The second takes neighbours whose baseline suits that scale. A scene of two or three photos
    works.

    Args:
        cameras: [view] cameras; near and far are ignored.
        read_thumbnail: (view index, size) -> picture at that size, undistorted.
    """
    scale = THUMBNAIL / max(cameras.size)
    small = resize(cameras, (max(WINDOW, round(cameras.width * scale)), max(WINDOW, round(cameras.height * scale))))
    thumbnails: dict[int, Tensor] = {}

    def sweeps(references: Sequence[int], baseline: float | None, nearest: float | None) -> list[tuple[Tensor, Tensor]]:
        pairs = [(i, neighbours(small, i, baseline)) for i in references]
        missing = sorted({view for i, others in pairs if others for view in (i, *others)} - thumbnails.keys())
        with ThreadPoolExecutor(decoders(len(missing))) as pool:
            pictures = pool.map(lambda view: read_thumbnail(view, small.size).mean(0), missing)
            thumbnails.update(zip(missing, pictures, strict=True))
        return [_sweep(small, i, others, thumbnails.__getitem__, nearest) for i, others in pairs]

    references = spread_indices(small.centers, REFERENCES)
    first = sweeps(references[:4], None, None)
    inverse = torch.cat([sweep[1] for sweep in first])
    if len(inverse) < MIN_POINTS:
        return bounds_from_arrangement(cameras)
    # Around 10 pixels of parallax at the median depth: enough to measure depth by, little enough to match.
    baseline = 10 / (float(small.K[:, 0, 0].median()) * float(inverse.median().clamp_min(1e-9)))
    nearest = 1.5 * float(inverse.quantile(0.98))
    second = sweeps(references, baseline, nearest)
    points = torch.cat([sweep[0] for sweep in second])
    inferred = bounds_from_depths([_depths_in_view(small[i], points) for i in range(len(small))])
    return _bounds_from_first_sweep(cameras, inverse) if inferred is None else inferred


def _bounds_from_first_sweep(cameras: Cameras, inverse_depths: Float[Tensor, "point"]) -> Bounds:
    """One generous range for all cameras, where parallax is too small for the second sweep to measure by."""
    nearest, farthest = inverse_depths.quantile(0.98), inverse_depths.quantile(LOW)
    near, far = NEAR_SLACK / nearest, FIRST_FAR_SLACK / farthest
    return near.expand(len(cameras)).clone(), far.expand(len(cameras)).clone()


def _depths_in_view(camera: Cameras, points: Tensor) -> Tensor:
    pixels, depth = project(points, camera)
    return depth[visible(pixels, depth, camera.size)]


def neighbours(cameras: Cameras, index: int, baseline: float | None) -> list[int]:
    """Up to ``NEIGHBOURS`` views that look the same way (within 45 degrees), by distance: the nearest ones,
    or those whose distance is nearest to ``baseline`` (scene units) in ratio. Views at the same place show no
    parallax."""
    axes = cameras.c2w[:, :3, 2]
    distances = (cameras.centers - cameras.centers[index]).norm(dim=-1)
    useful = (axes @ axes[index] > 0.7) & (distances > 1e-3 * distances.max())
    cost = distances if baseline is None else (distances / baseline).clamp_min(1e-9).log().abs()
    order = torch.argsort(cost).tolist()
    return [i for i in order if useful[i]][:NEIGHBOURS]


def _sweep(
    cameras: Cameras,
    index: int,
    others: Sequence[int],
    grey: Callable[[int], Tensor],
    max_inverse_depth: float | None,
) -> tuple[Float[Tensor, "point 3"], Float[Tensor, "point"]]:
    """Confident surface points (world) of one view and their inverse depths, by matching against
    ``others``."""
    target = cameras[index]
    if not others:
        return torch.zeros(0, 3), torch.zeros(0)
    A, b = frustum_homography(target, cameras[list(others)])
    pixels = pixel_centers(target.size).reshape(-1, 2)
    if max_inverse_depth is None:
        inverse = torch.linspace(0, _overlap_limit(A, b, target), FIRST_PLANES)
    else:
        inverse = torch.linspace(0, max_inverse_depth, SECOND_PLANES)
    matches = [match_planes(grey(index), grey(j), A[k], b[k], inverse) for k, j in enumerate(others)]
    scores = torch.stack([score * inside for score, inside in matches]).sum(0)
    counts = torch.stack([inside for _, inside in matches]).sum(0)
    needed = min(2, len(others))
    score = torch.where(counts >= needed, scores / counts.clamp_min(1), torch.full_like(counts, -1.0))
    plane, confident = _confident_peaks(score)
    confident &= _window_std(grey(index)) > MIN_CONTRAST
    confident &= _neighbours_that_agree(plane, confident) >= SUPPORT
    offset = (WINDOW - 1) // 2
    height, width = grey(index).shape
    grid = pixels.reshape(height, width, 2)[offset : height - offset : STRIDE, offset : width - offset : STRIDE]
    # Matched at infinity: parallax below half a step, so at least this far.
    inverse_depth = (plane[confident] * inverse[1]).clamp_min(0.5 * float(inverse[1]))
    rays = rays_at_pixels(target, grid[confident])
    points = rays.origins + rays.directions / (inverse_depth * rays.cos)[:, None]
    return points, inverse_depth


def _overlap_limit(A: Tensor, b: Tensor, target: Cameras) -> float:
    """The largest inverse depth at which a third of the target's pixels still land in the widest-reaching
    neighbour."""
    pixels = pixel_centers(target.size)[::8, ::8].reshape(-1, 2)
    directions = torch.cat([pixels, torch.ones(len(pixels), 1)], -1) @ A.transpose(-1, -2)  # [view, pixel, 3]
    # Inverse depths in units of 1 / baseline: from 1 % of it (a point 100 baselines away) up to its double.
    baseline = float((b.norm(dim=-1) / target.K[0, 0]).amin().clamp_min(1e-12))
    candidates = torch.logspace(-2, 0.3, 60) / baseline
    moved = directions[:, None] + b[:, None, None] * candidates[:, None, None]
    inside = visible(moved[..., :2] / moved[..., 2:].clamp_min(1e-9), moved[..., 2], target.size)
    enough = candidates[(inside.float().mean(-1) > 1 / 3).any(0)]
    return float(enough.max()) if len(enough) else float(candidates[0])


def match_planes(
    target: Float[Tensor, "height width"],
    source: Float[Tensor, "source_height source_width"],
    A: Float[Tensor, "3 3"],
    b: Float[Tensor, "3"],
    inverse_depths: Float[Tensor, "plane"],
) -> tuple[Float[Tensor, "plane rows columns"], Float[Tensor, "plane rows columns"]]:
    """Zero-mean normalised cross-correlation of windows at every plane, and whether the window lies in the
    source.

    ``A`` and ``b`` are the frustum homography of the pair: pixel p at inverse depth i lands at A (p, 1) + b
    i.
    """
    height, width = target.shape
    source_height, source_width = source.shape
    pixels = pixel_centers((width, height)).reshape(-1, 2)
    homogeneous = torch.cat([pixels, torch.ones(len(pixels), 1)], -1) @ A.T
    moved = homogeneous + inverse_depths[:, None, None] * b
    in_front = moved[..., 2] > 1e-6
    positions = moved[..., :2] / moved[..., 2:].clamp_min(1e-6)
    inside = visible(positions, moved[..., 2], (source_width, source_height)) & in_front
    grid = positions * positions.new_tensor([2 / source_width, 2 / source_height]) - 1
    warped = F.grid_sample(source[None, None], grid.clamp(-2, 2)[None], padding_mode="border", align_corners=False)
    warped = warped.reshape(-1, 1, height, width)
    mean_target, mean_warped = _window_mean(target[None, None]), _window_mean(warped)
    covariance = _window_mean(warped * target) - mean_target * mean_warped
    variance_target = (_window_mean(target[None, None] ** 2) - mean_target**2).clamp_min(0)
    variance_warped = (_window_mean(warped**2) - mean_warped**2).clamp_min(0)
    score = covariance / (variance_target * variance_warped + 1e-8).sqrt()
    whole = _window_mean(inside.float().reshape(-1, 1, height, width)) > 0.99
    return score[:, 0], whole[:, 0].float()


def _window_mean(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, WINDOW, stride=STRIDE)


def _window_std(image: Tensor) -> Tensor:
    mean = _window_mean(image[None, None])
    return (_window_mean(image[None, None] ** 2) - mean**2).clamp_min(0).sqrt()[0, 0]


def _neighbours_that_agree(
    plane: Float[Tensor, "rows columns"], confident: Bool[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    """How many of the 8 windows around are confident of the same plane (within 2): chance matches stand
    alone."""
    rows, columns = plane.shape
    padded = F.pad(torch.where(confident, plane, torch.full_like(plane, -100.0)), (1, 1, 1, 1), value=-100.0)
    around = F.unfold(padded[None, None], 3).reshape(9, rows, columns)
    return ((around - plane).abs() <= 2).float().sum(0) - 1


def _confident_peaks(
    score: Float[Tensor, "plane rows columns"],
) -> tuple[Tensor, Bool[Tensor, "rows columns"]]:
    """The best plane of each window, and whether it is high, alone, and not at the near end."""
    best, plane = score.max(0)
    planes = torch.arange(len(score))[:, None, None]
    ends = torch.full_like(score[:1], -1.0)
    neighbours_score = torch.maximum(torch.cat([ends, score[:-1]]), torch.cat([score[1:], ends]))
    other_peak = (score >= neighbours_score) & ((planes - plane).abs() > 2)
    rivals = torch.where(other_peak, score, torch.full_like(score, -1.0)).amax(0)
    confident = (best > MIN_SCORE) & (rivals < best - MIN_LEAD) & (plane < len(score) - 1)
    # An edge along the epipolar line matches everywhere.
    confident &= score.median(0).values < best - 2 * MIN_LEAD
    # The top of the parabola through the peak and its neighbours is the match between planes.
    before = score.gather(0, (plane - 1).clamp_min(0)[None])[0]
    after = score.gather(0, (plane + 1).clamp_max(len(score) - 1)[None])[0]
    shift = 0.5 * (before - after) / (before - 2 * best + after).clamp_max(-1e-6)
    return plane + torch.where(plane > 0, shift.clamp(-0.5, 0.5), torch.zeros_like(best)), confident


def bounds_from_arrangement(cameras: Cameras) -> Bounds:
    """When no picture matches another: from the cameras alone.

    If the optical axes meet in front of the cameras, at a distance d, the range is d/4 to 4 d; if they do not
    (parallel axes), it is 2 to 200 times the largest distance between neighbouring cameras.
    """
    centers, axes = cameras.centers.double(), cameras.c2w[:, :3, 2].double()
    # The point nearest to all axes: sum over cameras of (I - a a^T)(x - c) = 0.
    across = torch.eye(3, dtype=torch.float64) - axes[:, :, None] * axes[:, None, :]
    normal = across.sum(0)
    if torch.linalg.cond(normal) < 1e4:
        meeting = torch.linalg.solve(normal, (across @ centers[..., None]).sum(0))[:, 0]
        depth = ((meeting - centers) * axes).sum(-1)
        if (depth > 0).all():
            return (depth / 4).float(), (depth * 4).float()
    distances = torch.cdist(centers, centers).fill_diagonal_(torch.inf).amin(1)
    spacing = float(distances.max()) or 1.0
    ones = torch.ones(len(cameras))
    return 2 * spacing * ones, 200 * spacing * ones
