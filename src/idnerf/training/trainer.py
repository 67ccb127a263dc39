"""The training loop: the only place that calls ``backward()`` and ``step()``.

StepDataset (examples by step) -> objective (loss terms) -> backward, clip, AdamW, EMA -> log, validate, save

With ``precision="bf16"`` the convolutions and matrix products of the cascade, and those of the `paper` configuration's
encoder behind its CNN, run in bfloat16; weights, camera geometry (``geometry/precision.py``), the depth distribution,
the radiance field and losses stay float32.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from idnerf.checkpoint import fingerprint, locate_weights, read_tensors, write_tensors
from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF, ModelConfig, config_from_json, config_to_json, read_weights
from idnerf.models.paper import PaperModel
from idnerf.models.published import initialise_encoder
from idnerf.priors.prior import load_prior
from idnerf.training.examples import Example, SceneProvider, StepDataset, seeded
from idnerf.training.losses import psnr_of_mse
from idnerf.training.objectives import LossConfig, objective
from idnerf.training.optimizer import (
    OptimizerConfig,
    clip_gradients,
    freeze_still_parts,
    make_optimizer,
    one_cycle,
    set_learning_rate,
    update_ema,
)
from idnerf.training.run_log import LossWatch, RunLog, Window
from idnerf.training.score_distillation import GuidanceConfig, ScoreDistillation
from idnerf.training.state import (
    STATE_FILE,
    JudgedStates,
    TrainingState,
    copy_whole,
    load_state,
    restore,
    save_state,
)
from idnerf.types import Batch

BEFORE_RISE = "before_rise.safetensors"
"""Copy of the last training state before the loss first rose."""
DISTILLATION = "score_distillation"
"""Name of that loss term."""


class TrainingDivergedError(RuntimeError):
    """The loss is not finite. The last good checkpoint stays where it is."""


@dataclass(frozen=True)
class TrainerConfig:
    """A training, whatever its data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the loss terms."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Score distillation of the target-view latent by a frozen diffusion model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    out: Path = Path("runs/idnerf")
    """Run folder: weights, training state, logs."""
    resume: Path | None = None
    """Run folder to continue, bit for bit on the CPU; its options are found again, those given here change them."""
    init: str | None = None
    """Weights to start from (a file, a hub id, `default`); the optimizer starts afresh."""
    extend: bool = False
    """Keep the model options given here rather than those of `--init`: adds parts to weights trained without."""
    only_added: bool = False
    """With `--extend`: train the added parts only, the weights of `--init` stay as they are."""
    encoder_init: Path | None = None
    """GMFlow weights from `idnerf convert` for the encoder of the `paper` configuration."""
    steps: int = 20_000
    """Training steps; the learning-rate schedule ends there."""
    batch_size: int = 1
    """Scenes per step and process."""
    source_views: tuple[int, int] = (2, 5)
    """Fewest and most source views; one number is drawn per step."""
    tile: tuple[int, int] | None = (128, 96)
    """Target pixels per step as a window (width, height); None takes whole images."""
    rays: int = 1024
    """Target rays per scene and step of the `paper` configuration, which takes scattered pixels."""
    fast_share: float = 0.5
    """Share of the `cascade` steps trained at quality `fast` (fewer planes and samples), so that both are learnt."""
    enlarged_share: float = 0.0
    """Share of the `cascade` steps whose source photos are enlarged first, as rendering does with small photos where
    `--model.cascade.enlarge-up-to` says so: one goes with the other."""
    augment: bool = True
    """Recolour and mirror scenes at random, the same way for every view."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the `cascade` networks, or of the transformer and the upsampler in the `paper` configuration's encoder. bf16
    pays on GPUs and on CPUs with AMX or AVX-512 BF16 (docs/training.md); elsewhere it costs."""
    seed: int = 0
    """Of weights, examples and samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""
    processes: int = 1
    """Processes on this machine; under torchrun its own count is used."""
    workers: int = 1
    """Data loader processes; 0 loads in the training process."""
    threads: int = 0
    """Threads of PyTorch on the CPU; 0 leaves its choice."""
    log_every: int = 50
    """Steps between log entries."""
    validate_every: int = 1000
    """Steps between validations on held-out scenes; 0 never validates."""
    save_every: int = 250
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "rays", "processes", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        for name in ("workers", "threads", "validate_every"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.fast_share <= 1:
            raise InputError(f"--fast-share: expected a share in [0, 1], got {self.fast_share}")
        if not 0 <= self.enlarged_share <= 1:
            raise InputError(f"--enlarged-share: expected a share in [0, 1], got {self.enlarged_share}")
        if self.only_added and not (self.init and self.extend):
            raise InputError("--only-added: expected --init WEIGHTS --extend with it")
        if self.guidance.sds_weight and self.optimizer.latent_lr == 0:
            raise InputError("--optimizer.latent-lr: expected above 0 with --guidance.sds-weight, got 0")
        low, high = self.source_views
        if not 2 <= low <= high:
            raise InputError(f"--source-views: expected 2 <= fewest <= most, got {low} {high}")
        if self.tile is not None and min(self.tile) < 8:
            raise InputError(f"--tile: expected at least 8x8 pixels, got {self.tile[0]}x{self.tile[1]}")


def train(
    config: TrainerConfig,
    scenes: SceneProvider,
    held_out: list[Example] | Callable[[], list[Example]],
    data: str = "",
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Train; returns the run folder, which holds ``weights.safetensors`` and the training state.

    Args:
        config: the training.
        scenes: where examples come from.
        held_out: examples with whole target images for validation; or what makes them, called once all else is right.
        data: what the scenes are, in words: recorded in the weights, for their model card.
        options: kept with the training state for whoever resumes it (``TrainingState.options``).

    Raises:
        TrainingDivergedError: the loss or its gradient is not finite; names the step and the scenes.
        InputError: a run folder that cannot be resumed, or options that do not fit.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    run = config.resume or config.out
    if config.resume is None and (run / STATE_FILE).exists():
        raise InputError(f"{run} holds a training already: continue it with --resume {run}, or give another --out")
    fabric = launch(config)

    torch.manual_seed(config.seed)
    state = None if config.resume is None else load_state(run / STATE_FILE)
    model = start_model(config, state)
    config = dataclasses.replace(config, model=model.config)  # weights to start from bring their own
    if config.encoder_init is not None and state is None:  # a state brings its own
        start_encoder(model, config.encoder_init)
    guidance = start_guidance(config, model, fabric.device)
    freeze_still_parts(model, config.optimizer, model.added)
    model.train()
    ema = {name: value.clone().to(fabric.device) for name, value in model.state_dict().items()}
    optimizer = make_optimizer(model, config.optimizer)
    wrapped, optimizer = fabric.setup(Objectives(model, config, guidance), optimizer)
    start = 0
    if state is not None:
        restore(state, model, ema, optimizer.optimizer)
        start = state.step
    validated: list[Example] = []
    if fabric.is_global_zero:
        validated = held_out() if callable(held_out) else held_out

    log = RunLog(run, config.steps, start, active=fabric.is_global_zero)
    window, watch, states = Window(), LossWatch(), JudgedStates(run / STATE_FILE)
    settings = plain(config)
    if state is not None:
        options = options or state.options
        if state.watch and state.config.get("loss") == settings["loss"]:  # else the losses do not compare
            watch.recall(state.watch)
    origin = state.origin if state and state.origin else provenance(config, data, fabric.world_size)
    try:
        for step, batch in zip(range(start, config.steps), load_batches(config, scenes, start, fabric), strict=True):
            batch = batch.to(fabric.device)
            set_learning_rate(optimizer.optimizer, one_cycle(step / config.steps, config.optimizer))
            optimizer.zero_grad()
            terms, mse, rays = wrapped(batch, step, fabric.global_rank)
            loss = torch.stack(list(terms.values())).sum()
            if not finite_everywhere(loss, fabric):
                raise diverged("loss", terms, step, batch, run)
            fabric.backward(loss)
            norm = clip_gradients(optimizer.optimizer, config.optimizer)
            if not torch.isfinite(norm):  # the same on every process; a step would spoil weights about to be saved
                raise diverged("gradient", terms, step, batch, run)
            optimizer.step()
            update_ema(ema, model, config.optimizer.ema_decay, step)
            window.add(terms, mse, rays * fabric.world_size)
            log.advance(step + 1, window.status())
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                count, values = window.steps, window.take()
                log.numbers(step + 1, values, "train")
                if watch.rises(values["loss"] - values.get(DISTILLATION, 0.0), count):
                    log.warn(risen(watch, step + 1, run, states.judged if fabric.is_global_zero else None))
                elif watch.calm and fabric.is_global_zero:
                    states.all_sound()
            if ((step + 1) % config.save_every == 0 or step + 1 == config.steps) and fabric.is_global_zero:
                states.before_save(sound=watch.calm and (step + 1) % config.log_every == 0)
                save_state(
                    run / STATE_FILE,
                    step + 1,
                    model,
                    ema,
                    optimizer.optimizer,
                    settings,
                    options,
                    origin,
                    added=model.added,
                    watch=watch.remembered(),
                )
                save_weights(run / "weights.safetensors", model, ema, step + 1, origin)
            due = config.validate_every and ((step + 1) % config.validate_every == 0 or step + 1 == config.steps)
            if due and validated and fabric.is_global_zero:
                log.numbers(step + 1, validate(model, ema, validated, log, step + 1), "validation")
        states.copy.unlink(missing_ok=True)
    finally:
        log.close()
    return run


def launch(config: TrainerConfig) -> Any:
    """Lightning Fabric on the processes asked for: its own, or those that torchrun has started."""
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    devices, nodes = process_counts(config.processes, os.environ)
    try:
        fabric = Fabric(
            accelerator=config.device,
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if devices * nodes > 1 else "auto",
        )
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--device {config.device} --processes {devices} is not to be had here: {reason}") from error
    fabric.launch()
    return fabric


def process_counts(processes: int, environment: Mapping[str, str]) -> tuple[int, int]:
    """(Processes on this machine, machines): what torchrun says in the environment, else ``processes`` on one.

    Raises:
        InputError: ``processes`` contradicts torchrun.
    """
    if "LOCAL_WORLD_SIZE" not in environment or "GROUP_RANK" not in environment:
        return processes, 1
    here = int(environment["LOCAL_WORLD_SIZE"])
    if processes not in (1, here):
        raise InputError(f"--processes {processes}: torchrun has started {here} here; leave --processes out")
    return here, int(environment["WORLD_SIZE"]) // here


def finite_everywhere(loss: Tensor, fabric: Any) -> bool:
    """Whether the loss is finite on every process: all stop together, or the others would wait for ever."""
    finite = torch.isfinite(loss).float()
    return bool(finite if fabric.world_size == 1 else fabric.all_reduce(finite, reduce_op="mean") == 1)


def diverged(what: str, terms: dict[str, Tensor], step: int, batch: Batch, run: Path) -> TrainingDivergedError:
    """The error that says where it happened."""
    values = ", ".join(f"{name} {value:.2g}" for name, value in terms.items())
    return TrainingDivergedError(
        f"the {what} is not finite at step {step} on {', '.join(batch.scenes)} ({values}); "
        f"the last good checkpoint stays in {run}"
    )


def risen(watch: LossWatch, step: int, run: Path, judged: Path | None) -> str:
    """What to say of a loss that rises; the last state from before its first rise is kept beside the run's."""
    before = f"it had been {watch.lowest:.3g}"
    text = f"warning: loss {watch.latest:.3g} at step {step}, {before}: the learning rate may be too high"
    if judged is None:
        return text
    if not (run / BEFORE_RISE).exists():  # a loss that hovers rises again: its states are no better
        copy_whole(judged, run / BEFORE_RISE)
    return f"{text}; {run / BEFORE_RISE} keeps the last state before (rename it to {STATE_FILE} to resume from there)"


