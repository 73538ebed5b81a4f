"""The command line: a file per group of verbs, and `app.py`, which makes one program of them.

A verb reads its options, calls the library and says what came of it. Nothing here computes, and no torch is loaded
before a verb runs.
"""

from pylumiere.cli.app import main

__all__ = ["main"]
