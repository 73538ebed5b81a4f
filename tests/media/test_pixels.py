"""Pixels of the networks as bytes, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from pylumiere.media.pixels import to_uint8, to_yuv420p


def test_pixels():
    ramp = (np.arange(256, dtype=np.float32) / 127.5 - 1).reshape(16, 16)
    assert np.array_equal(to_uint8(ramp), np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert to_uint8(np.array([np.nan, -3, 3], np.float32)).tolist() == [0, 0, 255]
    red = np.broadcast_to(np.array([1, -1, -1], np.float32), (2, 4, 6, 3))
    planes = to_yuv420p(red, "bt601")
    assert planes.shape == (2, 6, 6)
    assert (planes[:, :4] == 81).all() and (planes[:, 4] == 90).all() and (planes[:, 5] == 240).all()
    with pytest.raises(ValueError, match="height=3"):
        to_yuv420p(np.zeros((1, 3, 4, 3), np.float32))