def start_encoder(model: IDNeRF, path: Path) -> None:
    """Put GMFlow's weights into the encoder. Raises InputError for another configuration or another kind of file."""
    if not isinstance(model.core, PaperModel):
        raise InputError("--encoder-init holds GMFlow weights: only the `paper` configuration has that encoder")
    tensors, metadata = read_tensors(path)
    if metadata.get("encoder") != "gmflow":
        raise InputError(f"{path} holds no GMFlow encoder: make it with `idnerf convert gmflow_sintel-0c07dcb3.pth`")
    initialise_encoder(model.core, tensors)


def start_model(config: TrainerConfig, state: TrainingState | None = None) -> IDNeRF:
    """A new model, or the weights that ``init`` names, with their own options or extended to those given.

    With a ``state`` to resume from, ``init`` was read when the run was started: its options are the state's.
    """
    if state is not None:
        model = IDNeRF(model_config_of(state, None if config.init and not config.extend else config.model))
        if state.added is not None:
            model.added = frozenset(state.added)
        elif config.extend:
            assert config.init is not None
            model.added = frozenset(set(model.state_dict()) - set(read_weights(config.init)[1]))
    elif config.init is None:
        model = IDNeRF(config.model)
    elif config.extend:
        model = IDNeRF.extending(config.init, config.model)
    else:
        model = IDNeRF.from_pretrained(config.init)
    if config.only_added:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in model.added)
    return model


