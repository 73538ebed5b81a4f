"""The same inputs in every run: a failure is a fault, not a draw."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from pylumiere.kernels import launching

settings.register_profile("kernels", deadline=None, derandomize=True)
settings.load_profile("kernels")

FAR = 2**31 + 64


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def far_apart():
    """Makes float16 tensors of random values whose elements along one axis lie more than 2^31 elements apart.

    The memory between is zero pages that nobody touches.
    """

    def make(shape: tuple[int, ...], axis: int) -> torch.Tensor:
        stride = list(torch.empty(shape, device="meta").stride())
        stride[axis] = FAR
        elements = FAR * (shape[axis] - 1) + torch.Size(shape).numel()
        if launching.interpreted():
            memory = torch.from_numpy(np.zeros(elements, dtype=np.float16))
        else:
            memory = torch.zeros(elements, dtype=torch.float16, device="cuda")
        return memory.as_strided(shape, stride).copy_(torch.randn(shape))

    return make
