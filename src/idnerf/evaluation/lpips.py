"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) through the optional ``lpips`` package: VGG, inputs in [-1, 1].

The package needs torchvision and, once, a download of the VGG backbone; so it is an extra
(``pip install "idnerf[metrics]"``), and a report without it says ``null``.
"""

import importlib
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Lpips = Callable[[Float[Tensor, "3 height width"], Float[Tensor, "3 height width"]], float]
"""(prediction, truth), images in [0, 1] -> LPIPS distance."""


def load_lpips(device: torch.device | str = "cpu") -> Lpips | None:
    """LPIPS with the VGG backbone on ``device``; None when the extra is not installed.

    None too, with a warning, when it is installed and the backbone cannot be downloaded: PSNR and SSIM need not wait.
    """
    try:
        package = importlib.import_module("lpips")
    except ImportError:
        return None
    try:
        network = package.LPIPS(net="vgg", verbose=False).to(device).eval()
    except OSError as error:
        warnings.warn(f"lpips was left out: its VGG backbone could not be loaded ({error})", stacklevel=2)
        return None

    def measure(prediction: Float[Tensor, "3 height width"], truth: Float[Tensor, "3 height width"]) -> float:
        with torch.inference_mode():
            inputs = (2 * torch.stack([prediction, truth]) - 1).to(device)
            return network(inputs[:1], inputs[1:]).item()

    return measure