def model_config_of(state: TrainingState, given: ModelConfig | None) -> ModelConfig:
    """The model options of a run; it has none of the parts that were not an option yet when it was started.

    Raises:
        InputError: ``given`` says otherwise.
    """
    name = state.config["model"]["configuration"]
    kept = config_from_json({"configuration": name, name: state.config["model"][name]})
    if given is not None:
        ours, theirs = plain(kept), plain(given)
        if given.configuration != name:
            raise InputError(f"the run to resume is of the configuration {name}, got {given.configuration}")
        usual = plain(type(getattr(given, name))())
        for field in ours[name]:
            unasked = field not in state.config["model"][name] and theirs[name][field] == usual[field]
            if ours[name][field] != theirs[name][field] and not unasked:
                raise InputError(
                    f"--model.{name}.{field.replace('_', '-')}: expected {ours[name][field]}, what the run was started "
                    f"with, got {theirs[name][field]}"
                )
    return kept


def start_guidance(config: TrainerConfig, model: IDNeRF, device: torch.device | str) -> ScoreDistillation | None:
    """The frozen prior and its loss; None, and nothing is loaded, for a weight of 0.

    Raises:
        InputError: the model has no latent to guide.
    """
    if config.guidance.sds_weight == 0:
        return None
    if getattr(model.config, model.config.configuration).latent_query == "none":
        name = model.config.configuration
        raise InputError(
            f"--guidance.sds-weight {config.guidance.sds_weight}: expected a model with a target-view latent; add "
            f"--model.{name}.view-refinement --model.{name}.latent-query pixel"
        )
    return ScoreDistillation(config.guidance, load_prior(config.guidance.prior, device))


