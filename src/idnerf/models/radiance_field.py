"""Conditioned radiance field: position, direction and a condition vector to colour and density.

NeRF's network (arXiv 2003.08934) with MVSNeRF's multiplicative conditioning (arXiv 2103.15595), density
through a ray transformer, as in MatchNeRF (arXiv 2304.12294, section 3.3).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from idnerf.compiled import dispatch
from idnerf.models.ray_transformer import RayTransformer


def fourier_features(positions: Float[Tensor, "*batch 3"], frequencies: int) -> Float[Tensor, "*batch width"]:
    """[x, sin(2^0 x), ..., sin(2^(L-1) x), cos(2^0 x), ...]: width 3 + 6 L, without NeRF's factor pi.

    Without gradients, on a CPU and with numba installed, point by point in compiled code.
    """
    if dispatch.usable(positions):
        encoded = dispatch.encode_positions(positions.reshape(-1, 3), frequencies)
        return encoded.view(*positions.shape[:-1], encoded.shape[1])
    scales = 2.0 ** torch.arange(frequencies, device=positions.device)
    angles = (positions[..., None, :] * scales[:, None]).flatten(-2)
    return torch.cat([positions, angles.sin(), angles.cos()], -1)


def modulated(values: Float[Tensor, "*shape"], scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """values * scale; in the place of ``values`` where nothing is differentiated."""
    return values * scale if torch.is_grad_enabled() else values.mul_(scale)


class RadianceField(nn.Module):
    """Six layers by default, each multiplied by the projected condition; the position comes in again once.

    Args:
        condition_width: numbers that describe a point (matching cue, colours, ...).
        hidden: width of the layers.
        layers: number of layers.
        skip: the encoded position is concatenated again after the layer of this index.
        frequencies: L of the position encoding.
        ray_width, ray_heads: of the ray transformer.
    """

    def __init__(
        self,
        condition_width: int,
        hidden: int = 128,
        layers: int = 6,
        skip: int = 4,
        frequencies: int = 10,
        ray_width: int = 16,
        ray_heads: int = 4,
    ) -> None:
        super().__init__()
        self.skip, self.frequencies = skip, frequencies
        encoded = 3 + 6 * frequencies
        widths = [encoded] + [hidden + encoded * (index == skip) for index in range(layers - 1)]
        self.layers = nn.ModuleList([nn.Linear(width, hidden) for width in widths])
        self.condition = nn.Linear(condition_width, hidden)
        self.to_ray = nn.Linear(hidden, ray_width)
        self.ray_transformer = RayTransformer(ray_width, ray_heads)
        self.density = nn.Sequential(nn.Linear(ray_width, ray_width), nn.ReLU(), nn.Linear(ray_width, 1))
        self.feature = nn.Linear(hidden, hidden)
        self.directional = nn.Linear(hidden + 3, hidden // 2)
        self.colour = nn.Linear(hidden // 2, 3)
        for linear in (*self.layers, self.to_ray, self.feature, self.directional, self.colour):
            assert isinstance(linear, nn.Linear)
            nn.init.kaiming_normal_(linear.weight)
            nn.init.zeros_(linear.bias)
        # Around 1, so that six multiplications neither shrink nor blow up the signal at the start.
        nn.init.ones_(self.condition.bias)

    def forward(
        self,
        positions: Float[Tensor, "ray sample 3"],
        directions: Float[Tensor, "ray 3"],
        condition: Float[Tensor, "ray sample condition"],
        asking: Bool[Tensor, "ray sample"] | None = None,
        answering: Bool[Tensor, "ray sample"] | None = None,
    ) -> tuple[Float[Tensor, "ray sample 3"], Float[Tensor, "ray sample"]]:
        """Colours in [0, 1] and raw densities (any sign; the caller's behaviour makes them positive).

        Args:
            positions: in the frame of a camera, about 1 in size.
            directions: unit directions of the rays in the same frame.
            asking, answering: see ``RayTransformer``.
        """
        encoded = fourier_features(positions, self.frequencies)
        scale = self.condition(condition)
        hidden = encoded
        for index, layer in enumerate(self.layers):
            hidden = F.relu_(modulated(layer(hidden), scale))
            if index == self.skip:
                hidden = torch.cat([encoded, hidden], -1)
        raw_density = self._raw_density(hidden, asking, answering)
        return torch.sigmoid(self.colour(F.relu_(self._directional(hidden, directions)))), raw_density

    def _raw_density(
        self,
        hidden: Float[Tensor, "ray sample hidden"],
        asking: Bool[Tensor, "ray sample"] | None,
        answering: Bool[Tensor, "ray sample"] | None,
    ) -> Float[Tensor, "ray sample"]:
        """Without gradients, on a CPU and with numba installed, ray by ray in compiled code."""
        if dispatch.usable(hidden):
            t = self.ray_transformer
            inner, density = (layer for layer in self.density if isinstance(layer, nn.Linear))
            network = dispatch.DensityNetwork(t.heads, t.query, t.key, t.value, t.merge, t.norm, inner, density)
            # channels first, as the kernel's vectors lie along a ray
            tokens = torch.addmm(self.to_ray.bias[:, None], self.to_ray.weight, hidden.flatten(0, 1).T)
            return dispatch.ray_densities(network, tokens.unflatten(1, hidden.shape[:2]), asking, answering)
        tokens = self.ray_transformer(F.relu_(self.to_ray(hidden)), asking, answering)
        return self.density(tokens)[..., 0]

    def _directional(
        self, hidden: Float[Tensor, "ray sample hidden"], directions: Float[Tensor, "ray 3"]
    ) -> Float[Tensor, "ray sample half"]:
        """``directional`` of (``feature`` of hidden, direction): nothing lies between the two linear maps, so that they
        are one, and the direction's share is the same along a ray.
        """
        width = self.feature.out_features
        of_feature, of_direction = self.directional.weight.split([width, 3], 1)
        bias = of_feature @ self.feature.bias + self.directional.bias
        of_ray = F.linear(directions, of_direction, bias)
        return F.linear(hidden, of_feature @ self.feature.weight) + of_ray[:, None]
