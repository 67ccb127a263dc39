"""First hits of the rays of one pinhole camera (a view or a light), with no loop over pixels.

Each primitive's bounding box is projected and cut into one span of pixels per image row. All spans of a kind
become one flat list of (primitive, pixel) candidates, intersected together; the nearest of each pixel is a
scatter minimum.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from idnerf.data.procedural.primitives import (
    BODY,
    CARVED,
    NEAREST_DEPTH,
    RELIEF,
    ROOM,
    SHEET,
    Primitives,
    body_depth,
    body_interval,
    carved_depth,
    relief_depth,
    room_depth,
    sheet_depth,
)
from idnerf.geometry.cameras import invert_rigid
from idnerf.geometry.rays import inverse_intrinsics

BOX_CORNERS = [[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)]
BOX_EDGES = [(i, j) for i in range(8) for j in range(i + 1, 8) if (i ^ j) in (1, 2, 4)]


@dataclass(frozen=True)
class Pinhole:
    """One camera: unlike ``Cameras`` it has no depth range, which is not known before rendering."""

    c2w: Float[Tensor, "4 4"]
    K: Float[Tensor, "3 3"]
    size: tuple[int, int]


@dataclass(frozen=True)
class Hits:
    """First hits of some rays.

    Attributes:
        pixel: index of the pixel (row * width + column).
        u, v: image position of the ray, centres at +0.5.
        depth: z in the camera.
        surface: row of the surface tables; rays without hit are left out.
    """

    pixel: Int[Tensor, "hit"]
    u: Float[Tensor, "hit"]
    v: Float[Tensor, "hit"]
    depth: Float[Tensor, "hit"]
    surface: Int[Tensor, "hit"]


@dataclass(frozen=True)
class Candidates:
    """Pixels that one kind of primitive may cover: candidate = (span, pixel), span = (primitive, row)."""

    kind: int
    primitive: Int[Tensor, "span"]
    row: Int[Tensor, "span"]
    span: Int[Tensor, "candidate"]
    column: Int[Tensor, "candidate"]
    pixel: Int[Tensor, "candidate"]


def repeat_ranges(counts: Int[Tensor, "item"]) -> tuple[Int[Tensor, "total"], Int[Tensor, "total"]]:
    """For counts (2, 0, 3): the item of each element (0 0 2 2 2), its place in the item (0 1 0 1 2)."""
    item = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    starts = counts.cumsum(0) - counts
    return item, torch.arange(len(item), device=counts.device) - starts[item]


def covered_rows(
    primitives: Primitives, camera: Pinhole
) -> tuple[Int[Tensor, "span"], Int[Tensor, "span"], Int[Tensor, "span"], Int[Tensor, "span"]]:
    """Spans of pixels that the primitives' bounding boxes cover: (primitive, row, first column, columns)."""
    width, height = camera.size
    device = camera.K.device
    corners = torch.tensor(BOX_CORNERS, device=device)
    half, rotation, center = primitives.half[::2], primitives.rotation[::2], primitives.center[::2]
    world = (corners * half[:, None]) @ rotation.transpose(1, 2) + center[:, None]
    w2c = invert_rigid(camera.c2w)
    points = (world @ w2c[:3, :3].T + w2c[:3, 3]) @ camera.K.T
    z = points[..., 2]
    in_front, behind = (z > NEAREST_DEPTH).all(1), (z <= NEAREST_DEPTH).all(1)
    pixels = points[..., :2] / z.clamp_min(NEAREST_DEPTH)[..., None]
    everywhere = ~in_front | (primitives.kind == ROOM)
    low, high = pixels.amin(1), pixels.amax(1)
    outside = (high[:, 0] <= 0) | (low[:, 0] >= width) | (high[:, 1] <= 0) | (low[:, 1] >= height)
    skip = behind | (outside & ~everywhere)
    first = torch.where(everywhere, 0, low[:, 1].floor().clamp(0, height)).long()
    last = torch.where(everywhere, height, high[:, 1].ceil().clamp(0, height)).long()
    primitive, offset = repeat_ranges(torch.where(skip, 0, last - first))
    row = first[primitive] + offset
    # The box's silhouette within a row band is bounded by its edges cut to the band.
    edges = torch.tensor(BOX_EDGES, device=device)
    start, end = pixels[primitive][:, edges[:, 0]], pixels[primitive][:, edges[:, 1]]
    top = row[:, None].float()
    slope = (end - start)[..., 0] / torch.where((end - start)[..., 1].abs() < 1e-6, 1e-6, (end - start)[..., 1])
    y0, y1 = start[..., 1], end[..., 1]
    touches = (torch.minimum(y0, y1) <= top + 1) & (torch.maximum(y0, y1) >= top)
    steep = (y1 - y0).abs() >= 1e-6
    x0 = torch.where(steep, start[..., 0] + slope * (y0.clamp(top, top + 1) - y0), start[..., 0])
    x1 = torch.where(steep, start[..., 0] + slope * (y1.clamp(top, top + 1) - y0), end[..., 0])
    left = torch.where(touches, torch.minimum(x0, x1), torch.inf).amin(1)
    right = torch.where(touches, torch.maximum(x0, x1), -torch.inf).amax(1)
    whole = everywhere[primitive]
    first_column = torch.where(whole, 0, left.floor().clamp(0, width)).long()
    last_column = torch.where(whole, width, right.ceil().clamp(0, width)).long()
    return primitive, row, first_column, (last_column - first_column).clamp_min(0)


