"""Renders what browsers ask for: one model, one scene, encoded source views kept for the next picture."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from idnerf.data.scene import Scene
from idnerf.geometry.cameras import shifted_range
from idnerf.models.idnerf import IDNeRF
from idnerf.types import Cameras
from idnerf.viewer.picture import Picture
from idnerf.viewer.render_queue import Level
from idnerf.viewer.sources import support
from idnerf.viewer.view_point import ViewPoint

SIDES = (160, 240, 320, 480, 640, 800, 960)
"""Longer sides, in pixels, that pictures and encoded photos come in."""

COARSE_SOURCE_SIDE = 240
"""Photos for coarse pictures: small ones are encoded at once when the sources change."""

COARSE_SECONDS, FULL_SECONDS = 0.4, 4.0
"""What a coarse and, at resolution `auto`, a full picture should take at most."""

COARSE_SIDES = range(96, 481, 16)

ENCODED_PIXELS_KEPT = 12_000_000
"""Photo pixels, after enlarging, whose features stay in memory, 90 bytes each; those of the last sources always do."""


@dataclass(frozen=True)
class ViewRequest:
    """What a browser wants to see.

    Attributes:
        view: where from.
        sources: indices of the views to render from.
        full_side: longer side of a full picture in pixels; None lets the measured speed decide.
    """

    view: ViewPoint
    sources: tuple[int, ...]
    full_side: int | None = None


class SceneRenderer:
    """``render`` may be called from several threads."""

    def __init__(self, model: IDNeRF, scene: Scene):
        self.model, self.scene = model, scene
        self.speed = Speed()
        self._features: OrderedDict[tuple[tuple[int, ...], tuple[int, int], bool], Any] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._hooks = [module.register_forward_pre_hook(self._before_layer) for module in model.modules()]

    def close(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def render(self, request: ViewRequest, level: Level, checkpoint: Callable[[], None]) -> Picture:
        """Render one picture; ``checkpoint`` is called before every layer of the network and may raise."""
        start = time.monotonic()
        with self._checking(checkpoint), torch.inference_mode():
            side = self.side(request, level)
            size = request.view.size(side)
            coarse = level is Level.COARSE
            features, cameras = self.encode(request.sources, COARSE_SOURCE_SIDE if coarse else side, enlarge=not coarse)
            near, far = shifted_range(cameras, torch.from_numpy(request.view.c2w).float())
            camera = request.view.camera(size, float(near), float(far))
            quality = "fast" if coarse else "full"
            rendering = time.monotonic()
            waited = self._thread.waited
            output = self.model.render_target(features, camera[None].to(self.model.device), quality=quality)
            output = output.map(lambda x: x[0].float().cpu())
            seconds = time.monotonic() - rendering - (self._thread.waited - waited)
            self.speed.record(quality, size[0] * size[1], seconds)
            known = support(camera, output.depth, cameras)
        return Picture(output, camera, known, request.sources, level is not Level.COARSE, time.monotonic() - start)

    def side(self, request: ViewRequest, level: Level) -> int:
        """Longer side of the picture in pixels."""
        shape = request.view.size(1000)
        pixels_of_square = shape[0] * shape[1] / 1e6
        if level is Level.COARSE:
            return self.speed.side("fast", COARSE_SECONDS, pixels_of_square, tuple(COARSE_SIDES))
        if request.full_side is not None:
            return request.full_side
        largest = max(self.scene.cameras.size)
        sides = tuple(side for side in SIDES if side <= largest) or (largest,)
        return self.speed.side("full", FULL_SECONDS, pixels_of_square, sides)

    def encode(self, sources: tuple[int, ...], side: int, *, enlarge: bool) -> tuple[Any, Cameras]:
        """Features and cameras (on the CPU) of source views, their longer side at least ``side`` if they have it.

        ``enlarge``: see ``IDNeRF.encode``.
        """
        largest = max(self.scene.cameras.size)
        side = min([s for s in SIDES if s >= side and s < largest], default=largest)
        share = side / largest
        size = (max(16, round(self.scene.cameras.width * share)), max(16, round(self.scene.cameras.height * share)))
        scene = self.scene.resized(size)
        key = (sources, size, enlarge)
        with self._lock:
            known = self._features.get(key)
            if known is not None:
                self._features.move_to_end(key)
        if known is None:
            views = scene.views(list(sources)).to(self.model.device)[None]
            known = self.model.encode(views, enlarge=enlarge)
            with self._lock:
                self._features[key] = known
                kept = sum(map(encoded_pixels, self._features.values()))
                for other in [other for other in self._features if other[0] != sources]:
                    if kept > ENCODED_PIXELS_KEPT:
                        kept -= encoded_pixels(self._features.pop(other))
        return known, scene.cameras[list(sources)]

    @contextmanager
    def _checking(self, checkpoint: Callable[[], None]) -> Iterator[None]:
        self._thread.checkpoint, self._thread.waited = checkpoint, 0.0
        try:
            yield
        finally:
            self._thread.checkpoint = None

    def _before_layer(self, _module: Any, _inputs: Any) -> None:
        """A layer is short: between two of them a picture that nobody wants any more can be given up."""
        checkpoint = getattr(self._thread, "checkpoint", None)
        if checkpoint is not None:
            before = time.monotonic()
            checkpoint()
            self._thread.waited += time.monotonic() - before


def encoded_pixels(features: Any) -> int:
    """Photo pixels that features were made of."""
    cameras = features.cameras
    return cameras.near.numel() * cameras.width * cameras.height


class Speed:
    """Seconds per pixel, as measured, and the resolution that a time allows."""

    def __init__(self) -> None:
        self._seconds_per_pixel: dict[str, float] = {}
        self._sides: dict[tuple[str, tuple[int, ...]], int] = {}
        self._lock = threading.Lock()

    def record(self, quality: str, pixels: int, seconds: float) -> None:
        """Take in one rendering (a running mean: half of it is the last one)."""
        with self._lock:
            now = seconds / pixels
            self._seconds_per_pixel[quality] = 0.5 * (self._seconds_per_pixel.get(quality, now) + now)

    def seconds_per_pixel(self, quality: str) -> float:
        """Measured; before the first full picture twice the fast one's, before any a guess for one CPU core."""
        fast = self._seconds_per_pixel.get("fast", 3e-5)
        return self._seconds_per_pixel.get(quality, 2 * fast if quality == "full" else fast)

    def side(self, quality: str, budget: float, pixels_of_square: float, sides: tuple[int, ...]) -> int:
        """The largest of ``sides`` (ascending) whose picture takes at most ``budget`` seconds.

        The last choice stays while it takes between 0.4 and 1.5 of the budget: pictures should not change their size
        with every breath of the machine.

        Args:
            pixels_of_square: pixels of a picture as a share of (longer side) squared.
        """
        with self._lock:
            cost = self.seconds_per_pixel(quality) * pixels_of_square
            last = self._sides.get((quality, sides))
            if last is not None and 0.4 * budget <= cost * last * last <= 1.5 * budget:
                return last
            chosen = max((s for s in sides if cost * s * s <= budget), default=sides[0])
            self._sides[(quality, sides)] = chosen
            return chosen
