"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) through the optional ``lpips`` package: VGG, inputs in [-1, 1].

The package needs torchvision and, once, a download of the VGG backbone; so it is an extra
(``pip install "idnerf[metrics]"``), and a report without it says ``null`` and why.
"""

import importlib
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Lpips = Callable[[Float[Tensor, "3 height width"], Float[Tensor, "3 height width"]], float]
"""(prediction, truth), images in [0, 1] -> LPIPS distance."""

NOT_INSTALLED = "lpips is null: its extra is not installed (pip install 'idnerf[metrics]')"


def load_lpips(device: torch.device | str = "cpu") -> tuple[Lpips | None, str | None]:
    """LPIPS with the VGG backbone on ``device``; or None and the reason, one line for the report's notes."""
    try:
        package = importlib.import_module("lpips")
    except ImportError:
        return None, NOT_INSTALLED
    try:
        network = package.LPIPS(net="vgg", verbose=False).to(device).eval()
    except OSError as error:  # the backbone's weights could not be downloaded
        return None, f"lpips is null: the VGG backbone could not be loaded ({error})"

    def measure(prediction: Float[Tensor, "3 height width"], truth: Float[Tensor, "3 height width"]) -> float:
        with torch.inference_mode():
            inputs = (2 * torch.stack([prediction, truth]) - 1).to(device)
            return network(inputs[:1], inputs[1:]).item()

    return measure, None
