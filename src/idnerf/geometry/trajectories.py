"""Camera paths from source cameras: pure functions, [view] cameras in, [frame] cameras out.

Every path is smooth and, but for ``interpolate``, closed, so that a video of it loops. The depth range of every frame
is what the sources know together (``shifted_range``).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from idnerf.errors import InputError
from idnerf.geometry.cameras import shifted_range
from idnerf.types import Cameras


def camera_path(kind: str, source: Cameras, frames: int) -> Cameras:
    """The path called ``interpolate``, ``spiral`` or ``orbit``. Raises InputError for any other name."""
    paths = {"interpolate": interpolate, "spiral": spiral, "orbit": orbit}
    if kind not in paths:
        raise InputError(f"expected --path interpolate, spiral or orbit, got {kind!r}")
    if frames < 1:
        raise InputError(f"expected --frames of at least 1, got {frames}")
    return paths[kind](source, frames)


def interpolate(source: Cameras, frames: int) -> Cameras:
    """From the first source to the last through all of them: positions along straight lines, rotations along arcs."""
    count = len(source)
    place = torch.linspace(0, count - 1, frames, device=source.device)
    first = place.floor().long().clamp_max(max(count - 2, 0))
    second = (first + 1).clamp_max(count - 1)
    share = place - first
    share = share * share * (3 - 2 * share)  # rest at every source
    centers = torch.lerp(source.centers[first], source.centers[second], share[:, None])
    rotations = source.c2w[:, :3, :3]
    turned = rotate_between(rotations[first], rotations[second], share)
    return path_cameras(source, turned, centers)


def spiral(source: Cameras, frames: int) -> Cameras:
    """Two turns around the mean camera, as wide as the sources lie, looking at one point (LLFF, arXiv 1905.00889)."""
    mean = mean_camera(source)
    right, down, forward = mean[:, 0], mean[:, 1], mean[:, 2]
    center = source.centers.mean(0)
    offsets = (source.centers - center) @ mean
    radii = offsets.abs().amax(0) * torch.tensor([0.8, 0.8, 0.4], device=source.device)
    radii[:2] = torch.maximum(radii[:2], radii[:2].max() * 0.3)  # sources on a line still get a path around it
    focus = center + forward * focus_depth(source)
    angle = torch.arange(frames, device=source.device) / frames * (2 * math.pi)
    wave = torch.stack([torch.cos(2 * angle), torch.sin(2 * angle), torch.sin(angle)], -1) * radii
    centers = center + wave[:, :1] * right + wave[:, 1:2] * down + wave[:, 2:] * forward
    return path_cameras(source, look_at(centers, focus, down), centers)


def orbit(source: Cameras, frames: int) -> Cameras:
    """Back and forth about the vertical through the point that the sources look at, as far as they reach to either
    side."""
    focus, down = focus_point(source), vertical(source)
    offsets = source.centers - focus
    if bool(across(offsets, down).norm(dim=-1).mean() < 0.2 * offsets.norm(dim=-1).mean()):  # seen from right above
        down = mean_camera(source)[:, 1]
    along, level = down * (offsets @ down).mean(), across(offsets, down)
    flat = mean_direction(level) * level.norm(dim=-1).mean()  # the sources' mean lies inside the arc
    sideways = F.normalize(torch.linalg.cross(down, flat), dim=0)
    reach = torch.atan2(offsets @ sideways, offsets @ F.normalize(flat, dim=0))
    amplitude = reach.abs().amax().clamp(math.radians(3), math.radians(60))
    angle = amplitude * torch.sin(torch.arange(frames, device=source.device) / frames * (2 * math.pi))
    centers = focus + along + torch.cos(angle)[:, None] * flat + torch.sin(angle)[:, None] * flat.norm() * sideways
    return path_cameras(source, look_at(centers, focus, down), centers)


def path_cameras(source: Cameras, rotations: Float[Tensor, "frame 3 3"], centers: Float[Tensor, "frame 3"]) -> Cameras:
    """Cameras of a path: the sources' mean intrinsics, and their joint depth range as each frame has it before it."""
    frames = len(centers)
    c2w = torch.eye(4, device=source.device).repeat(frames, 1, 1)
    c2w[:, :3, :3], c2w[:, :3, 3] = rotations, centers
    K = source.K.mean(0).expand(frames, -1, -1)
    return Cameras(c2w, K, source.size, *shifted_range(source, c2w))


