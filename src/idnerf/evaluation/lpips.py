"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) through the optional ``lpips`` package: VGG, inputs in [-1, 1].

The package needs torchvision and, once, a download of the VGG backbone; so it is an extra
(``pip install '.[metrics]'`` in a checkout), and a report without it says ``null``.
"""

import importlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Lpips = Callable[[Float[Tensor, "3 height width"], Float[Tensor, "3 height width"]], float]
"""(prediction, truth), images in [0, 1] -> LPIPS distance."""


def load_lpips(device: torch.device | str = "cpu") -> tuple[Lpips | None, str]:
    """LPIPS with the VGG backbone on ``device``; None and the reason where it is not to be had: PSNR need not wait."""
    try:
        package = importlib.import_module("lpips")
    except ImportError:
        return None, "install the extra with `pip install '.[metrics]'` in a checkout"
    try:
        network = package.LPIPS(net="vgg", verbose=False).to(device).eval()
    except OSError as error:
        return None, f"its VGG backbone could not be loaded ({' '.join(str(error).split())}); go online once"

    def measure(prediction: Float[Tensor, "3 height width"], truth: Float[Tensor, "3 height width"]) -> float:
        with torch.inference_mode():
            inputs = (2 * torch.stack([prediction, truth]) - 1).to(device)
            return network(inputs[:1], inputs[1:]).item()

    return measure, ""
