"""One measurement of one system in a process of its own: seconds (medians) and peak memory, printed as JSON.

Started by ``speed.py``, which lists the cases. Every system gets the same photos, cameras and rays.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from idnerf.allocator import keep_freed_memory
from idnerf.commands.options import load_model
from idnerf.compiled.dispatch import SWITCH
from idnerf.config import CASCADE_LOSS, ID_NERF
from idnerf.geometry.cameras import crop
from idnerf.models.cascade import Cascade
from idnerf.models.idnerf import IDNeRF, ModelConfig
from idnerf.models.paper import PaperConfig
from idnerf.models.published import published_name
from idnerf.rendering.frames import made_at_once
from idnerf.training.objectives import LossConfig, objective
from idnerf.training.optimizer import OptimizerConfig, clip_gradients, make_optimizer
from idnerf.types import Batch, Cameras, Views
from published_code import PublishedModel, named_random_weight, published_model, published_poses
from roofline import clock, measure_rates, stage_costs

OURS = ("matchnerf", "idnerf", "cascade full", "cascade fast")
PUBLISHED = ("published matchnerf", "published idnerf")
PUBLISHED_SLICE = 1024
"""Rays at once in the published renderers; theirs are 4096 and 20480, which do not fit into 24 GB here."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        system: one of ``OURS`` or ``PUBLISHED``.
        stage: encode, render (after encoding), train (one step), frames (encode, then a path), roofline, or agreement
            (largest difference of our colours from the published code's).
        size: (width, height) of sources and target.
        rays: of a training step, per scene.
        scenes: of a training step.
        sources: source views.
        frames: of a path.
        precision: of a training step of the `paper` configuration: float32, or bf16, its encoder's.
    """

    system: str
    stage: str
    size: tuple[int, int]
    rays: int = 1024
    scenes: int = 1
    sources: int = 3
    frames: int = 1
    precision: str = "float32"


@dataclass(frozen=True)
class Effort:
    """How much time a case may take.

    Attributes:
        device: cpu or cuda.
        threads: of PyTorch on the CPU.
        processor: count processor time instead of wall time (a shared machine, one thread).
        whole: an image is rendered whole where that takes at most so many seconds.
        part: else so many rows are rendered as fit into so many seconds.
        repeats: the median of so many; one where a run takes more than ``part`` seconds.
    """

    device: str = "cpu"
    threads: int = 1
    processor: bool = False
    whole: float = 600.0
    part: float = 30.0
    repeats: int = 3


def row_of_cameras(count: int, size: tuple[int, int]) -> Cameras:
    """Cameras in a row, a tenth of near apart, looking the same way."""
    c2w = torch.eye(4).repeat(count, 1, 1)
    c2w[:, 0, 3] = torch.arange(count) * 0.1
    K = torch.tensor([[size[0], 0, size[0] / 2], [0, size[0], size[1] / 2], [0, 0, 1.0]]).repeat(count, 1, 1)
    return Cameras(c2w, K, size, torch.full((count,), 1.0), torch.full((count,), 6.0))


def inputs(case: Case, device: str) -> Batch:
    """Photos of noise, one target per scene and its exact depth: a plane."""
    width, height = case.size
    cameras = row_of_cameras(case.sources + 1, case.size)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(case.scenes, case.sources + 1, 3, height, width, generator=generator)
    everywhere = cameras[None].__getitem__([0] * case.scenes)
    batch = Batch(
        Views(images[:, 1:], everywhere[:, 1:]),
        Views(images[:, 0], everywhere[:, 0]),
        depth=torch.full((case.scenes, height, width), 2.0),
        seen=None,
        scenes=("noise",) * case.scenes,
    )
    return batch.to(device)


def our_model(system: str, device: str) -> IDNeRF:
    """MatchNeRF with the published conventions and the published code's random weights, ID-NeRF as the paper's preset
    has it, or the default weights as the commands load them (in bfloat16 where the hardware is fast at it)."""
    if system.startswith("cascade"):
        return load_model("default", torch.device(device))
    torch.manual_seed(0)
    if system == "idnerf":
        return IDNeRF(ID_NERF).to(device)
    paper = PaperConfig(view_aggregation="concatenate", num_views=3, published_behaviour=True)
    model = IDNeRF(ModelConfig(configuration="paper", paper=paper))
    state = model.core.state_dict()
    model.core.load_state_dict({name: named_random_weight(published_name(name), state[name]) for name in state})
    return model.to(device)


class OurSystem:
    """Our configurations behind the calls that are timed."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.model = case, our_model(case.system, device)
        self.quality: Any = "fast" if case.system == "cascade fast" else "full"
        self.batch = inputs(case, device)

    def encode(self) -> Any:
        with torch.inference_mode():
            return self.model.encode(self.batch.source)

    def render(self, features: Any, rows: int, *, fit_range: bool = True) -> Any:
        """The middle ``rows`` of the target."""
        target = self.batch.target.cameras
        band = crop(target, 0, (target.height - rows) // 2, (target.width, rows))
        with torch.inference_mode():
            latent = self.model.infer_latent(features, target)
            core = self.model.core
            half = core.has_half_size_depth(target) if isinstance(core, Cascade) else None
            return self.model.render_target(
                features, band, quality=self.quality, latent=latent, fit_range=fit_range, half_size_depth=half
            )

    def render_path(self) -> None:
        """Encode the sources, then render the target again and again as `idnerf render` does, dropping the pictures."""
        features = self.encode()
        device = self.batch.target.images.device
        target = self.batch.target.cameras
        with torch.inference_mode():
            self.model.fit_path(features, target[[0] * self.case.frames], quality=self.quality)

        def frame(_: int) -> Any:
            return self.render(features, self.case.size[1], fit_range=False).rgb.cpu()

        for _ in made_at_once(self.case.frames, frame, device):
            pass

    def training_step(self) -> Callable[[], None]:
        cascade = self.case.system.startswith("cascade")
        model = self.model.train()
        config = OptimizerConfig()
        optimizer = make_optimizer(model, config)
        generator = torch.Generator(self.batch.source.images.device).manual_seed(0)
        batch = tile_of(self.batch, self.case.rays) if cascade else self.batch
        loss_config = CASCADE_LOSS if cascade else LossConfig()
        fast_share = 1.0 if self.quality == "fast" else 0.0
        halves = "bf16" in (model.precision, self.case.precision)

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(generator.device.type, torch.bfloat16, enabled=halves):
                result = objective(
                    model, batch, loss_config, generator, rays_per_step=self.case.rays, fast_share=fast_share
                )
            result.loss.backward()
            clip_gradients(optimizer, config)
            optimizer.step()

        return step


class PublishedSystem:
    """The published code behind the same calls."""

    def __init__(self, case: Case, device: str, reference: Path) -> None:
        self.case = case
        kind: Any = case.system.removeprefix("published ")
        self.model: PublishedModel = published_model(reference, kind, device)
        self.batch = inputs(case, device)
        self.poses = published_poses(self.batch.source, self.batch.target.cameras)

    def encode(self) -> Any:
        with torch.no_grad():
            return self.model.encode(self.batch.source.images)

    def render(self, features: Any, rows: int) -> Any:
        width, height = self.case.size
        start = (height - rows) // 2 * width
        images = self.batch.source.images
        with torch.no_grad():
            latent = self.model.latent(images, *self.poses)
            indices = torch.arange(start, start + rows * width, device=images.device).split(PUBLISHED_SLICE)
            return [self.model.render(images, features, self.poses, part, latent=latent) for part in indices]

    def training_step(self) -> Callable[[], None]:
        network = self.model.network.train()
        parameters = [p for name, p in network.named_parameters() if not name.startswith("latent_inference")]
        optimizer = torch.optim.AdamW(parameters, lr=5e-5, weight_decay=1e-4)
        images, truth = self.batch.source.images, self.batch.target.images.flatten(2).transpose(1, 2)

        def step() -> None:
            optimizer.zero_grad()
            features = self.model.encode(images)
            latent = self.model.latent(images, *self.poses)
            rays = torch.randperm(truth.shape[1], device=images.device)[: self.case.rays]
            output = self.model.render(images, features, self.poses, rays, latent=latent, mode="train")
            (output.rgb - truth[:, rays]).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(network.feat_enc.parameters(), 1.0)
            optimizer.step()

        return step


def tile_of(batch: Batch, rays: int) -> Batch:
    """The middle of the targets as a square tile of so many pixels: what the cascade is trained on."""
    side = round(rays**0.5)
    target = batch.target.cameras
    left, top = (target.width - side) // 2, (target.height - side) // 2
    window = (..., slice(top, top + side), slice(left, left + side))
    assert batch.depth is not None
    tile = Views(batch.target.images[window], crop(target, left, top, (side, side)))
    return Batch(batch.source, tile, batch.depth[window], None, batch.scenes)


def run_case(case: Case, effort: Effort, reference: Path | None) -> dict[str, Any]:
    """Measure one case."""
    device = torch.device(effort.device)
    torch.set_num_threads(effort.threads)
    if case.stage == "roofline":
        os.environ[SWITCH] = "0"  # what compiled kernels do cannot be counted from outside
    published = case.system in PUBLISHED
    if not published:
        keep_freed_memory()  # as our commands do
        system: Any = OurSystem(case, effort.device)
    else:
        assert reference is not None
        system = PublishedSystem(case, effort.device, reference)
    if case.stage == "roofline":
        return roofline_of(system, case, device, effort)
    if case.stage == "agreement":
        assert reference is not None
        return {"difference": largest_difference(system, PublishedSystem(case, effort.device, reference))}

    def seconds(function: Callable[[], Any]) -> float:
        start = clock(device, effort.processor)
        function()
        return clock(device, effort.processor) - start

    def repeated(function: Callable[[], Any]) -> tuple[float, int]:
        first = seconds(function)
        if first > effort.part:
            return first, 1
        times = [seconds(function) for _ in range(effort.repeats)]  # the first one warmed up
        return median(times), effort.repeats

    share = 1.0
    if case.stage == "encode":
        result, repeats = repeated(system.encode)
    elif case.stage == "train":
        result, repeats = repeated(system.training_step())
    elif case.stage == "frames":
        result, repeats = seconds(system.render_path), 1
    else:
        features = system.encode()
        rows = case.size[1]
        if not case.system.startswith("cascade"):
            rows = rows_that_fit(lambda n: seconds(lambda: system.render(features, n)), rows, effort)
        share = rows / case.size[1]
        result, repeats = repeated(lambda: system.render(features, rows))
        result /= share
    return {"seconds": result, "share": share, "repeats": repeats, "peak_gb": peak_memory(device)}


def largest_difference(ours: OurSystem, published: PublishedSystem) -> float:
    """Of the colours of a few rows of the target."""
    rgb = ours.render(ours.encode(), 2).rgb[0].flatten(1).T
    theirs = torch.cat([part.rgb[0] for part in published.render(published.encode(), 2)])
    return float((rgb - theirs).abs().max())


def rows_that_fit(timed: Callable[[int], float], height: int, effort: Effort) -> int:
    """All rows if they take at most ``effort.whole`` seconds, else as many as fit into ``effort.part``."""
    timed(2)
    of_row = timed(2) / 2
    if of_row * height <= effort.whole:
        return height
    return max(2, min(height, int(effort.part / of_row)))


def peak_memory(device: torch.device) -> float:
    """Largest so far in GB: of the process, or of PyTorch on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def roofline_of(system: OurSystem, case: Case, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Machine rates, and every stage's operations, bytes, seconds and floor: encoding, then per ray."""
    dtype = torch.bfloat16 if system.model.precision == "bf16" else torch.float32
    rates = measure_rates(device, effort.processor, dtype)
    core = system.model.core
    encoding = stage_costs(core.encoder, system.encode, device, effort.processor, repeats=1)
    features = system.encode()
    rows = case.size[1] if case.system.startswith("cascade") else 8
    rendering = stage_costs(core, lambda: system.render(features, rows), device, effort.processor)
    rays = rows * case.size[0]

    def described(costs: dict[str, Any], per: int) -> dict[str, Any]:
        return {
            name: {k: v / per for k, v in (asdict(c) | {"floor": c.floor(rates)}).items()} for name, c in costs.items()
        }

    return {
        "rates": asdict(rates),
        "encode": described(encoding, 1),
        "ray": described(rendering, rays),
    }


def main() -> None:
    """Arguments: a JSON object with ``case``, ``effort`` and ``reference``."""
    order = json.loads(sys.argv[1])
    case = Case(**{**order["case"], "size": tuple(order["case"]["size"])})
    reference = Path(order["reference"]) if order["reference"] else None
    print(json.dumps(run_case(case, Effort(**order["effort"]), reference)))


if __name__ == "__main__":
    main()