def find_candidates(primitives: Primitives, camera: Pinhole) -> list[Candidates]:
    """All (primitive, pixel) pairs worth intersecting, one list per kind present."""
    primitive, row, first_column, columns = covered_rows(primitives, camera)
    kinds = primitives.kind[primitive]
    result = []
    for kind in (BODY, CARVED, SHEET, ROOM, RELIEF):  # reliefs cost most: they come when all else is known
        chosen = kinds == kind
        if not chosen.any():
            continue
        rows, start = row[chosen], first_column[chosen]
        span, place = repeat_ranges(columns[chosen])
        column = start[span] + place
        pixel = rows[span] * camera.size[0] + column
        result.append(Candidates(kind, primitive[chosen], rows, span, column, pixel))
    return result


def select(candidates: Candidates, keep: Bool[Tensor, "pixel"]) -> Candidates:
    """The candidates at the pixels where ``keep`` holds."""
    index = keep[candidates.pixel].nonzero()[:, 0]
    return Candidates(
        candidates.kind,
        candidates.primitive,
        candidates.row,
        candidates.span[index],
        candidates.column[index],
        candidates.pixel[index],
    )


@dataclass(frozen=True)
class CanonicalFrames:
    """Rays in each surface's canonical frame: o + z (G (u, v, 1)); ``reference`` is a depth near it."""

    origin: Float[Tensor, "surface 3"]
    gain: Float[Tensor, "surface 3 3"]
    reference: Float[Tensor, "surface"]


def canonical_frames(primitives: Primitives, camera: Pinhole) -> CanonicalFrames:
    """One small matrix per primitive turns pixels into canonical directions per unit of depth."""
    to_local = primitives.rotation.transpose(1, 2) / primitives.half[..., None]
    position = camera.c2w[:3, 3]
    offset = primitives.center - position
    return CanonicalFrames(
        origin=(to_local @ -offset[..., None])[..., 0],
        gain=to_local @ (camera.c2w[:3, :3] @ inverse_intrinsics(camera.K)),
        reference=(offset @ camera.c2w[:3, 2]).clamp_min(0.0),
    )


def canonical_rays(
    frames: CanonicalFrames,
    surface: Int[Tensor, "span"],
    candidates: Candidates,
    offset: tuple[float, float],
) -> tuple[Float[Tensor, "3 candidate"], Float[Tensor, "3 candidate"], Float[Tensor, "candidate"]]:
    """Origin moved to the reference depth, direction per unit depth, reference depth.

    Moving the origin next to the primitive keeps the quadratics exact for thin, distant primitives.
    """
    gain = frames.gain[surface]
    v = candidates.row.float() + offset[1]
    base = gain[..., 1] * v[:, None] + gain[..., 2]
    table = torch.cat([base, gain[..., 0], frames.origin[surface], frames.reference[surface, None]], -1)
    values = table.T.contiguous()[:, candidates.span]
    d = values[0:3] + values[3:6] * (candidates.column.float() + offset[0])
    o = values[6:9] + values[9] * d
    return o, d, values[9]


