"""Where a training's numbers go: TensorBoard, a line of JSON per entry, and a progress bar on a terminal."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from idnerf.training.losses import psnr_of_mse


class Window:
    """Means of the steps since the last log entry."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.since, self.steps, self.rays = time.time(), 0, 0
        self.sums: dict[str, float] = {}
        self.mse = self.last_mse = self.last_loss = 0.0

    def add(self, terms: dict[str, Tensor], mse: Tensor, rays: int) -> None:
        """One step's loss terms, mean squared colour error and number of target rays."""
        values = {name: value.item() for name, value in terms.items()}
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.last_loss, self.last_mse = sum(values.values()), float(mse)
        self.mse += self.last_mse
        self.steps += 1
        self.rays += rays

    def status(self) -> str:
        """The last step, for the progress bar."""
        rate = self.rays / max(time.time() - self.since, 1e-6)
        return f"loss {self.last_loss:.4f}  PSNR {psnr_of_mse(self.last_mse):.1f} dB  {rate:,.0f} rays/s"

    def take(self) -> dict[str, float]:
        """Mean loss, its terms, PSNR of the mean squared error, rays per second; then start anew."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        values = {
            "loss": sum(means.values()),
            **means,
            "psnr": psnr_of_mse(self.mse / self.steps),
            "rays_per_second": self.rays / max(time.time() - self.since, 1e-6),
        }
        self._start()
        return values


RISE = 1.6
"""A mean loss this many times the lowest one is no noise: the weights are being undone."""
RISE_STEPS = 100
"""Steps that such a mean is taken over, at least: over ten, single scenes are 1.6 times as hard as others."""


class LossWatch:
    """Notices a loss that rises again, as after a step that was too large: it may take thousands of steps back.

    It is to be told the loss without score distillation: that term rises by itself with its weight and its timesteps.

    Attributes:
        latest, lowest: mean losses over ``RISE_STEPS`` steps or more.
        calm: whether all steps told so far are judged, and the last ones are not of a rise.
    """

    def __init__(self) -> None:
        self.latest = self.lowest = float("inf")
        self.risen, self.calm = False, False
        self._sum = self._steps = 0.0

    def remembered(self) -> dict[str, Any]:
        """What a resumed training must know of the steps before, as JSON values."""
        return {"lowest": self.lowest if math.isfinite(self.lowest) else None, "risen": self.risen}

    def recall(self, remembered: Mapping[str, Any]) -> None:
        """Go on from what was ``remembered``."""
        self.lowest = float("inf") if remembered["lowest"] is None else remembered["lowest"]
        self.risen = remembered["risen"]

    def rises(self, loss: float, steps: int) -> bool:
        """Whether the rise began with these ``steps``, of this mean loss."""
        self._sum, self._steps = self._sum + loss * steps, self._steps + steps
        if self._steps < RISE_STEPS:
            self.calm = False
            return False
        self.latest = self._sum / self._steps
        self._sum = self._steps = 0.0
        self.lowest, before = min(self.lowest, self.latest), self.risen
        self.risen = self.latest > RISE * abs(self.lowest)
        self.calm = not self.risen
        return self.risen and not before


class RunLog:
    """Numbers, pictures and progress of one run; silent for every process but the first."""

    def __init__(self, folder: Path, steps: int, start: int, *, active: bool = True):
        self.active, self.folder = active, folder
        self.terminal = sys.stderr.isatty()
        self.start_time, self.start_cpu = time.time(), time.process_time()
        if not active:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self.terminal,
        )
        self.task = self.progress.add_task("training", total=steps, completed=start, status="")
        self.progress.start()

    def advance(self, step: int, status: str) -> None:
        if self.active:
            self.progress.update(self.task, completed=step, status=status)

    def numbers(self, step: int, values: dict[str, float], kind: str) -> None:
        """Log numbers with wall and processor time since the start (seconds)."""
        if not self.active:
            return
        for name, value in values.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step)
        entry: dict[str, Any] = {"step": step, "kind": kind, **{k: round(v, 6) for k, v in values.items()}}
        entry["wall"] = round(time.time() - self.start_time, 1)
        entry["cpu"] = round(time.process_time() - self.start_cpu, 1)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if not self.terminal:
            print(json.dumps(entry), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """One line for whoever watches."""
        if self.active:
            self.progress.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def picture(self, step: int, name: str, image: Tensor) -> None:
        """Log a picture (3 height width, in [0, 1])."""
        if self.active:
            self.writer.add_image(name, image.clamp(0, 1), step)

    def close(self) -> None:
        if self.active:
            self.progress.stop()
            self.writer.close()
