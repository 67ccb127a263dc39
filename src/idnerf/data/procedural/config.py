"""What to generate, and what comes out."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from idnerf.errors import InputError
from idnerf.types import Views


@dataclass(frozen=True)
class ProceduralConfig:
    """Options of the procedural scene generator."""

    size: tuple[int, int] = (256, 192)
    """Image size (width, height) in pixels."""
    num_views: int = 6
    """Views per scene; any 2 to 5 of them make sensible sources for another one."""
    rig: Literal["mixed", "forward", "inward"] = "mixed"
    """Camera rig: forward-facing (LLFF), inward-facing (DTU, Blender), or one of the two drawn per scene."""
    complexity: tuple[float, float] = (0.0, 1.0)
    """Range in [0, 1] that a scene's complexity is drawn from: primitives, concavity, clutter, texture."""
    supersample: int = 2
    """Colour at edges is the mean of supersample^2 rays per pixel (depth is always the pixel centre's)."""
    interiors: float = 0.0
    """Share of scenes that are rooms of furniture and appliances: large even faces, on which little can be matched.
    A pool keeps the scenes that it was filled with, whatever this says."""
    photo: float = 1.0
    """Strength of photographic effects (exposure, white balance, blur, noise); 0 gives clean renderings."""

    def __post_init__(self) -> None:
        width, height = self.size
        low, high = self.complexity
        if width < 8 or height < 8:
            raise InputError(f"size: expected at least 8x8 pixels, got {width}x{height}; enlarge it")
        if self.num_views < 2:
            raise InputError(f"num-views: expected 2 or more, got {self.num_views}; raise it")
        if self.rig not in ("mixed", "forward", "inward"):
            raise InputError(f"rig: expected mixed, forward or inward, got {self.rig!r}; choose one of these")
        if not 0 <= low <= high <= 1:
            raise InputError(f"complexity: expected 0 <= low <= high <= 1, got {low}, {high}; change the range")
        if not 1 <= self.supersample <= 8:
            raise InputError(f"supersample: expected 1 to 8, got {self.supersample}; change it")
        if not 0 <= self.interiors <= 1:
            raise InputError(f"interiors: expected a share in [0, 1], got {self.interiors}; change it")
        if not 0 <= self.photo <= 4:
            raise InputError(f"photo: expected a strength in [0, 4], got {self.photo}; change it")


@dataclass(frozen=True)
class ProceduralScene:
    """A rendered scene.

    Attributes:
        views: [view] images in [0, 1] with their cameras.
        depth: exact depth (z) at the pixel centres, scene units.
        name: such as ``procedural-forward-000123``; the number is the seed.
    """

    views: Views
    depth: Float[Tensor, "view height width"]
    name: str
