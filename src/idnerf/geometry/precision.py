"""Mixed precision without harm: networks may run in 16 bits, camera geometry never does.

Automatic mixed precision takes every matrix product, those of camera matrices too; bfloat16 has 8 bits, which puts
projections into a 640x512 image up to 3 pixels off. Functions that multiply camera matrices are marked with
``full_precision``, so that a caller may put all of a model under ``torch.autocast``.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The same function with automatic mixed precision off inside."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return wrapped


def has_fast_bfloat16(device: torch.device | str) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 there: GPUs since Ampere, CPUs with AMX.

    On other CPUs they are up to 4 times slower.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or getattr(torch.cpu, "_is_amx_tile_supported", bool)())
