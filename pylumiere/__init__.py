"""pylumiere: an inference runtime for Space-Time U-Nets. Text in, video out.

The public names are imported when they are first used: `import pylumiere` itself loads no torch, touches no device and
reads no environment variable.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOME = {
    "Engine": "pylumiere.engine",
    "GenerationRequest": "pylumiere.request",
    "Progress": "pylumiere.request",
    "Video": "pylumiere.media.video",
    "BudgetExceeded": "pylumiere.errors",
    "BundleError": "pylumiere.errors",
    "Cancelled": "pylumiere.errors",
    "IntegrityError": "pylumiere.errors",
    "InvalidRequest": "pylumiere.errors",
    "UnsupportedDevice": "pylumiere.errors",
    "VideoError": "pylumiere.errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'pylumiere' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
