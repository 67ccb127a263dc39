"""AdamW with one learning rate per part, a one-cycle schedule, and an exponential moving average of the weights."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from idnerf.errors import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its one-cycle schedule."""

    encoder_lr: float = 1e-3
    """Peak learning rate of the encoder."""
    decoder_lr: float = 1e-3
    """Peak learning rate of everything else."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    beta2: float = 0.99
    """AdamW's second-moment decay."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    final_lr: float = 0.02
    """Learning rate at the last step, as a share of the peak."""
    grad_clip: float = 1.0
    """Largest norm of the gradient of all parameters together; 0 leaves it as it is."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights that is saved and validated (warmed up); 0 saves the last ones."""

    def __post_init__(self) -> None:
        for name in ("encoder_lr", "decoder_lr"):
            if not getattr(self, name) > 0:
                raise InputError(f"--optimizer.{name.replace('_', '-')}: expected above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "grad_clip"):
            if not getattr(self, name) >= 0:
                raise InputError(f"--optimizer.{name.replace('_', '-')}: expected 0 or more, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise InputError(f"--optimizer.warmup: expected a share in [0, 1), got {self.warmup}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"--optimizer.ema-decay: expected a decay in [0, 1), got {self.ema_decay}")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Every trainable parameter in exactly one group: ``encoder`` or ``decoder``."""
    encoder, decoder = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (encoder if ".encoder." in f".{name}" else decoder).append(parameter)
    return [
        {"name": "encoder", "params": encoder, "lr": config.encoder_lr, "peak_lr": config.encoder_lr},
        {"name": "decoder", "params": decoder, "lr": config.decoder_lr, "peak_lr": config.decoder_lr},
    ]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, config), betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )


def one_cycle(progress: float, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at ``progress`` in [0, 1]: linear warm-up, then a cosine to ``final_lr``."""
    if progress < config.warmup:
        return max(progress / config.warmup, 0.01)
    remaining = (progress - config.warmup) / (1 - config.warmup)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(remaining, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


@torch.no_grad()
def update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float, step: int) -> None:
    """ema <- decay ema + (1 - decay) weights; early steps use a smaller decay, so that the start is forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            ema[name].lerp_(value, 1 - decay)
        else:
            ema[name].copy_(value)