def intersect(
    primitives: Primitives,
    frames: CanonicalFrames,
    candidates: Candidates,
    offset: tuple[float, float],
    outlines: Float[Tensor, "outline size size"],
    reliefs: Float[Tensor, "relief size2 size2"],
    hidden_beyond: Float[Tensor, "pixel"],
) -> tuple[Float[Tensor, "candidate"], Int[Tensor, "candidate"]]:
    """Depth (inf on a miss) and surface of every candidate; hits past ``hidden_beyond`` may be missed."""
    surface = 2 * candidates.primitive
    o, d, reference = canonical_rays(frames, surface, candidates, offset)
    shape = primitives.shape[surface].T.contiguous()[:, candidates.span]
    hit_surface = surface[candidates.span]
    nearest = NEAREST_DEPTH - reference
    if candidates.kind == BODY:
        depth = body_depth(o, d, shape)
    elif candidates.kind == ROOM:
        depth = room_depth(o, d, shape)
    elif candidates.kind == SHEET:
        depth = sheet_depth(o, d, shape, nearest, outlines)
    elif candidates.kind == RELIEF:
        depth = relief_depth(o, d, shape, nearest, hidden_beyond[candidates.pixel] - reference, reliefs)
    else:
        cut_o, cut_d, cut_reference = canonical_rays(frames, surface + 1, candidates, offset)
        cut_shape = primitives.shape[surface + 1].T.contiguous()[:, candidates.span]
        enter, leave = body_interval(o, d, shape)
        cut_enter, cut_leave = body_interval(cut_o, cut_d, cut_shape)
        shift = cut_reference - reference
        depth, hollow = carved_depth(enter, leave, cut_enter + shift, cut_leave + shift)
        hit_surface = hit_surface + hollow.long()
    return torch.where(depth > nearest, depth + reference, torch.inf), hit_surface


def first_hits(
    primitives: Primitives,
    frames: CanonicalFrames,
    candidates: list[Candidates],
    size: tuple[int, int],
    offset: tuple[float, float],
    outlines: Float[Tensor, "outline size size"],
    reliefs: Float[Tensor, "relief size2 size2"],
) -> tuple[Float[Tensor, "pixel"], Int[Tensor, "pixel"]]:
    """Depth (inf without hit) and surface (-1) of the ray at ``offset`` within each pixel."""
    count = size[0] * size[1]
    device = frames.origin.device
    nearest = torch.full((count,), torch.inf, device=device)
    found = []
    for some in candidates:
        depth, surface = intersect(primitives, frames, some, offset, outlines, reliefs, nearest)
        index = (depth < torch.inf).nonzero()[:, 0]
        depth, surface, pixel = depth[index], surface[index], some.pixel[index]
        nearest = nearest.scatter_reduce(0, pixel, depth, "amin")
        found.append((depth, surface, pixel))
    winner = torch.full((count,), -1, dtype=torch.long, device=device)
    for depth, surface, pixel in found:
        index = (depth == nearest[pixel]).nonzero()[:, 0]
        winner[pixel[index]] = surface[index]
    return nearest, winner


def near_edges(
    depth: Float[Tensor, "height width"], surface: Int[Tensor, "height width"]
) -> Bool[Tensor, "height width"]:
    """Pixels that have another surface, or a jump of depth, among their eight neighbours."""
    edge = torch.zeros_like(surface, dtype=torch.bool)
    inverse = 1 / depth
    for axis in (0, 1):
        n = depth.shape[axis]
        a, b = surface.narrow(axis, 0, n - 1), surface.narrow(axis, 1, n - 1)
        p, q = inverse.narrow(axis, 0, n - 1), inverse.narrow(axis, 1, n - 1)
        differs = (a != b) | ((p - q).abs() > 0.05 * torch.maximum(p, q))
        edge.narrow(axis, 0, n - 1).logical_or_(differs)
        edge.narrow(axis, 1, n - 1).logical_or_(differs)
    wide = torch.nn.functional.max_pool2d(edge[None, None].float(), (1, 3), 1, (0, 1))
    return edge | (wide[0, 0] > 0)
