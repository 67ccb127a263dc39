"""Binary little-endian PLY as MeshLab, CloudCompare and Blender read it: float x y z, uchar red green blue."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from idnerf.export.atomic import whole_file

_TYPES = {"<f4": "float", "u1": "uchar"}


def write_ply(
    path: Path,
    points: Float[Tensor, "point 3"],
    colors: Float[Tensor, "point 3"],
    normals: Float[Tensor, "point 3"] | None = None,
    faces: Int64[Tensor, "face 3"] | None = None,
) -> None:
    """Write points (scene units), colours in [0, 1], optional unit normals and triangles, atomically.

    Raises:
        InputError: the place cannot be written.
    """
    columns = [("x y z", "<f4", points.cpu().float().numpy())]
    if normals is not None:
        columns.append(("nx ny nz", "<f4", normals.cpu().float().numpy()))
    columns.append(("red green blue", "u1", (colors.cpu().clamp(0, 1) * 255).round().byte().numpy()))
    fields = [(name, kind) for names, kind, _ in columns for name in names.split()]
    vertices = np.empty(len(points), dtype=fields)
    for names, _, values in columns:
        for axis, name in enumerate(names.split()):
            vertices[name] = values[:, axis]
    header = ["ply", "format binary_little_endian 1.0", "comment idnerf", f"element vertex {len(points)}"]
    header += [f"property {_TYPES[kind]} {name}" for name, kind in fields]
    blocks = [vertices.tobytes()]
    if faces is not None:
        triangles = np.empty(len(faces), dtype=[("count", "u1"), ("corners", "<i4", (3,))])
        triangles["count"], triangles["corners"] = 3, faces.cpu().numpy()
        header += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
        blocks.append(triangles.tobytes())
    with whole_file(path) as temporary:
        temporary.write_bytes(("\n".join([*header, "end_header"]) + "\n").encode("ascii") + b"".join(blocks))
