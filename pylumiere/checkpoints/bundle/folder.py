"""What lies below an open folder: files by name and size, opened without following a link."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pylumiere.checkpoints.bundle.manifest import MAX_FILES
from pylumiere.errors import BundleError

CHUNK = 2**20  # bytes that are hashed at once


def walk(root: int, path: Path) -> dict[str, int]:
    """Relative path and size of every file. Anything but plain files and folders is refused."""
    found: dict[str, int] = {}
    folders = [""]
    for folder in folders:  # grows
        if len(folders) > MAX_FILES:
            raise BundleError(f"{path} has more than {MAX_FILES} folders")
        handle = _open_folder(root, folder, path)
        try:
            with os.scandir(handle) as entries:
                names = [entry.name for _, entry in zip(range(MAX_FILES + 3), entries, strict=False)]
            if len(names) > MAX_FILES + 2:
                raise BundleError(f"{path} has more than {MAX_FILES} files")
            for name in names:
                where = f"{folder}{name}"
                facts = os.stat(name, dir_fd=handle, follow_symlinks=False)
                if stat.S_ISDIR(facts.st_mode):
                    if where.count("/") >= 8:
                        raise BundleError(f"{path}: folders are nested too deep: {where[:80]!a}")
                    folders.append(f"{where}/")
                elif stat.S_ISREG(facts.st_mode):
                    found[where] = facts.st_size
                else:
                    raise BundleError(f"{path}: {where[:80]!a} is a link or a device, which no bundle holds")
        except OSError as error:
            raise BundleError(f"{path}: {folder[:80]!a} cannot be read: {error.strerror}") from None
        finally:
            os.close(handle)
        if len(found) > MAX_FILES + 2:
            raise BundleError(f"{path} has more than {MAX_FILES} files")
    listed = {name.rsplit("/", depth)[0] + "/" for name in found for depth in range(1, name.count("/") + 1)}
    if empty := sorted(set(folders) - listed - {""}):
        raise BundleError(f"{path}: folder {empty[0][:80]!a} is empty")
    return found


def _open_folder(root: int, folder: str, path: Path) -> int:
    """A descriptor of a folder below `root`; no part of the way may be a link."""
    handle = os.dup(root)
    try:
        for part in folder.split("/"):
            if part:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
                os.close(handle)
                handle = below
    except OSError as error:
        os.close(handle)
        raise BundleError(f"{path}: {folder[:80]!a} cannot be opened: {error.strerror}") from None
    # A descriptor of its own place in the folder: that of `root` is shared by its copies.
    own = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=handle)
    os.close(handle)
    return own


def open_below(root: int, name: str, path: Path):
    """A plain file below `root`, for reading."""
    folder, _, last = name.rpartition("/")
    above = _open_folder(root, folder, path)
    try:
        # O_NONBLOCK: a pipe that took the file's place must not make us wait.
        handle = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=above)
    except OSError as error:
        raise BundleError(f"{path}: {name} cannot be opened: {error.strerror}") from None
    finally:
        os.close(above)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BundleError(f"{path}: {name} is no plain file")
    return open(handle, "rb")


def read_limited(root: int, name: str, limit: int, path: Path) -> bytes:
    with open_below(root, name, path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(limit + 1)
    if max(size, len(data)) > limit:
        raise BundleError(f"{path}: {name} has {size} bytes; at most {limit} are read")
    return data
