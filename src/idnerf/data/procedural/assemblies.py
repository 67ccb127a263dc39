"""Larger objects of many primitives: machines of bricks, shelves, ornament, grass, cables. World y points down."""

import math

import numpy as np

from idnerf.data.procedural.builder import BOX, CYLINDER, ELLIPSOID, SHAPES, SceneBuilder, random_rotation
from idnerf.data.procedural.objects import UP, add_leaf, add_rod, gauss3, some_rotation
from idnerf.data.procedural.textures import hsv_to_rgb


def vivid_paint(builder: SceneBuilder) -> int:
    """Evenly coloured plastic or lacquer: primary colours, black, white, greys."""
    rng = builder.rng
    hue = rng.choice([0.0, 0.03, 0.12, 0.15, 0.35, 0.6, rng.random()])
    vivid = hsv_to_rgb(hue, rng.uniform(0.6, 1.0), rng.uniform(0.4, 0.95))
    grey = [rng.choice([0.04, 0.1, 0.35, 0.55, 0.75, 0.97])] * 3
    red, green, blue = vivid if rng.random() < 0.6 else grey
    return builder.material(paint=(red, green, blue), tiles=1.0)


def add_machine(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A vehicle or device built of plastic bricks: slabs with studs, axles, wheels, frames of beams."""
    rng = builder.rng
    yaw = rng.uniform(0, 2 * math.pi)
    x, z = np.array([math.cos(yaw), 0, math.sin(yaw)]), np.array([-math.sin(yaw), 0, math.cos(yaw)])
    frame, flat = np.stack([x, z, UP], 1), np.stack([x, UP, -z], 1)  # local z up; local z along the axles
    paints = [vivid_paint(builder) for _ in range(rng.randint(3, 5))]

    def place(a: float, b: float, c: float) -> np.ndarray:
        return center + size * (a * x + b * z + c * UP)

    for level in range(rng.randint(1, 3)):
        half = size * np.array([rng.uniform(0.4, 0.9), rng.uniform(0.2, 0.4), rng.uniform(0.06, 0.14)])
        at, top = (rng.gauss(0, 0.15), rng.gauss(0, 0.05)), -0.35 + 0.3 * level + half[2] / size
        paint = rng.choice(paints)
        builder.add_body(place(*at, top - half[2] / size), frame, half, BOX, paint)
        columns, rows = rng.randint(3, 6), rng.randint(2, 3)
        stud = size * rng.uniform(0.035, 0.06)
        for i in range(columns):
            for j in range(rows):
                a = at[0] + half[0] / size * ((2 * i + 1) / columns - 1)
                b = at[1] + half[1] / size * ((2 * j + 1) / rows - 1)
                builder.add_body(place(a, b, top), frame, (stud, stud, 0.6 * stud), CYLINDER, paint)
    tyre, rim = vivid_paint(builder), rng.choice(paints)
    radius, thick = size * rng.uniform(0.14, 0.3), size * rng.uniform(0.05, 0.1)
    for a in (-0.55, 0.55) if rng.random() < 0.7 else (-0.6, 0.0, 0.6):
        for b in (-0.42, 0.42):
            hub = place(a, b, -0.45)
            hole = radius * rng.uniform(0.4, 0.7)
            cut = (hole, hole, 2 * thick)
            builder.add_carved(hub, flat, (radius, radius, thick), CYLINDER, tyre, hub, flat, cut, CYLINDER)
            builder.add_body(hub, flat, (0.3 * radius, 0.3 * radius, 1.2 * thick), CYLINDER, rim)
            builder.add_body(hub, flat, (0.08 * radius, hole, 0.5 * thick), BOX, rim)
    for _ in range(rng.randint(3, 8)):
        start = place(rng.uniform(-0.7, 0.7), rng.choice([-0.3, 0.3]), rng.uniform(-0.2, 0.2))
        tip = start + size * (rng.gauss(0, 0.35) * x + rng.uniform(0.1, 0.7) * UP)
        add_rod(builder, start, tip, size * rng.uniform(0.015, 0.05), rng.choice(paints))


def pale_paint(builder: SceneBuilder) -> int:
    """What furniture and appliances are painted: white, cream, greys, now and then a colour or black."""
    rng = builder.rng
    value = rng.choice([rng.uniform(0.75, 0.97), rng.uniform(0.75, 0.97), rng.uniform(0.25, 0.75), 0.06])
    red, green, blue = hsv_to_rgb(rng.choice([0.08, 0.12, 0.58, rng.random()]), 0.7 * rng.random() ** 3, value)
    return builder.material(paint=(red, green, blue), tiles=1.0)


def add_appliance(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A printer, cupboard, stove or desk: large even faces with thin seams, few handles, a display, a label.

    What can be matched on it lies far apart; between, depth must be inferred.
    """
    rng = builder.rng
    yaw = rng.gauss(0, 0.7)
    x, front = np.array([math.cos(yaw), 0, math.sin(yaw)]), np.array([math.sin(yaw), 0, -math.cos(yaw)])
    rotation = np.stack([x, UP, front], 1)
    paint, dark = pale_paint(builder), builder.material(paint=(0.05, 0.05, 0.06), tiles=1.0)
    doors = paint if rng.random() < 0.7 else pale_paint(builder)
    count, left = rng.randint(1, 3), 0.0
    for _ in range(count):
        half = size * np.array([rng.uniform(0.5, 1.0) / count, rng.uniform(0.45, 1.0), rng.uniform(0.3, 0.7)])
        middle = center + (left + half[0] - 0.6 * size) * x - UP * (size - half[1])
        left += 2 * half[0] + rng.choice([0.0, 0.02 * size])
        builder.add_body(middle, rotation, half, BOX, paint)
        if rng.random() < 0.4:  # a lid or a top of its own
            lid = half * np.array([rng.uniform(0.6, 1.05), 0.1, rng.uniform(0.7, 1.05)])
            builder.add_body(middle + UP * (half[1] + lid[1]), rotation, lid, BOX, rng.choice([paint, doors, dark]))
        columns, rows = rng.choice([1, 1, 2]), rng.randint(1, 4)
        door = np.array([half[0] / columns, half[1] / rows, 0.02 * size]) * np.array([0.97, 0.97, 1.0])
        for i in range(columns):
            for j in range(rows):
                u, v = (2 * i + 1) / columns - 1, (2 * j + 1) / rows - 1
                face = middle + x * half[0] * u + UP * half[1] * v + front * half[2]
                builder.add_body(face, rotation, door, BOX, doors)
                if rng.random() < 0.5:
                    grip = np.array([rng.uniform(0.1, 0.4) * door[0], 0.02 * size, 0.025 * size])
                    where = face + UP * door[1] * rng.uniform(-0.8, 0.8) + front * door[2]
                    builder.add_body(where, rotation, grip, BOX, dark if rng.random() < 0.6 else doors)
        if rng.random() < 0.6:
            family = rng.choice(["glyph", "glyph", "collage", None])
            sign = dark if family is None else builder.material(family, tiles=rng.uniform(0.8, 3) / size)
            where = middle + front * (half[2] + 0.03 * size) + UP * half[1] * rng.uniform(-0.6, 0.8)
            where = where + x * half[0] * rng.uniform(-0.5, 0.5)
            builder.add_body(where, rotation, half * np.array([rng.uniform(0.15, 0.4), 0.12, 0.02]), BOX, sign)


def add_shelf(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """Boards with rows of upright books or boxes, many of them printed."""
    rng = builder.rng
    yaw = rng.gauss(0, 0.4)
    x = np.array([math.cos(yaw), 0, math.sin(yaw)])
    back = np.cross(x, UP)
    rotation = np.stack([x, UP, back], 1)
    board = builder.material("wood" if rng.random() < 0.5 else "plain", tiles=0.5 / size)
    covers = [builder.material("glyph", tiles=rng.uniform(0.5, 1.5) / size) for _ in range(2)]
    covers += [vivid_paint(builder) for _ in range(3)]
    deep = size * rng.uniform(0.15, 0.35)
    for row in range(rng.randint(1, 3)):
        shelf = center + UP * size * (0.65 * row - 0.6)
        builder.add_body(shelf, rotation, (size, 0.03 * size, deep), BOX, board)
        along = -0.92
        while along < 0.85:
            thick, tall = rng.uniform(0.03, 0.12), rng.uniform(0.15, 0.28)
            where = shelf + size * ((along + thick) * x + (tall + 0.03) * UP + rng.gauss(0, 0.02) * back)
            builder.add_body(where, rotation, (thick * size, tall * size, 0.8 * deep), BOX, rng.choice(covers))
            along += 2 * thick + rng.choice([0.0, 0.0, 0.01, rng.uniform(0, 0.4)])


def add_ornament(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """Carved stone: rounded and hollow forms of one material, repeated left and right of an axis, on a slab."""
    rng = builder.rng
    material = builder.material(rng.choice(["noise", "rust", "plain", None]), tiles=rng.uniform(0.4, 1.5) / size)
    slab = size * np.array([rng.uniform(0.6, 1), rng.uniform(0.6, 1), 0.12])
    upright = np.stack([np.array([1.0, 0, 0]), UP, np.array([0, 0, -1.0])], 1)
    builder.add_body(center + np.array([0, 0, 0.2 * size]), upright, slab, BOX, material)
    mirror = np.diag([-1.0, 1.0, 1.0])
    for _ in range(rng.randint(4, 9)):
        offset = size * np.array([rng.uniform(0, 0.9), rng.uniform(-0.9, 0.9), rng.uniform(-0.15, 0.1)])
        half = size * rng.uniform(0.05, 0.3) * np.array([1.0, rng.uniform(0.3, 1), rng.uniform(0.3, 1)])
        rotation, shape = some_rotation(rng), rng.choice([*SHAPES, ELLIPSOID])
        hollow = rng.random() < 0.4
        for side in (np.eye(3), mirror):
            # A mirrored frame stays right-handed when one of its axes is turned about: the shapes are even in x.
            turned = side @ rotation @ (np.eye(3) if side is not mirror else mirror)
            where = center + side @ offset
            if hollow:
                cut = where + turned[:, 2] * half[2] * 0.5
                builder.add_carved(where, turned, half, shape, material, cut, turned, 0.75 * half, shape)
            else:
                builder.add_body(where, turned, half, shape, material)


def add_grass(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A tuft of narrow blades that lean and bend every way."""
    rng = builder.rng
    materials = [builder.material("leaf") for _ in range(2)]
    lean = gauss3(rng, 0.2)
    for _ in range(rng.randint(14, 26)):
        y = UP + lean + gauss3(rng, 0.35)
        y /= np.linalg.norm(y)
        x = np.cross(y, gauss3(rng, 1.0))
        x /= np.linalg.norm(x)
        long = size * rng.uniform(0.4, 0.9)
        base = center - UP * size * 0.7 + gauss3(rng, 0.4 * size) * np.array([1, 0.05, 1])
        bend = (0.0, rng.gauss(0, 0.35))
        rotation = np.stack([x, y, np.cross(x, y)], 1)
        wide = long * rng.uniform(0.03, 0.08)
        builder.add_sheet(base + long * y, rotation, wide, long, bend, "leaf", rng.choice(materials))


def add_cables(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """Thin, nearly parallel lines that cross much of the picture: cables, strings, rails, reeds."""
    rng = builder.rng
    material = builder.material("plain" if rng.random() < 0.7 else None, tiles=0.5 / size)
    along = gauss3(rng, 1.0) * np.array([1.0, 1.0, 0.3])
    along /= np.linalg.norm(along)
    radius, apart = size * rng.uniform(0.006, 0.03), size * rng.uniform(0.1, 0.4)
    spread = rng.choice([0.0, 0.03, 0.15])
    for _ in range(rng.randint(3, 8)):
        middle = center + gauss3(rng, 2 * apart) * np.array([1, 1, 0.5])
        reach = size * rng.uniform(1.5, 4) * (along + gauss3(rng, spread))
        add_rod(builder, middle - reach, middle + reach, radius, material)


def add_crystals(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A dense cluster of small sharp solids: rubble, coral, toys in a heap."""
    rng = builder.rng
    materials = [vivid_paint(builder) if rng.random() < 0.4 else builder.material(tiles=1 / size) for _ in range(3)]
    for _ in range(rng.randint(10, 22)):
        half = size * rng.uniform(0.08, 0.25) * np.array([rng.uniform(0.3, 1) for _ in range(3)])
        where = center + gauss3(rng, 0.35 * size)
        builder.add_body(where, random_rotation(rng), half, rng.choice(SHAPES), rng.choice(materials))


def add_big_leaves(builder: SceneBuilder, center: np.ndarray, size: float) -> None:
    """A few broad leaves or petals close to the camera, overlapping, some half out of the picture."""
    rng = builder.rng
    material = builder.material(rng.choice(["leaf", "leaf", "petal"]))
    for _ in range(rng.randint(3, 7)):
        heading = gauss3(rng, 1.0) * np.array([1.0, 1.0, 0.4])
        base = center + gauss3(rng, 0.4 * size)
        add_leaf(builder, base, heading, size * rng.uniform(0.8, 1.6), rng.choice(["leaf", "leaf", "petal"]), material)
