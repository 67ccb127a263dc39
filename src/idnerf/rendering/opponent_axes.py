"""Opponent axes of colour: brightness, red-blue, green-purple. Latents begin along them (models, priors)."""

import torch

OPPONENT_AXES = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
OPPONENT_AXES = OPPONENT_AXES / OPPONENT_AXES.norm(dim=1, keepdim=True)
"""[axis, RGB], of length 1."""
OPPONENT_DEVIATIONS = torch.tensor([0.77, 0.185, 0.14])
"""Of the mean colours (in [-1, 1]) of 8x8 blocks along these axes, over procedural scenes."""
