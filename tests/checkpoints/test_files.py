"""Checks that every reader of weights makes."""

from __future__ import annotations

import pytest
import torch

from pylumiere.checkpoints.files import is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(dtype, bad):
    """Whole vectors, their ends and what is left over take different ways through torch."""
    for size in (1, 7, 67, 300):
        values = torch.randn(size).to(dtype)
        assert is_finite(values)
        for i in range(size):
            spoiled = values.clone()
            spoiled[i] = bad
            assert not is_finite(spoiled)
    assert not is_finite(torch.tensor([torch.inf, torch.nan, -torch.inf], dtype=dtype))


def test_shapes_that_are_not_one_block():
    values = torch.randn(30, 40)
    values[3, 5] = torch.nan
    assert not is_finite(values.t()) and not is_finite(values[:, 5]) and is_finite(values[:, 6])
    assert is_finite(torch.empty(0)) and is_finite(torch.finfo(torch.float32).max * torch.ones(()))
