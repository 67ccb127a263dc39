"""Shapes and their ray intersections, all in closed form but the height field.

Every primitive lives in a canonical frame where its bounding box is [-1, 1]^3:  x' = R^T (x - center) / half.
Kinds:

* BODY: convex; the box |x'|, |y'|, |z'| <= 1 and the quadric  qa (x'^2 + y'^2) + qb z'^2 + qe z' <= 1. With (qa, qb, qe)
  = (0, 0, 0) it is a box, (1, 1, 0) an ellipsoid, (1, 0, 0) a cylinder, (0.5, 0, 0.5) a paraboloid, others between.
* CARVED: a body minus another body (boolean difference of two ray intervals).
* SHEET: the patch  z' = k x'^2 + m y'^2  cut out by an outline map: leaves, petals, grids.
* RELIEF: the solid under a height map, marched in steps and bisected.
* ROOM: a body seen from the inside.

Rays are o + z d in canonical coordinates where d is the direction per unit of *camera depth*, so that the parameter is
depth itself and no conversion follows.
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
    """Primitives of a scene, sorted by kind. Row 2p of the surface tables is primitive p, row 2p + 1 what is carved
    from it (only read for CARVED).

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
    # The quadric along the ray: a z^2 + 2 b z + c <= 0. A tiny a makes the box (qa = qb = 0) an endless interval.
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
    reliefs: Float[Tensor, "map size size"],
    steps: int = 24,
) -> Scalar:
    """First crossing of the height field inside its box: even steps, then bisection of the bracketing step."""
    enter, leave = body_interval(o, d, torch.zeros_like(shape))
    enter = torch.maximum(enter, nearest)
    depth = torch.full_like(enter, torch.inf)
    index = (enter < leave).nonzero()[:, 0]
    if not len(index):
        return depth
    o, d, start = o[:, index], d[:, index], enter[index]
    which, stride = shape[0, index].long(), (leave[index] - enter[index]) / steps

    def above(z: Scalar, rays: Int[Tensor, "some"]) -> Bool[Tensor, "some"]:
        point = o[:, rays] + z * d[:, rays]
        return (
            point[2] > 2 * sample_maps(reliefs, which[rays], 0.5 * point[0] + 0.5, 0.5 * point[1] + 0.5) - 1
        )

    active = torch.arange(len(index), device=o.device)
    low, high = torch.full_like(start, torch.inf), start.clone()
    sides = ~above(start, active)
    low[sides] = start[sides]
    active = active[~sides]
    for i in range(1, steps + 1):
        z = start[active] + i * stride[active]
        hit = ~above(z, active)
        rays = active[hit]
        low[rays], high[rays] = z[hit] - stride[rays], z[hit]
        active = active[~hit]
    rays = (low < high).nonzero()[:, 0]
    near, far = low[rays], high[rays]
    for _ in range(10):
        middle = 0.5 * (near + far)
        is_above = above(middle, rays)
        near, far = torch.where(is_above, middle, near), torch.where(is_above, far, middle)
    result = low.clone()
    result[rays] = 0.5 * (near + far)
    depth[index] = result
    return depth


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
    slab, axis = magnitude.max(0)
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
