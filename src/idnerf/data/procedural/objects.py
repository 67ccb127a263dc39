"""Objects made of several primitives: plants, bones, furniture, fences. World y points down."""

import itertools
import math
import random

import numpy as np

from idnerf.data.procedural.builder import (
    BOX,
    CYLINDER,
    ELLIPSOID,
    SHAPES,
    SceneBuilder,
    frame_along,
    random_rotation,
    upright_rotation,
)

UP = np.array([0.0, -1.0, 0.0])


def gauss3(rng: random.Random, sigma: float) -> np.ndarray:
    return np.array([rng.gauss(0, sigma) for _ in range(3)])


def some_rotation(rng: random.Random) -> np.ndarray:
    return upright_rotation(rng) if rng.random() < 0.6 else random_rotation(rng)


def add_solid(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """One convex body."""
    rng = builder.rng
    half = size * np.array([rng.uniform(0.35, 1), rng.uniform(0.35, 1), rng.uniform(0.25, 1)])
    material = builder.material(tiles=rng.uniform(0.2, 1.2) / size)
    builder.add_body(center, some_rotation(rng), half, rng.choice(SHAPES), material)


def add_hollow(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """Bowls, tubes, open boxes, arches, bitten stones: a body minus a body."""
    rng = builder.rng
    rotation = some_rotation(rng)
    half = size * np.array([rng.uniform(0.5, 1), rng.uniform(0.5, 1), rng.uniform(0.4, 1)])
    shape = rng.choice(SHAPES)
    kind = rng.choice(["cup", "tube", "bite", "arch"])
    wall = rng.uniform(0.06, 0.25)
    if kind == "cup":
        cut_half, shift, cut_shape, cut_rotation = (
            half * (1 - wall),
            rotation[:, 2] * half[2] * 2 * wall,
            shape,
            rotation,
        )
    elif kind == "tube":
        cut_half = half * np.array([1 - wall, 1 - wall, 1.5])
        shift, cut_shape, cut_rotation = np.zeros(3), rng.choice([CYLINDER, BOX]), rotation
        shape = rng.choice([CYLINDER, BOX])
    elif kind == "arch":
        cut_half = half * np.array([rng.uniform(0.4, 0.8), 1.5, rng.uniform(0.5, 0.8)])
        shift, cut_shape, cut_rotation = (
            -rotation[:, 2] * half[2] * 0.5,
            rng.choice([BOX, ELLIPSOID]),
            rotation,
        )
    else:
        cut_half = size * np.array([rng.uniform(0.3, 0.7) for _ in range(3)])
        direction = gauss3(rng, 1.0)
        shift = direction / np.linalg.norm(direction) * size * 0.6
        cut_shape, cut_rotation = rng.choice(SHAPES), random_rotation(rng)
    material = builder.material(tiles=rng.uniform(0.2, 1.2) / size)
    builder.add_carved(center, rotation, half, shape, material, center + shift, cut_rotation, cut_half, cut_shape)


def add_relief_object(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A stone or plaque with a carved surface that faces the cameras or the sky."""
    rng = builder.rng
    half = size * np.array([rng.uniform(0.5, 1), rng.uniform(0.5, 1), rng.uniform(0.1, 0.5)])
    if rng.random() < 0.5:
        rotation = frame_along(UP + gauss3(rng, 0.25), rng)
    else:
        rotation = frame_along(np.array([0.0, 0.0, -1.0]) + gauss3(rng, 0.4), rng)
    material = builder.material(tiles=rng.uniform(0.3, 1.0) / size)
    builder.add_relief(center, rotation, half, rng.randrange(3), material)


def add_rod(builder: SceneBuilder, start: np.ndarray, end: np.ndarray, radius: float, material: int) -> None:
    axis = end - start
    length = float(np.linalg.norm(axis))
    half = (radius, radius, 0.5 * length)
    builder.add_body(0.5 * (start + end), frame_along(axis, builder.rng), half, CYLINDER, material)


def curve_points(rng: random.Random, start: np.ndarray, heading: np.ndarray, length: float, count: int, bend: float):
    """A random smooth curve of ``count`` segments."""
    turn = gauss3(rng, bend)
    points, heading = [start], heading / np.linalg.norm(heading)
    for _ in range(count):
        heading = heading + turn / count + gauss3(rng, 0.15 * bend / count)
        heading = heading / np.linalg.norm(heading)
        points.append(points[-1] + heading * length / count)
    return points


def add_curve(
    builder: SceneBuilder, points: list[np.ndarray], radius: float, taper: float, material: int, joints: bool
) -> None:
    """Rods along a curve, thinner towards the end; ``joints`` rounds the bends."""
    for i, (a, b) in enumerate(itertools.pairwise(points)):
        r = radius * (1 - taper * i / len(points))
        add_rod(builder, a, b, r, material)
        if joints:
            builder.add_body(b, np.eye(3), (r, r, r), ELLIPSOID, material)


def add_wire(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    rng = builder.rng
    material = builder.material("plain" if rng.random() < 0.5 else None, tiles=2 / size)
    heading = gauss3(rng, 1.0) * np.array([1, 1, 0.4])
    start = center - heading / np.linalg.norm(heading) * size
    points = curve_points(rng, start, heading, 2.2 * size, rng.randint(1, 5), rng.choice([0.0, 0.6, 1.5]))
    add_curve(builder, points, size * rng.uniform(0.012, 0.06), 0.0, material, joints=False)


def add_leaf(
    builder: SceneBuilder, base: np.ndarray, heading: np.ndarray, length: float, outline: str, material: int
) -> None:
    """A sheet that grows from ``base`` along ``heading``, its upper side towards the sky."""
    rng = builder.rng
    y = heading / np.linalg.norm(heading)
    up = UP + gauss3(rng, 0.5)
    x = np.cross(y, up)
    if np.linalg.norm(x) < 1e-3:
        x = np.cross(y, np.array([1.0, 0.0, 0.3]))
    x /= np.linalg.norm(x)
    rotation = np.stack([x, y, np.cross(x, y)], 1)
    width = length * {"leaf": rng.uniform(0.2, 0.5), "frond": rng.uniform(0.3, 0.6)}.get(outline, rng.uniform(0.3, 0.8))
    bend = (rng.gauss(0, 0.25), rng.gauss(-0.15, 0.25))
    builder.add_sheet(base + 0.5 * length * y, rotation, width * 0.5, length * 0.5, bend, outline, material)


def add_plant(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A few stems with leaves all around; the commonest object of outdoor photos."""
    rng = builder.rng
    leaves = [builder.material("leaf") for _ in range(rng.randint(1, 2))]
    outline = rng.choice(["leaf", "leaf", "leaf", "frond", "palm", "branch"])
    stem = builder.material("wood", tiles=2 / size)
    for _ in range(rng.randint(1, 2)):
        heading = UP + gauss3(rng, 0.4)
        base = center - UP * size * 0.7 + gauss3(rng, 0.15 * size)
        points = curve_points(rng, base, heading, size * rng.uniform(1.0, 1.6), 3, 0.5)
        add_curve(builder, points, size * rng.uniform(0.015, 0.04), 0.6, stem, joints=False)
        for k in range(rng.randint(6, 12)):
            t = rng.uniform(0.3, 3.0)
            anchor = points[int(min(t, 2.99))] * (1 - t % 1) + points[int(min(t, 2.99)) + 1] * (t % 1)
            angle = 2.4 * k + rng.gauss(0, 0.3)
            out = np.array([math.cos(angle), rng.uniform(-0.6, 0.4), math.sin(angle)])
            add_leaf(builder, anchor, out, size * rng.uniform(0.4, 0.9), outline, rng.choice(leaves))


def add_rosette(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """Leaves or fronds that radiate from one point: ferns, grass tufts, agaves."""
    rng = builder.rng
    material = builder.material("leaf")
    outline = rng.choice(["frond", "leaf", "leaf", "branch"])
    axis = UP + gauss3(rng, 0.5) + np.array([0, 0, -0.5 * rng.random()])
    frame = frame_along(axis, rng)
    spread = rng.uniform(0.5, 1.6)
    count = rng.randint(5, 12)
    for k in range(count):
        angle = 2 * math.pi * (k + rng.uniform(-0.3, 0.3)) / count
        heading = frame @ np.array([math.cos(angle) * spread, math.sin(angle) * spread, 0.7 + rng.gauss(0, 0.2)])
        add_leaf(builder, center, heading, size * rng.uniform(0.7, 1.3), outline, material)


def add_flower(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """One or two rings of petals around a heart, on a stem; sometimes several heads in a bunch."""
    rng = builder.rng
    petal, heart = builder.material("petal"), builder.material(tiles=3 / size)
    stem = builder.material("leaf")
    heads = rng.choice([1, 1, 2, 4])
    radius = size / (1 if heads == 1 else 1.6)
    for _ in range(heads):
        middle = center + (gauss3(rng, 0.5 * size) if heads > 1 else 0)
        axis = np.array([0.0, -0.4, -1.0]) + gauss3(rng, 0.5)
        frame = frame_along(axis, rng)
        count, cup = rng.randint(5, 8), rng.uniform(0.1, 1.0)
        for k in range(count):
            angle = 2 * math.pi * k / count + rng.gauss(0, 0.08)
            heading = frame @ np.array([math.cos(angle), math.sin(angle), cup])
            side = frame @ np.array([-math.sin(angle), math.cos(angle), 0])
            y = heading / np.linalg.norm(heading)
            rotation = np.stack([side, y, np.cross(side, y)], 1)
            length = radius * rng.uniform(0.85, 1.1)
            bend = (rng.uniform(-0.1, 0.3), rng.uniform(-0.4, 0.1))
            half_x = length * rng.uniform(0.3, 0.45)
            builder.add_sheet(middle + 0.5 * length * y, rotation, half_x, 0.5 * length, bend, "petal", petal)
        builder.add_body(middle, frame, (0.14 * radius, 0.14 * radius, 0.2 * radius), ELLIPSOID, heart)
        add_rod(builder, middle, center - UP * size * 2 + gauss3(rng, 0.2 * size), 0.03 * size, stem)


def add_skeleton(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A spine with ribs, or a knot of horns: curved tapering tubes of one bony material."""
    rng = builder.rng
    material = builder.material(rng.choice(["rust", "noise", "wood"]), tiles=rng.uniform(0.5, 2) / size)
    spine = gauss3(rng, 1.0) * np.array([1, 0.5, 0.5])
    spine /= np.linalg.norm(spine)
    skull = size * np.array([rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.5), rng.uniform(0.2, 0.5)])
    builder.add_body(center - 0.8 * size * spine, random_rotation(rng), skull, ELLIPSOID, material)
    side = np.cross(spine, UP + gauss3(rng, 0.3))
    side /= np.linalg.norm(side)
    count = rng.randint(2, 6)
    add_rod(builder, center - size * spine, center + size * spine, 0.06 * size, material)
    for k in range(count):
        root = center + spine * size * (2 * (k + 0.5) / count - 1)
        for sign in (-1, 1):
            heading = sign * side + gauss3(rng, 0.1) - 0.3 * UP
            points = curve_points(rng, root, heading, size * rng.uniform(0.7, 1.2), 3, 1e-3)
            droop = [p - UP * size * 0.28 * (i / 3) ** 2 * 2 for i, p in enumerate(points)]
            add_curve(builder, droop, size * rng.uniform(0.03, 0.07), 0.5, material, joints=True)


def add_fence(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A flat sheet with holes (grid, bars) or a real row of posts and rails."""
    rng = builder.rng
    material = builder.material(rng.choice(["plain", "rust", "wood"]), tiles=1 / size)
    yaw = rng.gauss(0, 0.5)
    along = np.array([math.cos(yaw), 0, math.sin(yaw)])
    if rng.random() < 0.5:
        rotation = np.stack([along, UP, np.cross(along, UP)], 1)
        outline = rng.choice(["grid", "bars"])
        builder.add_sheet(center, rotation, size, size * rng.uniform(0.5, 1.2), (0.0, 0.0), outline, material)
        return
    count, height, radius = rng.randint(3, 8), size * rng.uniform(0.5, 1), size * rng.uniform(0.015, 0.05)
    for k in range(count):
        foot = center + along * size * (2 * k / (count - 1) - 1)
        add_rod(builder, foot - UP * height, foot + UP * height, radius, material)
    for level in (0.8, -0.5):
        middle = center + UP * height * level
        add_rod(builder, middle - along * size, middle + along * size, radius * 0.8, material)


def add_stack(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """Boxes or drums piled up, books, steps."""
    rng = builder.rng
    bottom = center - UP * size
    shape = rng.choice([BOX, BOX, CYLINDER])
    for _ in range(rng.randint(2, 5)):
        half = size * np.array([rng.uniform(0.3, 0.8), rng.uniform(0.3, 0.8), rng.uniform(0.08, 0.35)])
        material = builder.material(tiles=rng.uniform(0.3, 1.2) / size)
        where = bottom + UP * half[2] + np.array([rng.gauss(0, 0.08), 0, rng.gauss(0, 0.08)]) * size
        builder.add_body(where, upright_rotation(rng), half, shape, material)
        bottom = bottom + UP * 2 * half[2]


def add_table(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A slab on legs, with things on it."""
    rng = builder.rng
    frame = upright_rotation(rng)
    material = builder.material("wood" if rng.random() < 0.5 else None, tiles=0.6 / size)
    wide, deep, tall = (
        size * rng.uniform(0.7, 1.2),
        size * rng.uniform(0.4, 0.9),
        size * rng.uniform(0.4, 0.9),
    )
    builder.add_body(center, frame, (wide, deep, 0.05 * size), BOX, material)
    for sx in (-0.9, 0.9):
        for sy in (-0.9, 0.9):
            top = center + frame @ np.array([sx * wide, sy * deep, 0])
            add_rod(builder, top, top - UP * tall, 0.04 * size, material)
    for _ in range(rng.randint(1, 3)):
        spot = frame @ np.array([rng.uniform(-0.7, 0.7) * wide, rng.uniform(-0.7, 0.7) * deep, 0])
        small = size * rng.uniform(0.12, 0.3)
        rng.choice([add_solid, add_hollow])(builder, center + spot + UP * (small * 0.7), small)


def add_pebbles(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A loose heap of small bodies."""
    rng = builder.rng
    materials = [builder.material(tiles=2 / size) for _ in range(rng.randint(1, 3))]
    shape = rng.choice(SHAPES)
    for _ in range(rng.randint(4, 10)):
        half = size * rng.uniform(0.1, 0.3) * np.array([rng.uniform(0.5, 1), rng.uniform(0.5, 1), rng.uniform(0.4, 1)])
        where = center + gauss3(rng, 0.45 * size) * np.array([1, 0.5, 1])
        builder.add_body(where, random_rotation(rng), half, shape, rng.choice(materials))


def add_panel(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A thin board: picture, sign, screen, page of text."""
    rng = builder.rng
    facing = np.array([0.0, 0.0, -1.0]) + gauss3(rng, 0.5)
    x = np.cross(UP, facing)
    x /= np.linalg.norm(x)
    z = facing / np.linalg.norm(facing)
    rotation = np.stack([x, np.cross(z, x), z], 1)
    half = (size * rng.uniform(0.5, 1), size * rng.uniform(0.4, 1), 0.02 * size)
    family = rng.choice(["glyph", "collage", "collage", "plain", None])
    builder.add_body(center, rotation, half, BOX, builder.material(family, tiles=rng.uniform(0.4, 0.9) / size))


def add_litter(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """Loose sheets in any pose: fallen leaves, paper, distant foliage."""
    rng = builder.rng
    outline = rng.choice(["leaf", "leaf", "ragged", "palm", "disc", "petal", "square", "frond"])
    family = "leaf" if outline in ("leaf", "palm", "frond") or rng.random() < 0.4 else None
    materials = [builder.material(family, tiles=1.5 / size) for _ in range(rng.randint(1, 2))]
    for _ in range(rng.randint(5, 14)):
        length = size * rng.uniform(0.3, 0.7)
        base = center + gauss3(rng, 0.6 * size)
        heading = gauss3(rng, 1.0)
        add_leaf(builder, base, heading, length, outline, rng.choice(materials))


def add_foliage(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """Large upright cut-outs one behind another: hedges, bushes, tree crowns seen from some way off."""
    rng = builder.rng
    materials = [builder.material("leaf" if rng.random() < 0.6 else None, 1 / size) for _ in range(2)]
    outline = rng.choice(["ragged", "branch", "frond", "palm"])
    for k in range(rng.randint(3, 6)):
        base = center + gauss3(rng, 0.45 * size) + np.array([0.0, 0.6, 0.12 * k]) * size
        heading = UP + gauss3(rng, 0.35)
        add_leaf(builder, base, heading, size * rng.uniform(0.9, 1.6), outline, rng.choice(materials))


def add_column(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A post, trunk or pillar through the whole height of the image."""
    rng = builder.rng
    radius = size * rng.uniform(0.08, 0.35)
    family = rng.choice(["wood", "plain", "rust", "noise", None])
    material = builder.material(family, tiles=rng.uniform(0.3, 0.8) / size)
    lean = UP + gauss3(rng, rng.choice([0.01, 0.01, 0.15]))
    half = (radius, radius * rng.uniform(0.7, 1.3), 5 * size)
    builder.add_body(center, frame_along(lean, rng), half, rng.choice([CYLINDER, CYLINDER, BOX]), material)


def add_beams(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """Long parallel bars, slanted or level: girders, stairs, railings, window frames."""
    rng = builder.rng
    material = builder.material(rng.choice(["plain", "plain", "wood", None]), tiles=0.5 / size)
    along = np.array([1.0, rng.choice([0.0, 0.0, rng.gauss(0, 0.6)]), rng.gauss(0, 0.5)])
    along /= np.linalg.norm(along)
    apart = np.cross(along, np.array([0.0, 0.0, 1.0]))
    apart /= np.linalg.norm(apart)
    rotation = np.stack([apart, np.cross(along, apart), along], 1)
    thick, count, reach = size * rng.uniform(0.02, 0.09), rng.randint(2, 6), size * rng.uniform(1.0, 3.0)
    for k in range(count):
        where = center + apart * size * (2 * k / count - 1)
        builder.add_body(where, rotation, (thick, thick * rng.uniform(0.5, 1.5), reach), BOX, material)


def add_facade(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A block with rows of windows on the side that faces the cameras, and a roof or cornice."""
    rng = builder.rng
    yaw = rng.gauss(0, 0.6)
    x, z = np.array([math.cos(yaw), 0, math.sin(yaw)]), np.array([math.sin(yaw), 0, -math.cos(yaw)])
    rotation = np.stack([x, UP, z], 1)
    half = size * np.array([rng.uniform(0.6, 1.2), rng.uniform(0.6, 1.2), rng.uniform(0.3, 0.8)])
    wall = builder.material(rng.choice(["brick", "brick", "plain", "noise", None]), rng.uniform(0.6, 2) / size)
    pane, frame = builder.material("plain"), builder.material("plain")
    builder.add_body(center, rotation, half, BOX, wall)
    cornice = half * np.array([1.06, 0.05, 1.06])
    builder.add_body(center + UP * half[1], rotation, cornice, BOX, frame)
    columns, rows = rng.randint(2, 4), rng.randint(1, 3)
    window = np.array([0.55 * half[0] / columns, rng.uniform(0.4, 0.7) * half[1] / rows, 0.03 * size])
    for i in range(columns):
        for j in range(rows):
            u, v = (2 * i + 1) / columns - 1, (2 * j + 1) / rows - 1
            where = center + x * half[0] * u * 0.92 + UP * half[1] * v * 0.85 + z * half[2]
            builder.add_body(where, rotation, window, BOX, frame)
            builder.add_body(where, rotation, window * np.array([0.8, 0.85, 1.15]), BOX, pane)
