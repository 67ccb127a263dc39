"""Shapes and their ray intersections, all in closed form but the height field.

Every primitive lives in a canonical frame where its bounding box is [-1, 1]^3:  x' = R^T (x - center) / half.
Kinds:

* BODY: convex; the box |x'|, |y'|, |z'| <= 1 and the quadric  qa (x'^2 + y'^2) + qb z'^2 + qe z' <= 1. With
  (qa, qb, qe) = (0, 0, 0) it is a box, (1, 1, 0) an ellipsoid, (1, 0, 0) a cylinder, (0.5, 0, 0.5) a
  paraboloid, others between.
* CARVED: a body minus another body (boolean difference of two ray intervals).
* SHEET: the patch  z' = k x'^2 + m y'^2  cut out by an outline map: leaves, petals, grids.
* RELIEF: the solid under a height map, marched in steps and bisected.
* ROOM: a body seen from the inside.

Rays are o + z d in canonical coordinates where d is the direction per unit of *camera depth*, so that the
parameter is depth itself and no conversion follows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from idnerf.data.procedural.atlas import sample_maps

BODY, CARVED, SHEET, RELIEF, ROOM = range(5)

Scalar = Float[Tensor, "ray"]
Vectors = Float[Tensor, "3 ray"]

NEAREST_DEPTH = 1e-3
"""Hits nearer than this (scene units before scaling; cameras keep about 1) do not count."""


@dataclass(frozen=True)
class Primitives:
    """Primitives of a scene, sorted by kind.

    Row 2p of the surface tables is primitive p, row 2p + 1 what is carved from it (only read for CARVED).

    Attributes:
        kind: BODY, CARVED, SHEET, RELIEF or ROOM.
        center, rotation, half: canonical frame; the columns of ``rotation`` are the local axes in the world.
        shape: (qa, qb, qe) of a body; (k, m, outline index) of a sheet; (map index, 0, 0) of a relief.
        material: first material; primitives with ``per_face`` have one for each of the six box faces.
    """

    kind: Int[Tensor, "primitive"]
    center: Float[Tensor, "surface 3"]
    rotation: Float[Tensor, "surface 3 3"]
    half: Float[Tensor, "surface 3"]
    shape: Float[Tensor, "surface 3"]
    material: Int[Tensor, "surface"]
    per_face: Bool[Tensor, "surface"]

    def __len__(self) -> int:
        return len(self.kind)

    def to(self, device: torch.device | str) -> "Primitives":
        return Primitives(
            self.kind.to(device),
            self.center.to(device),
            self.rotation.to(device),
            self.half.to(device),
            self.shape.to(device),
            self.material.to(device),
            self.per_face.to(device),
        )


def body_interval(o: Vectors, d: Vectors, shape: Vectors) -> tuple[Scalar, Scalar]:
    """Where a ray enters and leaves a body; entry > exit when it misses."""
    qa, qb, qe = shape[0], shape[1], shape[2]
    direction = torch.where(d.abs() < 1e-12, 1e-12, d)
    inverse = 1 / direction
    reach = inverse.abs()
    middle = -o * inverse
    enter = (middle - reach).amax(0)
    leave = (middle + reach).amin(0)
    # The quadric along the ray: a z^2 + 2 b z + c <= 0. The tiny a gives a box an endless interval.
    a = (qa * (d[0] * d[0] + d[1] * d[1]) + qb * d[2] * d[2]).clamp_min(1e-20)
    b = qa * (o[0] * d[0] + o[1] * d[1]) + qb * o[2] * d[2] + 0.5 * qe * d[2]
    c = qa * (o[0] * o[0] + o[1] * o[1]) + qb * o[2] * o[2] + qe * o[2] - 1
    discriminant = b * b - a * c
    root = discriminant.clamp_min(0).sqrt()
    enter = torch.maximum(enter, (-b - root) / a)
    leave = torch.minimum(leave, (root - b) / a)
    return torch.where(discriminant < 0, torch.inf, enter), leave


def body_depth(o: Vectors, d: Vectors, shape: Vectors) -> Scalar:
    """Depth of entry into a body from outside, inf on a miss."""
    enter, leave = body_interval(o, d, shape)
    return torch.where(enter < leave, enter, torch.inf)


def room_depth(o: Vectors, d: Vectors, shape: Vectors) -> Scalar:
    """Depth at which a ray from the inside of a body leaves it."""
    return body_interval(o, d, shape)[1]


def carved_depth(
    enter: Scalar, leave: Scalar, cut_enter: Scalar, cut_leave: Scalar
) -> tuple[Scalar, Bool[Tensor, "ray"]]:
    """First surface of A minus B from the ray intervals of A and B.

    Returns the depth (inf on a miss) and whether the surface is B's (the inside of the hollow).
    """
    hollow = (cut_enter < cut_leave) & (enter >= cut_enter) & (enter < cut_leave)
    depth = torch.where(hollow, cut_leave, enter)
    return torch.where((enter < leave) & (depth < leave), depth, torch.inf), hollow


def sheet_depth(
    o: Vectors, d: Vectors, shape: Vectors, nearest: Scalar, outlines: Float[Tensor, "map size size"]
) -> Scalar:
    """Nearest hit of the patch beyond ``nearest`` that lies inside the outline, inf if there is none."""
    k, m, outline = shape[0], shape[1], shape[2].long()
    a = -(k * d[0] * d[0] + m * d[1] * d[1])
    b = d[2] - 2 * (k * o[0] * d[0] + m * o[1] * d[1])
    c = o[2] - k * o[0] * o[0] - m * o[1] * o[1]
    discriminant = b * b - 4 * a * c
    # The root without cancellation: q / a and c / q stay right as the patch becomes flat (a -> 0).
    q = -0.5 * (b + torch.where(b >= 0, 1.0, -1.0) * discriminant.clamp_min(0).sqrt())
    q = torch.where(q.abs() < 1e-20, 1e-20, q)
    first, second = c / q, q / torch.where(a.abs() < 1e-20, 1e-20, a)
    depth = torch.full_like(first, torch.inf)
    for candidate in (first, second):
        x, y = o[0] + candidate * d[0], o[1] + candidate * d[1]
        good = (discriminant >= 0) & (x.abs() < 1) & (y.abs() < 1) & (candidate > nearest)
        index = good.nonzero()[:, 0]
        inside = sample_maps(outlines, outline[index], 0.5 * x[index] + 0.5, 0.5 * y[index] + 0.5) > 0
        index = index[inside]
        depth[index] = torch.minimum(depth[index], candidate[index])
    return depth


def relief_depth(
    o: Vectors,
    d: Vectors,
    shape: Vectors,
    nearest: Scalar,
    farthest: Scalar,
    reliefs: Float[Tensor, "map size size"],
    steps: int = 16,
) -> Scalar:
    """First crossing of the height field inside its box: even steps, then bisection of the bracketing step.

    ``farthest``: depth of what is already known to hide the rest of the ray; hits beyond need not be found.
    """
    enter, leave = body_interval(o, d, torch.zeros_like(shape))
    enter, leave = torch.maximum(enter, nearest), torch.minimum(leave, farthest)
    depth = torch.full_like(enter, torch.inf)
    index = (enter < leave).nonzero()[:, 0]
    low = enter[index]
    stride = (leave[index] - low) / steps
    # Rays in texels of the map: column, row, height, each linear in depth.
    size = reliefs.shape[-1]
    rays = torch.cat([o[:, index], d[:, index]])
    rays[:2] = (0.5 * rays[:2] + 0.5) * size - 0.5
    rays[3:5] *= 0.5 * size
    base = (shape[0, index] * (size * size)).to(torch.int32)
    heights = 2 * reliefs.reshape(-1) - 1

    def clearance(rays: Float[Tensor, "6 some"], base: Int[Tensor, "some"], z: Scalar) -> Scalar:
        x = (rays[0] + z * rays[3]).clamp(0, size - 1.001)
        y = (rays[1] + z * rays[4]).clamp(0, size - 1.001)
        column, row = x.to(torch.int32), y.to(torch.int32)
        fx, fy = x - column, y - row
        at = base + row * size + column
        upper = torch.lerp(heights.index_select(0, at), heights.index_select(0, at + 1), fx)
        at = at + size
        lower = torch.lerp(heights.index_select(0, at), heights.index_select(0, at + 1), fx)
        return rays[2] + z * rays[5] - torch.lerp(upper, lower, fy)

    # Rays that start below the surface enter through a side of the solid: they hit where they enter.
    below = clearance(rays, base, low) <= 0
    depth[index[below]] = low[below]
    number = (~below).nonzero()[:, 0]
    marching, ground, z, step = rays[:, number], base[number], low[number], stride[number]
    hit_number, hit_low = [], []
    done = torch.zeros_like(number, dtype=torch.bool)
    for _ in range(steps):
        beyond = z + step
        hit = (clearance(marching, ground, beyond) <= 0) & ~done
        found = hit.nonzero()[:, 0]
        hit_number.append(number[found])
        hit_low.append(z[found])
        done, z = done | hit, beyond
        if 4 * int(done.sum()) > len(done):
            keep = (~done).nonzero()[:, 0]
            marching, ground, z, step = marching[:, keep], ground[keep], z[keep], step[keep]
            number, done = number[keep], done[keep]
    number, near = torch.cat(hit_number), torch.cat(hit_low)
    rays, base, far = rays[:, number], base[number], near + stride[number]
    for _ in range(6):
        middle = 0.5 * (near + far)
        above = clearance(rays, base, middle) > 0
        near, far = torch.where(above, middle, near), torch.where(above, far, middle)
    # One secant step: the map is bilinear, all but linear in so short a bracket.
    rise, fall = clearance(rays, base, near), clearance(rays, base, far)
    depth[index[number]] = near + (rise / (rise - fall).clamp_min(1e-12)).clamp(0, 1) * (far - near)
    return depth


def length(vectors: Float[Tensor, "3 point"]) -> Float[Tensor, "point"]:
    """Euclidean length; torch's norm over a leading axis of three is many times slower."""
    x, y, z = vectors.unbind(0)
    return torch.sqrt(x * x + y * y + z * z)


