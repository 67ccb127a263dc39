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
    """Whether matrix products in bfloat16 are faster than in float32 there.

    They are on GPUs since Ampere, and on CPUs with AMX (Intel since Sapphire Rapids) or AVX-512 BF16 (AMD since Zen 4).
    On other CPUs they are up to 4 times slower.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    by_name = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))  # torch 2.9 and newer
    older = [getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("amx_tile", "avx512_bf16")]
    return by_name or any(supported() for supported in older)