class Objectives(torch.nn.Module):
    """The model with its objective as one ``forward``, which is what data-parallel wrappers synchronise."""

    def __init__(self, model: IDNeRF, config: TrainerConfig, guidance: ScoreDistillation | None = None):
        super().__init__()
        self.model, self.config, self.guidance = model, config, guidance

    def forward(self, batch: Batch, step: int, rank: int) -> tuple[dict[str, Tensor], Tensor, int]:
        """Loss terms, mean squared error and number of rays; randomness is a function of (seed, step, rank)."""
        device = batch.target.images.device
        generator = torch.Generator(device).manual_seed(seeded(self.config.seed, step, 2 + rank).initial_seed())
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            result = objective(
                self.model,
                batch,
                self.config.loss,
                generator,
                rays_per_step=self.config.rays,
                fast_share=self.config.fast_share,
                enlarged_share=self.config.enlarged_share,
            )
        terms = result.terms
        if self.guidance is not None and result.latent is not None:
            # a generator of its own: the rest of the step draws the same numbers with and without guidance
            own = torch.Generator(device).manual_seed(seeded(self.config.seed, step, 2 + rank, 1).initial_seed())
            progress = step / self.config.steps
            terms = {**terms, DISTILLATION: self.guidance(result.latent, batch.source, progress, own)}
        return terms, result.mse, result.rays


