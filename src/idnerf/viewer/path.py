"""A camera path through key frames: as smooth as a hand would move, and through every one of them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from idnerf.errors import InputError
from idnerf.geometry.quaternions import quaternion_of, rotation_of
from idnerf.viewer.view_point import ViewPoint


def sample_path(keys: Sequence[ViewPoint], frames_per_leg: int, *, closed: bool = False) -> list[ViewPoint]:
    """View points along a Catmull-Rom spline through the key frames, ``frames_per_leg`` from each to the next.

    Positions, quaternions (then normalised) and the logarithm of the field of view run through the same cubic. An open
    path ends at the last key frame; a closed one returns to the first and leaves its repetition out, so that it loops.
    The aspect is the first key frame's.

    Raises:
        InputError: fewer than two key frames, or no frames.
    """
    if len(keys) < 2:
        raise InputError(f"a camera path needs at least 2 key frames, got {len(keys)}: move the camera and add one")
    if frames_per_leg < 1:
        raise InputError(f"expected at least 1 frame between key frames, got {frames_per_leg}")
    knots = np.array([knot(key) for key in keys])
    align_signs(knots[:, 3:7])
    legs = len(keys) if closed else len(keys) - 1
    times = np.arange(legs * frames_per_leg + (0 if closed else 1)) / frames_per_leg
    return [from_knot(catmull_rom(knots, time, closed), keys[0].aspect) for time in times]


def knot(view: ViewPoint) -> Float[np.ndarray, "8"]:
    """Position (3), quaternion (4), logarithm of the field of view."""
    return np.concatenate([view.c2w[:3, 3], quaternion_of(view.c2w[:3, :3]), [np.log(view.fov)]])


def from_knot(values: Float[np.ndarray, "8"], aspect: float) -> ViewPoint:
    """The inverse of ``knot``."""
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = rotation_of(values[3:7]), values[:3]
    return ViewPoint(c2w, float(np.exp(values[7])), aspect)


def align_signs(quaternions: Float[np.ndarray, "key 4"]) -> None:
    """Flip quaternions in place so that neighbours are on the same side: q and -q are one rotation."""
    for i in range(1, len(quaternions)):
        if quaternions[i] @ quaternions[i - 1] < 0:
            quaternions[i] *= -1


def catmull_rom(knots: Float[np.ndarray, "key 8"], time: float, closed: bool) -> Float[np.ndarray, "8"]:
    """The uniform Catmull-Rom spline at ``time``: knot i at time i; an open end repeats its last knot's tangent."""
    count = len(knots)
    first = int(np.floor(time)) if closed else min(int(np.floor(time)), count - 2)
    u = time - first
    before, start, end, after = (neighbour(knots, first + step, closed) for step in (-1, 0, 1, 2))
    if closed and end[3:7] @ start[3:7] < 0:  # around the loop the sign may come back reversed
        end, after = flipped(end), flipped(after)
    if closed and before[3:7] @ start[3:7] < 0:
        before = flipped(before)
    if closed and after[3:7] @ end[3:7] < 0:
        after = flipped(after)
    return 0.5 * (
        2 * start
        + (end - before) * u
        + (2 * before - 5 * start + 4 * end - after) * u**2
        + (3 * start - before - 3 * end + after) * u**3
    )


def neighbour(knots: Float[np.ndarray, "key 8"], index: int, closed: bool) -> Float[np.ndarray, "8"]:
    """Knot ``index``; beyond the ends of an open path, the straight continuation."""
    count = len(knots)
    if closed:
        return knots[index % count]
    if index < 0:
        return 2 * knots[0] - knots[1]
    if index >= count:
        return 2 * knots[-1] - knots[-2]
    return knots[index]


def flipped(values: Float[np.ndarray, "8"]) -> Float[np.ndarray, "8"]:
    """The same knot with its quaternion negated."""
    return np.concatenate([values[:3], -values[3:7], values[7:]])
