"""The mean of several weights of one configuration: trainings from common weights disagree mostly in noise, of which a
mean has less ("model soups", arXiv 2203.05482)."""

from collections.abc import Sequence

import torch

from idnerf.errors import InputError
from idnerf.models.idnerf import IDNeRF, config_to_json


@torch.no_grad()
def mean_of_weights(weights: Sequence[str]) -> IDNeRF:
    """A model whose parameters are the means of those of ``weights`` (as ``IDNeRF.from_pretrained`` takes them).

    Its ``metadata`` say what it is the mean of, and as ``step`` the steps of the one that had most.

    Raises:
        InputError: weights of different configurations.
    """
    models = [IDNeRF.from_pretrained(name) for name in weights]
    mean = models[0]
    for name, model in zip(weights, models, strict=True):
        if config_to_json(model.config) != config_to_json(mean.config):
            raise InputError(f"expected weights of one configuration, {name} has other options than {weights[0]}")
    origins = [dict(model.metadata.get("training") or {}) for model in models]
    steps = [m.metadata.get("step", 0) + o.get("earlier_steps", 0) for m, o in zip(models, origins, strict=True)]
    digests = [model.fingerprint() for model in models]
    others = [model.state_dict() for model in models]
    mean.load_state_dict({name: mean_tensor([state[name] for state in others]) for name in others[0]})
    kept = {key: value for model in reversed(models) for key, value in model.metadata.items()}
    mean.metadata = {  # what one of them was refined on or converted from holds of the mean too
        **kept,
        "step": max(steps),
        "training": {
            "data": "; ".join(dict.fromkeys(origin.get("data", "not recorded") for origin in origins)),
            "mean_of": [f"{n} ({s} steps, {d})" for n, s, d in zip(weights, steps, digests, strict=True)],
        },
    }
    return mean


def mean_tensor(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean; of whole numbers, which are no parameters, the first."""
    if not values[0].is_floating_point():
        return values[0].clone()
    return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)
