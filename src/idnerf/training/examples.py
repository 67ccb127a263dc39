"""Training examples as a function of the step: item ``i`` is the same whatever the number of workers or restarts.

A scene provider draws one example (source views, a target view, exact depth where known) from a random generator;
``StepDataset`` seeds that generator by (seed, step, rank), cuts the target tile and stacks the batch.
"""

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from idnerf.data.view_selection import target_bounds
from idnerf.geometry.cameras import crop
from idnerf.types import Batch, Cameras, Views, stack_cameras


@dataclass(frozen=True)
class Example:
    """One scene's part of a batch: whole images; ``depth`` is 0 where unknown, ``seen`` counts sources.

    ``whole`` is the camera that the target was cut from; None where it is whole itself.
    """

    source: Views
    target: Views
    depth: Float[Tensor, "height width"] | None
    seen: Float[Tensor, "height width"] | None
    scene: str
    whole: Cameras | None = None


@dataclass(frozen=True)
class TileBatch(Batch):
    """A batch of tiles, and ``whole``: [batch] the cameras that they were cut from."""

    whole: Cameras

    def to(self, device: torch.device | str) -> "TileBatch":
        moved = super().to(device)
        return TileBatch(moved.source, moved.target, moved.depth, moved.seen, moved.scenes, self.whole.to(device))


@runtime_checkable  # so that the tests can check it
class SceneProvider(Protocol):
    """Where examples come from."""

    def example(self, item: int, num_sources: int, generator: torch.Generator) -> Example:
        """The example of global item number ``item``."""
        ...


def draw_int(low: int, high: int, generator: torch.Generator) -> int:
    """Uniform integer in [low, high], both included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def seeded(*numbers: int) -> torch.Generator:
    """A generator seeded by a tuple of whole numbers, well mixed."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) % 2**63
        state ^= state >> 29
    return torch.Generator().manual_seed(state)


class StepDataset(Dataset[Batch]):
    """Whole batches indexed by training step, for ``DataLoader(batch_size=None, sampler=range(start, steps))``.

    Args:
        provider: draws examples.
        seed: of the run.
        batch_size: scenes per step and process.
        source_views: (fewest, most) source views; one number is drawn per step, the same for all processes.
        tile: (width, height) of the target tile in pixels; None keeps whole images.
        augment: recolour and mirror scenes at random (the same for every view of a scene).
        rank, world: this process among several; their batches together are those of one process with a batch
            ``world`` times as large.
    """

    def __init__(
        self,
        provider: SceneProvider,
        *,
        seed: int,
        batch_size: int,
        source_views: tuple[int, int],
        tile: tuple[int, int] | None,
        augment: bool,
        rank: int = 0,
        world: int = 1,
    ):
        self.provider, self.seed, self.batch_size = provider, seed, batch_size
        self.source_views, self.tile, self.augment = source_views, tile, augment
        self.rank, self.world = rank, world

    def __getitem__(self, step: int) -> Batch:
        num_sources = draw_int(*self.source_views, seeded(self.seed, step))
        first = (step * self.world + self.rank) * self.batch_size
        return stack_examples([self._example(item, num_sources) for item in range(first, first + self.batch_size)])

    def _example(self, item: int, num_sources: int) -> Example:
        generator = seeded(self.seed, item, 1)
        example = self.provider.example(item, num_sources, generator)
        if self.augment:
            example = recolour(example, generator)
            example = mirror(example) if torch.rand((), generator=generator) < 0.5 else example
        return example if self.tile is None else cut_tile(example, self.tile, generator)


def cut_tile(example: Example, size: tuple[int, int], generator: torch.Generator) -> Example:
    """Cut the target (not the sources) to a random window of ``size``, or to the whole image where that is smaller."""
    cameras = example.target.cameras
    width, height = min(size[0], cameras.width), min(size[1], cameras.height)
    left = draw_int(0, cameras.width - width, generator)
    top = draw_int(0, cameras.height - height, generator)
    window = (..., slice(top, top + height), slice(left, left + width))
    return Example(
        example.source,
        Views(example.target.images[window], crop(cameras, left, top, (width, height))),
        None if example.depth is None else example.depth[window],
        None if example.seen is None else example.seen[window],
        example.scene,
        cameras,
    )


def recolour(example: Example, generator: torch.Generator) -> Example:
    """Permute the colour channels and bend the tone curve, alike in every view: cheap variety of palettes."""
    order = torch.randperm(3, generator=generator)
    gamma = torch.exp(torch.randn(3, 1, 1, generator=generator) * 0.15)
    gain = 1 - 0.2 * torch.rand(3, 1, 1, generator=generator)

    def change(images: Tensor) -> Tensor:
        return gain * images[..., order, :, :].clamp_min(1e-4) ** gamma

    return Example(
        Views(change(example.source.images), example.source.cameras),
        Views(change(example.target.images), example.target.cameras),
        example.depth,
        example.seen,
        example.scene,
    )


def mirror(example: Example) -> Example:
    """Left and right exchanged in the scene: images flipped, cameras reflected."""

    def reflected(views: Views) -> Views:
        cameras = views.cameras
        flip = torch.diag(cameras.c2w.new_tensor([-1, 1, 1, 1]))
        K = cameras.K.clone()
        K[..., 0, 2] = cameras.width - K[..., 0, 2]
        K[..., 0, 1] = -K[..., 0, 1]
        return Views(views.images.flip(-1), replace(cameras, c2w=flip @ cameras.c2w @ flip, K=K))

    return Example(
        reflected(example.source),
        reflected(example.target),
        None if example.depth is None else example.depth.flip(-1),
        None if example.seen is None else example.seen.flip(-1),
        example.scene,
    )


def stack_examples(examples: list[Example]) -> Batch:
    """Examples of equal sizes to a batch."""

    def stack(name: str) -> Tensor | None:
        parts = [getattr(example, name) for example in examples]
        return None if any(part is None for part in parts) else torch.stack(parts)

    batch = Batch(
        source=Views(
            torch.stack([e.source.images for e in examples]), stack_cameras([e.source.cameras for e in examples])
        ),
        target=Views(
            torch.stack([e.target.images for e in examples]), stack_cameras([e.target.cameras for e in examples])
        ),
        depth=stack("depth"),
        seen=stack("seen"),
        scenes=tuple(e.scene for e in examples),
    )
    whole = [e.whole for e in examples if e.whole is not None]
    if len(whole) < len(examples):
        return batch
    return TileBatch(batch.source, batch.target, batch.depth, batch.seen, batch.scenes, stack_cameras(whole))


def bounds_from_sources(target: Cameras, source: Cameras) -> Cameras:
    """The target's depth range is what its sources know: smallest near, largest far. No truth leaks in."""
    return target.with_bounds(*target_bounds(source))
