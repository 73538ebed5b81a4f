"""Made-up weights for networks that are measured without a checkpoint."""

from __future__ import annotations

import torch

from pylumiere.networks.families import AnyConfig, expected_shapes


def random_weights(config: AnyConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a network, random also where training starts at zero: no part of it is without effect."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        tensor = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            tensor /= tensor[0].numel() ** 0.5
        elif "norm" in name and name.endswith("weight"):
            tensor = 1 + 0.1 * tensor
        else:
            tensor *= 0.1
        weights[name] = tensor
    return weights