def mean_camera(source: Cameras) -> Float[Tensor, "3 3"]:
    """Mean rotation: axes (right, down, forward) as columns, the forward axis kept, made orthonormal."""
    forward = mean_direction(source.c2w[:, :3, 2])
    down = mean_direction(source.c2w[:, :3, 1])
    right = F.normalize(torch.linalg.cross(down, forward), dim=0)
    return torch.stack([right, torch.linalg.cross(forward, right), forward], -1)


def vertical(source: Cameras) -> Float[Tensor, "3"]:
    """Downwards in the world, from cameras that are held level: across all their right axes.

    Where these are nearly parallel they leave a plane of directions, and it is the mean camera's down that counts:
    (M + e I) v = down with M the mean of r r^T.
    """
    right, down = source.c2w[:, :3, 0], mean_camera(source)[:, 1]
    M = (right[:, :, None] * right[:, None, :]).mean(0)
    eye = torch.eye(3, dtype=M.dtype, device=M.device)
    return F.normalize(torch.linalg.solve(M + 0.01 * eye, down), dim=0)


def across(vectors: Float[Tensor, "view 3"], axis: Float[Tensor, "3"]) -> Float[Tensor, "view 3"]:
    """What of the vectors is perpendicular to a unit axis."""
    return vectors - (vectors @ axis)[:, None] * axis


def mean_direction(directions: Float[Tensor, "view 3"]) -> Float[Tensor, "3"]:
    """Their normalised mean; the first one where they cancel out, as around an object."""
    mean = directions.mean(0)
    kept = mean.norm() > 0.05 * directions.norm(dim=-1).mean()
    return F.normalize(mean if bool(kept) else directions[0], dim=0)


def look_at(
    centers: Float[Tensor, "frame 3"], focus: Float[Tensor, "3"], down: Float[Tensor, "3"]
) -> Float[Tensor, "frame 3 3"]:
    """Rotations (c2w) of cameras at ``centers`` that look at ``focus`` with image-down towards ``down``."""
    forward = F.normalize(focus - centers, dim=-1)
    right = F.normalize(torch.linalg.cross(down.expand_as(forward), forward), dim=-1)
    return torch.stack([right, torch.linalg.cross(forward, right), forward], -1)


def focus_depth(source: Cameras) -> Float[Tensor, ""]:
    """Depth in the middle of the inverse depth range, a quarter from far: where a still point looks natural (LLFF)."""
    near, far = source.near.min(), source.far.max()
    return 1 / (0.25 / near + 0.75 / far)


def focus_point(source: Cameras) -> Float[Tensor, "3"]:
    """The point nearest to all optical axes, if most cameras have it in their depth range; else one ahead of them, at
    ``focus_depth``.

    Least squares over axes (c, f): sum (I - f f^T) (x - c) = 0.
    """
    forward, centers = source.c2w[:, :3, 2], source.centers
    projector = torch.eye(3, dtype=forward.dtype, device=source.device) - forward[:, :, None] * forward[:, None, :]
    A = projector.sum(0)
    if torch.linalg.eigvalsh(A)[0] > 1e-4 * len(source):
        point = torch.linalg.solve(A, (projector @ centers[:, :, None]).sum(0))[:, 0]
        depth = ((point - centers) * forward).sum(-1)
        if ((depth > source.near) & (depth < source.far)).float().mean() > 0.5:
            return point
    return centers.mean(0) + mean_direction(forward) * focus_depth(source)


def rotate_between(
    a: Float[Tensor, "frame 3 3"], b: Float[Tensor, "frame 3 3"], share: Float[Tensor, "frame"]
) -> Float[Tensor, "frame 3 3"]:
    """Rotations a share of the way from a to b along the shortest arc (Rodrigues' formula)."""
    relative = a.transpose(-1, -2) @ b
    vector = torch.stack(
        [
            relative[:, 2, 1] - relative[:, 1, 2],
            relative[:, 0, 2] - relative[:, 2, 0],
            relative[:, 1, 0] - relative[:, 0, 1],
        ],
        -1,
    )
    cosine = (relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    angle = torch.atan2(vector.norm(dim=-1) / 2, cosine) * share
    x, y, z = F.normalize(vector, dim=-1).unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    turn = torch.eye(3, device=a.device) + torch.sin(angle)[:, None, None] * cross
    return a @ (turn + (1 - torch.cos(angle))[:, None, None] * (cross @ cross))