def unit(vectors: Float[Tensor, "3 point"]) -> Float[Tensor, "3 point"]:
    """Vectors scaled to unit length."""
    return vectors / length(vectors).clamp_min(1e-12)


def dominant_axis(vectors: Float[Tensor, "3 point"]) -> Int[Tensor, "point"]:
    """Index of the component of largest magnitude."""
    x, y, z = vectors.abs().unbind(0)
    return torch.where(z > torch.maximum(x, y), 2, (y > x).long())


def surface_gradient(
    primitives: Primitives,
    kind: Int[Tensor, "point"],
    shape: Vectors,
    p: Vectors,
    reliefs: Float[Tensor, "map size size"],
) -> tuple[Vectors, Int[Tensor, "point"]]:
    """Gradient of the surface's implicit function in canonical coordinates, and the box face (0 to 5) or 0.

    Args:
        kind, shape, p: of the surface each point lies on; ``p`` canonical, on the surface up to rounding.
    """
    a, b, c = shape[0], shape[1], shape[2]
    magnitude = p.abs()
    axis = dominant_axis(p)
    slab = torch.maximum(torch.maximum(magnitude[0], magnitude[1]), magnitude[2])
    quadric = a * (p[0] * p[0] + p[1] * p[1]) + b * p[2] * p[2] + c * p[2]
    on_slab = slab >= quadric - 1e-5
    onehot = torch.zeros_like(p).scatter_(0, axis[None], p.gather(0, axis[None]).sign())
    gradient = torch.where(on_slab, onehot, torch.stack([2 * a * p[0], 2 * a * p[1], 2 * b * p[2] + c]))
    face = torch.where(on_slab, 2 * axis + (p.gather(0, axis[None])[0] > 0), 0)
    sheet = (kind == SHEET).nonzero()[:, 0]
    if len(sheet):
        x, y = p[0, sheet], p[1, sheet]
        gradient[:, sheet] = torch.stack([-2 * a[sheet] * x, -2 * b[sheet] * y, torch.ones_like(x)])
        face[sheet] = 0
    relief = (kind == RELIEF).nonzero()[:, 0]
    if len(relief):
        u, v, which = 0.5 * p[0, relief] + 0.5, 0.5 * p[1, relief] + 0.5, a[relief].long()
        delta = 1.0 / reliefs.shape[-1]
        du = sample_maps(reliefs, which, u + delta, v) - sample_maps(reliefs, which, u - delta, v)
        dv = sample_maps(reliefs, which, u, v + delta) - sample_maps(reliefs, which, u, v - delta)
        # z' = 2 h - 1 and x' = 2 u - 1: the factors of two cancel in the slope.
        top = torch.stack([-du / (2 * delta), -dv / (2 * delta), torch.ones_like(du)])
        side = torch.maximum(magnitude[0, relief], magnitude[1, relief]) > 1 - 1e-4
        gradient[:, relief] = torch.where(side, onehot[:, relief], top)
        face[relief] = 0
    return gradient, face
