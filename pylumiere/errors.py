"""Errors that callers may want to catch. Each is a subclass of the built-in that fits: `except ValueError` works.

Every message is one line that names the value and what is allowed. The command line turns the user's mistakes
(`USER_ERRORS`) into that line and exit code 2.
"""

from __future__ import annotations


class InvalidRequest(ValueError):
    """A request that no model takes, or not this one: the field, its value and what is allowed."""


class BundleError(ValueError):
    """A model folder or bundle that is missing, malformed, truncated or does not fit its own description."""


class IntegrityError(BundleError):
    """A bundle whose bytes are not those that its manifest (or its signature) promises."""


class UnsupportedDevice(RuntimeError):
    """A backend, device or precision that was asked for and cannot run here: the reason and the remedy."""


class BudgetExceeded(MemoryError):
    """A request that does not fit the memory budget: what it needs, what there is, and what would fit."""


class Cancelled(RuntimeError):
    """The work was cancelled before it ended."""


class DeadlineExceeded(TimeoutError):
    """A request that was not done in the time that it was given; what was computed for it is dropped."""


class QueueFull(RuntimeError):
    """More requests wait than the engine was told to hold. Try again later."""


class VideoError(ValueError):
    """A video or picture that cannot be read, or an output that cannot be written."""


USER_ERRORS = (InvalidRequest, BundleError, UnsupportedDevice, BudgetExceeded, VideoError)


def one_line(error: object) -> str:
    """The text of someone else's error in one line of at most 400 characters; its kind where it has no text."""
    return " ".join(str(error).split())[:400] or type(error).__name__
