"""idnerf: two or three posed photos in; novel views, depth and video out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see of the lazy names below
    from idnerf.arrays import render as render
    from idnerf.data.load import demo_folder as demo_folder
    from idnerf.data.load import load_scene as load_scene
    from idnerf.data.scene import Scene as Scene
    from idnerf.errors import InputError as InputError
    from idnerf.models.idnerf import IDNeRF as IDNeRF
    from idnerf.types import Cameras as Cameras
    from idnerf.types import RenderOutput as RenderOutput
    from idnerf.types import Views as Views

__version__ = "0.1.0"

# Names of the public API and the modules they live in: loaded on first use, so that ``import idnerf`` stays
# fast.
_LAZY = {
    "Cameras": "idnerf.types",
    "IDNeRF": "idnerf.models.idnerf",
    "InputError": "idnerf.errors",
    "RenderOutput": "idnerf.types",
    "Scene": "idnerf.data.scene",
    "Views": "idnerf.types",
    "demo_folder": "idnerf.data.load",
    "load_scene": "idnerf.data.load",
    "render": "idnerf.arrays",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'idnerf' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
