"""Inner loops compiled for the processor (numba, an extra); without it everything runs on PyTorch."""
