"""Training state on disk: weights, their average and AdamW's moments in one file, so that they never disagree."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from idnerf.checkpoint import read_tensors, write_tensors
from idnerf.errors import InputError

STATE_FILE = "training_state.safetensors"


@dataclass(frozen=True)
class TrainingState:
    """What the next step needs. All randomness is a function of (seed, step), so the step is the random state.

    ``options`` is what the command line wants to find again (``commands/train.py``); empty if it did not start the run.
    ``origin`` is what the weights say of their training, ``added`` names the parameters that `--extend` added to other
    weights, and ``watch`` is what a ``LossWatch`` remembers: each None in states of earlier versions.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    moments: dict[str, Tensor]
    config: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] | None = None
    added: list[str] | None = None
    watch: dict[str, Any] | None = None


def save_state(
    path: Path,
    step: int,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    options: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    *,
    added: Iterable[str] = (),
    watch: Mapping[str, Any] | None = None,
) -> None:
    """Write everything as one file, atomically; see ``TrainingState``."""
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"ema/{k}": v for k, v in ema.items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"moments/{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(float(value))
    metadata = {"step": step, "train_config": config, "options": dict(options or {}), "origin": origin}
    metadata |= {"added": sorted(added), "watch": watch}
    write_tensors(path, {k: v.clone() for k, v in tensors.items()}, metadata)


def load_state(path: Path) -> TrainingState:
    """Read a training state. Raises InputError when it is missing, truncated or another kind of file."""
    tensors, metadata = read_tensors(path, "training state")
    if "step" not in metadata or "train_config" not in metadata:
        raise InputError(f"{path} holds weights but no training state; --resume expects the folder of a training run")

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return TrainingState(
        metadata["step"],
        part("model/"),
        part("ema/"),
        part("moments/"),
        metadata["train_config"],
        metadata.get("options", {}),
        metadata.get("origin"),
        metadata.get("added"),
        metadata.get("watch"),
    )


class JudgedStates:
    """Keeps the last training state whose steps are all known to be sound, while later ones are not judged yet.

    ``judged`` is where ``path`` holds such a state, or a copy beside it does; None where there is none. A copy that an
    interrupted training left says that the state at ``path`` was not judged yet.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.copy = path, path.with_name(f"{path.name}.judged")
        self.judged = None
        if path.exists():
            self.judged = self.copy if self.copy.exists() else path

    def before_save(self, *, sound: bool) -> None:
        """The state at ``path`` will be written over by one whose steps are known to be ``sound``, or not yet."""
        if sound:
            self.all_sound()
            self.judged = self.path
        elif self.judged == self.path:
            copy_whole(self.path, self.copy)
            self.judged = self.copy

    def all_sound(self) -> None:
        """All steps up to now are sound, those of the state at ``path`` among them."""
        self.copy.unlink(missing_ok=True)
        self.judged = self.path if self.path.exists() else None


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file; ``target`` is the old one or the whole new one."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


def restore(state: TrainingState, model: nn.Module, ema: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put a state back, bit for bit. Raises InputError when the state belongs to another model."""
    expected = model.state_dict()
    wrong = [k for k in expected if k not in state.model or state.model[k].shape != expected[k].shape]
    if wrong or len(expected) != len(state.model):
        raise InputError(
            f"the training state does not fit the model (first difference: {(wrong or ['number of tensors'])[0]}); "
            "resume with the preset and model options that the run was started with"
        )
    model.load_state_dict(state.model)
    for name, value in state.ema.items():
        ema[name].copy_(value)
    for name, parameter in model.named_parameters():
        moments = {k.removeprefix(f"{name}/"): v for k, v in state.moments.items() if k.rpartition("/")[0] == name}
        if moments:
            optimizer.state[parameter] = {
                k: v.clone() if k == "step" else v.to(parameter.device, copy=True) for k, v in moments.items()
            }
