"""Binary glTF 2.0 (.glb) of one coloured mesh (Khronos specification, "GLB File Format")."""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.export.atomic import whole_file
from idnerf.export.mesh import Mesh
from idnerf.geometry.trajectories import mean_camera
from idnerf.types import Cameras

_FLOAT, _UINT, _USHORT = 5126, 5125, 5123
_VERTICES, _TRIANGLES = 34962, 34963


def upright(cameras: Cameras) -> Float[Tensor, "4 4"]:
    """Turn that brings the cameras' mean up to +y and their mean view to -z, as glTF viewers stand.

    The identity where the cameras look in all directions and have no mean view.
    """
    turn = torch.eye(4)
    if float(cameras.c2w[:, :3, 2].mean(0).norm()) > 0.1:
        turn[:3, :3] = torch.diag(torch.tensor([1.0, -1.0, -1.0])) @ mean_camera(cameras).T
    return turn


def write_glb(path: Path, mesh: Mesh, turn: Float[Tensor, "4 4"] | None = None) -> None:
    """Write a mesh with vertex colours, atomically.

    Vertices stay in scene coordinates; ``turn`` (rotation of the whole, see ``upright``) goes into the node. Colours
    become linear light with 16 bits, as the specification asks: a viewer encodes them for display again.

    Raises:
        InputError: the place cannot be written.
    """
    points = mesh.points.cpu().float().numpy().astype("<f4")
    colors = np.full((len(points), 4), 65535, "<u2")
    colors[:, :3] = (linear_light(mesh.colors.cpu().clamp(0, 1)) * 65535).round().int().numpy()
    faces = mesh.faces.cpu().numpy().astype("<u4")
    blocks = [points.tobytes(), colors.tobytes(), faces.tobytes()]  # each a multiple of 4 bytes
    starts = np.cumsum([0, *map(len, blocks)]).tolist()
    node: dict[str, object] = {"mesh": 0}
    if turn is not None:
        node["matrix"] = turn.T.reshape(-1).tolist()  # column by column
    content = {
        "asset": {"version": "2.0", "generator": "idnerf"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [node],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2, "material": 0}]}],
        # photos carry their light already: shown as they are, or dull where a viewer knows no unlit materials
        "extensionsUsed": ["KHR_materials_unlit"],
        "materials": [
            {
                "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0},
                "extensions": {"KHR_materials_unlit": {}},
                "doubleSided": True,
            }
        ],
        "buffers": [{"byteLength": starts[3]}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": starts[i], "byteLength": len(blocks[i]), "target": target}
            for i, target in enumerate((_VERTICES, _VERTICES, _TRIANGLES))
        ],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": _FLOAT,
                "count": len(points),
                "type": "VEC3",
                "min": points.min(0).tolist(),
                "max": points.max(0).tolist(),
            },
            {"bufferView": 1, "componentType": _USHORT, "normalized": True, "count": len(points), "type": "VEC4"},
            {"bufferView": 2, "componentType": _UINT, "count": faces.size, "type": "SCALAR"},
        ],
    }
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)
    binary = b"".join(blocks)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    with whole_file(path) as temporary:
        temporary.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def linear_light(encoded: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """sRGB values to linear light, both in [0, 1] (IEC 61966-2-1)."""
    return torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
