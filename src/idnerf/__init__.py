"""idnerf: two or three posed photos in; novel views, depth and video out."""

from importlib import import_module
from typing import Any

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
    "load_scene": "idnerf.data.load",
    "render": "idnerf.arrays",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'idnerf' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
