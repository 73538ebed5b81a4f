"""Backends: one file each, and `choice`, which says what runs on this machine and why."""

from pylumiere.backends.choice import BACKENDS, PRECISIONS, Choice, choose

__all__ = ["BACKENDS", "PRECISIONS", "Choice", "choose"]
