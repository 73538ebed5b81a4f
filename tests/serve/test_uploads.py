"""What an upload is taken for: by its content, not by its name."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from support.clips import encode, shades

from pylumiere.media.readers import Limits
from pylumiere.serve.media import clip_rate, is_picture


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_picture_that_moves_is_a_clip(format):
    frames = [Image.fromarray(frame) for frame in shades(3)]
    for count in (1, 3):
        file = io.BytesIO()
        frames[0].save(file, format, save_all=True, append_images=frames[1:count], duration=100)
        assert is_picture(file.getvalue()) == (count == 1)
    assert clip_rate(file.getvalue(), "video", Limits()) == 10


def test_a_phones_picture_with_a_preview_in_it_is_a_picture():
    frames = [Image.fromarray(frame) for frame in shades(2)]
    file = io.BytesIO()
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    assert is_picture(file.getvalue()) and not is_picture(encode(shades(2)))
