"""Clips as they are found: what a container says of itself is a hint, each frame that is shown comes out once."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from support.clips import encode, packets_of, piped, remux, shades, shown

from pylumiere.errors import VideoError
from pylumiere.media.readers import Limits, VideoReader

FRAGMENTS = {
    "by key frame": "frag_keyframe",
    "by key frame, header alone first": "frag_keyframe+empty_moov+default_base_moof",
    "by frame": "frag_every_frame+empty_moov",
}


def read(source) -> tuple[list[int], VideoReader]:
    with VideoReader(source) as reader:
        return shown(reader), reader


def starts(source) -> list[float]:
    with VideoReader(source) as reader:
        return [float(time) for time, _ in reader.timed()]


def open_groups(format: str = "mp4", codec: str = "libx264") -> bytes:
    """30 frames in groups of 9; the first that are shown of a group refer to the group before."""
    groups = "open-gop=1:keyint=9:min-keyint=9:scenecut=0:bframes=2:b-adapt=0"
    options = {f"{codec[3:]}-params": f"{groups}:log-level=none" if codec == "libx265" else groups}
    return encode(shades(30), format, codec, options=options, gop=9, b_frames=2)


# ---- cut without encoding again --------------------------------------------------------------------------------------


def test_an_edit_list_hides_what_is_before_the_cut(monkeypatch):
    """As `ffmpeg -ss 0.8125 -c copy` cuts: from the key frame before on, with times below 0 for what is not shown."""
    packets = packets_of(encode(shades(30), gop=10))
    kept = packets[[packet.key for packet in packets].index(True, 1) :]
    for packet in kept:
        packet.pts -= Fraction(13, 16)
        packet.dts -= Fraction(13, 16)
    data = remux(encode(shades(2)), "mp4", kept)
    found, reader = read(data)
    assert found == list(range(13, 30))
    assert (reader.num_frames, reader.fps) == (17, 16)
    assert starts(data) == [k / 16 for k in range(17)]
    assert read(piped(monkeypatch, data))[0] == list(range(13, 30))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_an_open_group_that_was_cut_begins_at_its_key_frame(format, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no encoder {codec}")
    data = open_groups(codec=codec)
    packets = packets_of(data)
    second = [packet.key for packet in packets].index(True, 1)
    assert any(packet.pts < packets[second].pts for packet in packets[second:]), "the group is closed"
    found, reader = read(remux(data, format, packets[second:]))
    assert found == list(range(9, 30))
    assert (reader.num_frames, reader.fps) == (21, 16)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3])
def test_a_recording_that_begins_in_the_middle_of_a_group(share):
    """A transport stream from which the start is gone; its tables are sent again."""
    data = open_groups("mpegts")
    cells = len(data) // 188
    found, reader = read(data[: 3 * 188] + data[round(share * cells) * 188 :])
    assert found == list(range(9, 30))
    assert reader.fps == 16


@pytest.mark.parametrize("movflags", FRAGMENTS.values(), ids=FRAGMENTS.keys())
def test_all_fragments_come_out(monkeypatch, movflags):
    data = encode(shades(40), gop=16, container={"movflags": movflags})
    found, reader = read(data)
    assert found == list(range(40))
    assert (reader.num_frames, reader.fps, reader.last_duration) == (40, 16, Fraction(1, 16))
    assert read(piped(monkeypatch, data))[0] == list(range(40))


# ---- what outlasts the picture ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("format, codec", [("matroska", "libx264"), ("webm", "libvpx-vp9"), ("webm", "libvpx"),
                                           ("mp4", "libx264"), ("mov", "libx264")])  # fmt: skip
def test_sound_that_outlasts_the_picture(monkeypatch, format, codec):
    data = remux(encode(shades(8), "webm" if format == "webm" else "mp4", codec), format, sound=3)
    found, reader = read(data)
    assert found == list(range(8))
    assert reader.fps == 16 and float(reader.last_duration) == pytest.approx(1 / 16, abs=0.002)
    assert read(piped(monkeypatch, data))[0] == list(range(8))


def test_subtitles_that_outlast_the_picture():
    found, reader = read(remux(encode(shades(8)), "matroska", subtitles=9))
    assert found == list(range(8))
    assert float(reader.last_duration) == pytest.approx(1 / 16, abs=0.002)


@pytest.mark.parametrize("format, codec", [("matroska", "libx264"), ("webm", "libvpx-vp9")])
@pytest.mark.parametrize("sound", [None, 2])
def test_a_last_frame_that_is_held(format, codec, sound):
    found, reader = read(remux(encode(shades(8), format, codec, b_frames=0), format, last=5, sound=sound))
    assert found == list(range(8))
    assert reader.fps == 16 and float(reader.last_duration) == pytest.approx(5, abs=0.002)


# ---- empty packets, hidden packets ---------------------------------------------------------------------------------


def gaps(format: str, codec: str, slots: list[int]) -> bytes:
    """Frames in some of the places of a container that has one for each sixteenth; the muxer fills the others."""
    data = encode(shades(len(slots)), format, codec, b_frames=0)
    packets = packets_of(data)
    for packet, slot in zip(packets, slots, strict=True):
        packet.pts = packet.dts = Fraction(slot, 16)
    return remux(data, format, packets)


@pytest.mark.parametrize("format, codec", [("avi", "mpeg4"), ("avi", "libx264"), ("ogg", "libvpx")])
def test_an_empty_packet_holds_the_frame_before_it(monkeypatch, format, codec):
    slots = [0, 1, 4, 5, 7, 8, 9, 12]
    data = gaps(format, codec, slots)
    found, reader = read(data)
    assert found == list(range(8)) and reader.num_frames == 8
    assert read(piped(monkeypatch, data))[0] == list(range(8))
    if codec == "mpeg4":  # H.264 in avi and VP8 within a page of Ogg have no times of their own; FFmpeg guesses them
        assert starts(data) == [slot / 16 for slot in slots]
        assert reader.fps == pytest.approx(8 / (13 / 16))


def test_empty_packets_at_the_end_of_an_avi_hold_its_last_frame():
    data = bytearray(gaps("avi", "mpeg4", [0, 1, 2, 3, 4, 5]))
    frame = data.rindex(b"00dc", 0, data.rindex(b"idx1"))
    size = int.from_bytes(data[frame + 4 : frame + 8], "little")
    assert size > 0
    data[frame + 4 : frame + 8] = bytes(4)  # the sixth has nothing in it, and its bytes are junk
    data[frame + 8 : frame + 16] = b"JUNK" + (size + size % 2 - 8).to_bytes(4, "little")
    entry = len(data) - 16
    while data[entry : entry + 4] != b"00dc":
        entry -= 1
    data[entry + 12 : entry + 16] = bytes(4)
    found, reader = read(bytes(data))
    assert found == list(range(5))
    assert (reader.fps, reader.last_duration) == (16, Fraction(2, 16))


def test_hidden_packets_of_vp8_are_no_frames():
    data = encode(shades(8), "webm", "libvpx", gop=1)
    packets = packets_of(data)
    hidden = type(packets[3])(**vars(packets[3]))
    hidden.data = bytes([hidden.data[0] & ~0x10]) + hidden.data[1:]  # show_frame, RFC 6386, 9.1
    hidden.pts = hidden.dts = packets[3].pts - Fraction(1, 100)
    found, reader = read(remux(data, "webm", [*packets[:3], hidden, *packets[3:]]))
    assert found == list(range(8))
    assert (reader.num_frames, reader.fps) == (8, 16)


# ---- what is not whole -----------------------------------------------------------------------------------------------

NOISE = [np.random.default_rng(index).integers(0, 128, (32, 32, 3), np.uint8) for index in range(24)]
WHOLE = {
    "mp4": lambda: encode(NOISE, gop=8),
    "mp4 in fragments": lambda: encode(NOISE, gop=8, container={"movflags": FRAGMENTS["by key frame"]}),
    "mp4 with sound": lambda: remux(encode(NOISE, gop=8), "mp4", sound=3),
    "mov": lambda: encode(NOISE, "mov", "qtrle", pixels="rgb24"),
    "matroska": lambda: encode(NOISE, "matroska", gop=8),
    "matroska with sound": lambda: remux(encode(NOISE, gop=8), "matroska", sound=3),
    "matroska that is held": lambda: remux(encode(NOISE, gop=8), "matroska", last=5),
    "webm": lambda: encode(NOISE, "webm", "libvpx-vp9", gop=8),
    "webm from a browser": lambda: encode(NOISE, "webm", "libvpx", gop=8, container={"live": "1"}),
    "ogg": lambda: encode(NOISE, "ogg", "libvpx", gop=8),
    "ivf": lambda: encode(NOISE, "ivf", "libvpx", gop=8),
    "y4m": lambda: encode(NOISE, "yuv4mpegpipe", "wrapped_avframe"),
    "gif": lambda: encode(NOISE, "gif", "gif", pixels="rgb8"),
    "apng": lambda: encode(NOISE, "apng", "apng", pixels="rgb24"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_ends_too_early_is_refused_before_a_frame_is_decoded(monkeypatch, name):
    data = WHOLE[name]()
    assert len(read(data)[0]) == 24
    monkeypatch.setattr(VideoReader, "timed", None)
    for share in (0.05, 0.3, 0.6, 0.8, 0.97):
        with pytest.raises(VideoError, match="damaged"):
            VideoReader(data[: int(share * len(data))])


@pytest.mark.parametrize("name", [name for name in WHOLE if name not in ("webm from a browser", "ogg")])
def test_a_pipe_that_ends_too_early_is_refused_at_its_end(monkeypatch, name):
    data = WHOLE[name]()
    for share in (0.3, 0.6, 0.97):
        with pytest.raises(VideoError, match="damaged"):
            read(piped(monkeypatch, data[: int(share * len(data))]))


@pytest.mark.parametrize("format, codec", [("avi", "mpeg4"), ("avi", "libx264"), ("mpegts", "mpeg2video")])
def test_every_cut_of_a_file_gives_frames_that_are_right_or_an_error(format, codec):
    whole = encode(NOISE, format, codec, gop=8, b_frames=0)
    with VideoReader(whole) as reader:
        expected = list(reader)
    refused = 0
    for end in range(len(whole) // 3, len(whole) - 400, len(whole) // 40):
        try:
            with VideoReader(whole[:end]) as reader:
                found = list(reader)
        except VideoError as error:
            refused += "\n" not in str(error)
            continue
        assert len(found) < 24 and all(map(np.array_equal, found, expected)), end
    assert refused > 15


def test_a_fragment_whose_header_is_cut_is_no_end():
    data = WHOLE["mp4 in fragments"]()
    for end in (data.rindex(b"moof") + 20, data.rindex(b"moof") + 60):
        with pytest.raises(VideoError, match="its end is missing"):
            VideoReader(data[:end])


def test_bytes_after_the_end_are_not_the_clips():
    for name in ("mp4", "matroska", "gif"):
        assert len(read(WHOLE[name]() + bytes(512))[0]) == 24


def test_damage_in_the_middle_is_refused():
    data = bytearray(encode(NOISE, "mpegts", gop=24))
    data[len(data) // 2 : len(data) // 2 + 1000] = bytes(1000)
    with pytest.raises(VideoError, match="damaged"):
        read(bytes(data))


def test_too_many_packets_are_refused_before_the_first_is_decoded(monkeypatch):
    data = gaps("avi", "mpeg4", [0, 1, 4, 5, 7, 8, 9, 12])
    monkeypatch.setattr(VideoReader, "timed", None)
    with pytest.raises(VideoError, match="has more than 7 frames"):
        VideoReader(data, Limits(max_frames=7))
