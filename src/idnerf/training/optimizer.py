"""AdamW with one learning rate per part, a one-cycle schedule, and an exponential moving average of the weights."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idnerf.errors import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its one-cycle schedule."""

    encoder_lr: float = 1e-3
    """Peak learning rate of the encoder; 0 leaves it as it is, and a step costs less."""
    decoder_lr: float = 1e-3
    """Peak learning rate of everything else; 0 leaves it as it is."""
    latent_lr: float = 1e-3
    """Peak learning rate of the network that infers the target-view latent; 0 leaves it as it is."""
    weight_decay: float = 1e-4
    """Decoupled weight decay."""
    beta2: float = 0.99
    """AdamW's second-moment decay."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises."""
    final_lr: float = 0.02
    """Learning rate at the last step, as a share of the peak."""
    grad_clip: float = 1.0
    """Largest norm of a gradient; 0 leaves it as it is."""
    clip: Literal["all", "encoder"] = "all"
    """`all`: encoder and decoder together, the latent network apart, so that a strong pull on the latent does not slow
    the rest; `encoder`: the encoder alone, as MatchNeRF and ID-NeRF do."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights that is saved and validated (warmed up); 0 saves the last ones."""

    def __post_init__(self) -> None:
        for name in ("encoder_lr", "decoder_lr", "latent_lr", "weight_decay", "grad_clip"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"--optimizer.{name.replace('_', '-')}: expected 0 or more, finite, got {value}")
        if self.encoder_lr == self.decoder_lr == 0:
            raise InputError("--optimizer.decoder-lr 0: expected above 0 where --optimizer.encoder-lr is 0 too")
        if self.clip == "encoder" and self.encoder_lr == 0 and self.grad_clip:
            raise InputError("--optimizer.clip encoder: expected `all`, as --optimizer.encoder-lr 0 trains no encoder")
        if not 0 <= self.warmup < 1:
            raise InputError(f"--optimizer.warmup: expected a share in [0, 1), got {self.warmup}")
        for name in ("beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"--optimizer.{name.replace('_', '-')}: expected a decay in [0, 1), got {getattr(self, name)}"
                )
        if not 0 <= self.final_lr <= 1:
            raise InputError(f"--optimizer.final-lr: expected a share in [0, 1], got {self.final_lr}")


def part_of(name: str) -> str:
    """The part that a parameter belongs to: ``encoder``, ``latent`` or ``decoder``."""
    words = name.split(".")
    return next((part for part in ("encoder", "latent") if part in words), "decoder")


def freeze_still_parts(model: nn.Module, config: OptimizerConfig, added: Collection[str] = ()) -> None:
    """Parts with a learning rate of 0 ask for no gradient: nothing is computed backward through them alone.

    Parameters that were ``added`` to trained ones are not at rest anywhere: they go with the decoder.

    Raises:
        InputError: nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        part = "decoder" if name in added else part_of(name)
        if getattr(config, f"{part}_lr") == 0:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("--optimizer: every part that could be trained has a learning rate of 0; give one above")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Every trainable parameter in exactly one group: ``encoder``, ``decoder``, or ``latent`` where there is one."""
    rates = {"encoder": config.encoder_lr, "decoder": config.decoder_lr, "latent": config.latent_lr}
    parts: dict[str, list[nn.Parameter]] = {"encoder": [], "decoder": [], "latent": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            parts[part if rates[part] > 0 else "decoder"].append(parameter)
    return [
        {"name": part, "params": parameters, "lr": rates[part], "peak_lr": rates[part]}
        for part, parameters in parts.items()
        if parameters or part != "latent"
    ]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model, config), betas=(0.9, config.beta2), weight_decay=config.weight_decay
    )


def clip_gradients(optimizer: torch.optim.Optimizer, config: OptimizerConfig) -> Float[Tensor, ""]:
    """Scale gradients down to ``grad_clip`` as ``clip`` says. Returns the norm of all of them, before."""
    parts = {group["name"]: group["params"] for group in optimizer.param_groups}
    encoder, decoder, latent = parts["encoder"], parts["decoder"], parts.get("latent", [])
    limit = config.grad_clip or math.inf
    if config.clip == "all":
        limits = [([*encoder, *decoder], limit), (latent, limit)]
    else:
        limits = [(encoder, limit), ([*decoder, *latent], math.inf)]
    norms = [torch.nn.utils.clip_grad_norm_(parameters, largest) for parameters, largest in limits if parameters]
    return torch.linalg.vector_norm(torch.stack(norms))


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
