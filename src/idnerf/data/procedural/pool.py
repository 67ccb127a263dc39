"""A pool of scenes on disk for training: one small file each (``idnerf.training.procedural_scenes`` fills it)."""

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from idnerf.data.procedural.config import ProceduralScene
from idnerf.errors import InputError
from idnerf.types import Cameras, Views

PACKED = ("images", "inverse_depth", "c2w", "K", "near", "far")
"""Tensors of a packed scene."""


def pack_scene(scene: ProceduralScene, path: Path) -> None:
    """Write a scene as one safetensors file: images in 8 bits, near / z in half precision (0.05 %).

    The file appears complete or not at all.

    Raises:
        InputError: the place cannot be written.
    """
    path = Path(path)
    cameras = scene.views.cameras
    tensors = {
        "images": (scene.views.images.clamp(0, 1) * 255).round().to(torch.uint8),
        "inverse_depth": (cameras.near[:, None, None] / scene.depth).to(torch.float16),
        "c2w": cameras.c2w,
        "K": cameras.K,
        "near": cameras.near,
        "far": cameras.far,
    }
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        os.close(handle)
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary, metadata={"name": scene.name})
        os.chmod(temporary, 0o644)  # mkstemp makes private files
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot write the packed scene {path}: {reason}; choose another place") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def unpack_scene(path: Path) -> ProceduralScene:
    """Read a scene that ``pack_scene`` wrote.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: expected a packed procedural scene, found no file; fill the pool first")
    try:
        with safe_open(str(path), framework="pt") as file:
            name = (file.metadata() or {})["name"]
            values = {key: file.get_tensor(key) for key in PACKED}
    except (SafetensorError, OSError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{path} is no packed scene, or a damaged one ({reason}); delete it: it is made again"
        ) from None
    images = values["images"].float() / 255
    cameras = Cameras(values["c2w"], values["K"], (images.shape[-1], images.shape[-2]), values["near"], values["far"])
    depth = values["near"][:, None, None] / values["inverse_depth"].float()
    return ProceduralScene(Views(images, cameras), depth, name)


def scene_path(folder: Path, seed: int) -> Path:
    """Where the pool keeps the scene of a seed."""
    return Path(folder) / f"{seed:08d}.safetensors"
