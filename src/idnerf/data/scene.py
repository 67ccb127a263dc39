"""A scene: posed photos of one place, whatever format they came in. Pictures are read when asked for."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from idnerf.data import view_selection
from idnerf.data.photo import PosedPhoto
from idnerf.errors import InputError
from idnerf.geometry.cameras import resize as resize_cameras
from idnerf.processors import decoders
from idnerf.types import Cameras, Views


@dataclass(frozen=True, eq=False)
class Scene:
    """Posed photos with pinhole cameras at one working size. Made by ``idnerf.load_scene``.

    Attributes:
        name: folder name, or the scan for DTU.
        format: "llff", "transforms", "procedural", "blender", "colmap" or "dtu".
        root: the folder it was read from.
        cameras: [view] cameras; K at the working size, lens distortion already undone.
        image_names: file names, one per view.
        view_ids: the numbers protocols use: DTU's camera ids (with gaps), else 0 .. N-1.
        photos: the files behind the views.
        world_offset: what was taken off all positions, to keep their precision far from the origin; a position in the
            file's coordinates is ours plus this.
    """

    name: str
    format: str
    root: Path
    cameras: Cameras
    image_names: tuple[str, ...]
    view_ids: tuple[int, ...]
    photos: tuple[PosedPhoto, ...]
    world_offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __len__(self) -> int:
        return len(self.photos)

    def image(self, index: int) -> Float[Tensor, "3 height width"]:
        """Photo of a view at the working size: undistorted, RGB in [0, 1].

        Raises:
            InputError: the file is damaged or truncated, or there is no such view.
        """
        index = self._checked(index)
        return self.photos[index].read(self.cameras.K[index], self.cameras.size)

    def views(self, indices: Sequence[int]) -> Views:
        """Photos and cameras of several views, decoded in parallel threads."""
        indices = [self._checked(i) for i in indices]
        with ThreadPoolExecutor(decoders(len(indices))) as pool:
            images = list(pool.map(self.image, indices))
        return Views(torch.stack(images), self.cameras[indices])

    def depth(self, index: int) -> Float[Tensor, "height width"] | None:
        """Exact depth (z, scene units, 0 unknown) at the working size by nearest pixel; None where there is
        none."""
        read_depth = self.photos[self._checked(index)].depth
        if read_depth is None:
            return None
        depth = read_depth()
        width, height = self.cameras.size
        rows = ((torch.arange(height) + 0.5) * (depth.shape[0] / height)).long()
        columns = ((torch.arange(width) + 0.5) * (depth.shape[1] / width)).long()
        return depth[rows][:, columns]

    def nearest(self, target: Cameras, n: int = 3, candidates: Sequence[int] | None = None, order: int = 1) -> Views:
        """The ``n`` views nearest to a target camera, nearest first (see ``nearest_indices``)."""
        return self.views(self.nearest_indices(target, n, candidates, order))

    def nearest_indices(
        self, target: Cameras, n: int = 3, candidates: Sequence[int] | None = None, order: int = 1
    ) -> list[int]:
        """Indices of the ``n`` views nearest to a target camera by centre distance, L1 (``order=1``) or L2.

        Views with the target's own pose are left out. Raises ``InputError`` when fewer than ``n`` remain.
        """
        return view_selection.nearest_indices(self.cameras, target, n, candidates, order)

    @staticmethod
    def target_bounds(sources: Cameras) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """near, far of a target from its sources alone: their smallest near, their largest far."""
        return view_selection.target_bounds(sources)

    def resized(self, size: tuple[int, int]) -> "Scene":
        """The same scene at another working size (width, height); fx and fy scale apart. Nothing is
        decoded."""
        if min(size) < 1:
            raise InputError(f"size {size[0]}x{size[1]}: width and height must be at least 1 pixel")
        return replace(self, cameras=resize_cameras(self.cameras, size))

    def select(self, indices: Sequence[int]) -> "Scene":
        """The scene of some of its views, in the order given."""
        indices = [self._checked(i) for i in indices]
        return replace(
            self,
            cameras=self.cameras[indices],
            image_names=tuple(self.image_names[i] for i in indices),
            view_ids=tuple(self.view_ids[i] for i in indices),
            photos=tuple(self.photos[i] for i in indices),
        )

    def index_of(self, view_id: int) -> int:
        """Index of the view with a protocol's number. Raises ``InputError`` when the scene lacks it."""
        if view_id not in self.view_ids:
            raise InputError(f"scene {self.name} has no view {view_id}; it has {_ranges(self.view_ids)}")
        return self.view_ids.index(view_id)

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise InputError(f"view {index} does not exist: scene {self.name} has views 0 to {len(self) - 1}")
        return index % len(self)


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 -> "1-3 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