def load_batches(config: TrainerConfig, scenes: SceneProvider, start: int, fabric: Any) -> Iterator[Batch]:
    """Batches of steps ``start`` to the end, in order, made by worker processes."""
    dataset = StepDataset(
        scenes,
        seed=config.seed,
        batch_size=config.batch_size,
        source_views=config.source_views,
        tile=config.tile if config.model.configuration == "cascade" else None,
        augment=config.augment,
        rank=fabric.global_rank,
        world=fabric.world_size,
    )
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(start, config.steps),
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        persistent_workers=False,
        collate_fn=keep,
        worker_init_fn=limit_threads,
    )
    try:
        yield from loader
    except InputError as error:  # from a worker it comes with that process's traceback before its one line
        raise InputError(str(error).strip().rpartition("InputError: ")[2]) from None
    except OSError as error:
        if error.errno is not None:
            raise
        last = str(error).strip().splitlines()[-1]  # the worker's own words, after its traceback
        raise InputError(last.partition(": ")[2] or last) from None


def keep(batch: Any) -> Any:
    """Batches come whole from the dataset."""
    return batch


def limit_threads(_: int) -> None:
    """A loader worker takes one core."""
    torch.set_num_threads(1)


def validate(
    model: IDNeRF, ema: dict[str, Tensor], held_out: list[Example], log: RunLog, step: int
) -> dict[str, float]:
    """Mean PSNR (and depth error where exact depth is known) of the averaged weights on held-out scenes."""
    current = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(ema)
    model.eval()
    psnrs, depth_errors = [], []
    for number, example in enumerate(held_out):
        source, target = example.source.to(model.device), example.target.to(model.device)
        output = model.render(source, target.cameras)
        psnrs.append(psnr_of_mse(float((output.rgb - target.images).square().mean())))
        if example.depth is not None and (known := example.depth.to(model.device) > 0).any():
            truth = example.depth.to(model.device)[known]
            depth_errors.append(float(((output.depth[known] - truth).abs() / truth).median()))
        if number < 4:
            log.picture(step, f"held_out/{number}", torch.cat([output.rgb, target.images], -1).cpu())
    model.load_state_dict(current)
    model.train()
    values = {"psnr": sum(psnrs) / max(len(psnrs), 1)}
    if depth_errors:
        values["depth_median_relative_error"] = sum(depth_errors) / len(depth_errors)
    return values


def provenance(config: TrainerConfig, data: str, world_size: int) -> dict[str, Any]:
    """What a model card says about the training, beside the number of its steps."""
    tensors, earlier = ({}, {}) if config.init is None else read_tensors(locate_weights(config.init))
    facts = {
        "data": data,
        "started_from": config.init,
        "started_from_sha256": fingerprint(tensors) if tensors else None,
        "earlier_steps": earlier.get("step", 0) + (earlier.get("training") or {}).get("earlier_steps", 0),
        "examples_per_step": config.batch_size * world_size,
        "source_views": list(config.source_views),
        "prior": config.guidance.prior.kind if config.guidance.sds_weight else None,
    }
    return {name: value for name, value in facts.items() if value}


def save_weights(path: Path, model: IDNeRF, ema: dict[str, Tensor], step: int, training: dict[str, Any]) -> None:
    """The averaged weights in half precision, as ``IDNeRF.from_pretrained`` reads them."""
    tensors = {k: v.half() if v.dtype == torch.float32 else v for k, v in ema.items()}
    write_tensors(path, tensors, {"config": config_to_json(model.config), "step": step, "training": training})


def plain(value: Any) -> Any:
    """A config as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
