"""What readers and writers share of FFmpeg, which is used through PyAV."""

from __future__ import annotations

import contextlib

from pylumiere.errors import VideoError

PIPE = "-"  # as a path: standard input or output


def import_av():
    import av
    import av.filter

    av.logging.set_level(None)  # errors come as exceptions; FFmpeg's own lines would break the one-line rule
    return av


@contextlib.contextmanager
def as_video_error(path: str, *, reading: bool = False, position=None):
    """Turns FFmpeg's and the system's errors into one line about the file."""
    av = import_av()
    try:
        yield
    except VideoError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        text = getattr(error, "strerror", None) or str(error)
        where = f" after frame {position()}" if position is not None else ""
        what = "input" if reading else "output"
        verb = "is damaged or no video" if reading else "cannot be written"
        raise VideoError(f"{what} {path!r} {verb}{where}: {text}") from error
