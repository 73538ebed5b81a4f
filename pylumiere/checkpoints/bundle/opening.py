"""Opening a bundle: the folder against its manifest, then every file's hash."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pylumiere.checkpoints.bundle.folder import CHUNK, open_below, read_limited, walk
from pylumiere.checkpoints.bundle.manifest import (
    MANIFEST,
    MAX_BYTES,
    MAX_MANIFEST_BYTES,
    SIGNATURE,
    FileEntry,
    Manifest,
    parse_manifest,
)
from pylumiere.checkpoints.bundle.signing import check_signature, load_public_key
from pylumiere.errors import BundleError, IntegrityError


class Bundle:
    """An open bundle. `open_bundle` makes it; it may be shared between threads.

    Attributes:
        path: of the folder.
        manifest: what it says.
        is_signed: a manifest.sig is there.
        is_trusted: it was checked against a trusted key.
    """

    def __init__(self, path: Path, root: int, manifest: Manifest, is_signed: bool, is_trusted: bool):
        self.path, self.manifest, self.is_signed, self.is_trusted = path, manifest, is_signed, is_trusted
        self.config = manifest.config
        # Files are opened below this descriptor: a bundle that is replaced by name stays the one that was checked.
        self._root = root
        weakref.finalize(self, os.close, root)

    def read(self, name: str) -> bytes:
        """A listed file's bytes, hashed as they are in memory.

        Raises:
            IntegrityError: they are not those of the manifest.
            BundleError: the file is not listed, or cannot be read.
        """
        entry = self._entry(name)
        with open_below(self._root, name, self.path) as file:
            if os.fstat(file.fileno()).st_size != entry.size:  # before that much is allocated
                raise self._changed(name)
            data = file.read(entry.size)
            if len(data) != entry.size or file.read(1):
                raise self._changed(name)
        self._check(name, entry, hashlib.sha256(data).hexdigest())
        return data

    def check_hashes(self, on_file: Callable[[str, int], None] | None = None) -> None:
        """Compares every file with its size and hash. `on_file(path, bytes)` is called after each.

        Raises:
            IntegrityError, BundleError: as `read`; the first file that differs is named.
        """
        piece = bytearray(CHUNK)
        for name, entry in self.manifest.files.items():
            digest, size = hashlib.sha256(), 0
            with open_below(self._root, name, self.path) as file:
                while size <= entry.size and (count := file.readinto(piece)):
                    digest.update(memoryview(piece)[:count])
                    size += count
            if size != entry.size:
                raise self._changed(name)
            self._check(name, entry, digest.hexdigest())
            if on_file is not None:
                on_file(name, entry.size)

    def _entry(self, name: str) -> FileEntry:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name!r} is not listed in the manifest")
        return self.manifest.files[name]

    def _check(self, name: str, entry: FileEntry, digest: str) -> None:
        if digest != entry.sha256:
            raise IntegrityError(f"{self.path}: {name} is damaged or was changed: its SHA-256 is not the manifest's")

    def _changed(self, name: str) -> IntegrityError:
        return IntegrityError(f"{self.path}: {name} changed its size while it was read")


def is_bundle(path: str | os.PathLike) -> bool:
    """Whether a path is meant as a bundle: it ends in .plm, or is a folder with a manifest."""
    return Path(path).suffix == ".plm" or (Path(path) / MANIFEST).is_file()


def open_bundle(
    path: str | os.PathLike, trusted_key: Any = None, *, check_hashes: bool = True, max_bytes: int = MAX_BYTES
) -> Bundle:
    """Opens a bundle after checking all of it; nothing in it is parsed but the manifest.

    Args:
        path: the folder.
        trusted_key: an Ed25519 public key (of `cryptography`), or the path of one in PEM. Given, the bundle must carry
            that key's signature; without one, a signature is not looked at.
        check_hashes: False leaves the files' content to `Bundle.check_hashes` and `Bundle.read`.
        max_bytes: of all files together; more is refused before any is read.

    Raises:
        IntegrityError: a file's size or hash, or the signature, is not as it should be.
        BundleError: everything else that is wrong with it.
    """
    path = Path(path)
    key = None if trusted_key is None else load_public_key(trusted_key)
    try:
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise BundleError(f"bundle {str(path)!r} cannot be opened: {getattr(error, 'strerror', error)}") from None
    try:
        raw = read_limited(root, MANIFEST, MAX_MANIFEST_BYTES, path)
        found = walk(root, path)
        is_signed = SIGNATURE in found
        if key is not None:
            check_signature(root, raw, is_signed, key, path)
        manifest = parse_manifest(raw, str(path))
        _compare(manifest, found, max_bytes, path)
        bundle = Bundle(path, root, manifest, is_signed, key is not None)
    except BaseException:
        os.close(root)
        raise
    if check_hashes:
        bundle.check_hashes()
    return bundle


def _compare(manifest: Manifest, found: Mapping[str, int], max_bytes: int, path: Path) -> None:
    """The folder against the manifest: names, then sizes, before a byte is read."""
    total = sum(entry.size for entry in manifest.files.values())
    if total > max_bytes:
        raise BundleError(f"{path}: its files add up to {total} bytes; at most {max_bytes} are allowed")
    present = set(found) - {MANIFEST, SIGNATURE}
    if missing := sorted(set(manifest.files) - present):
        raise BundleError(f"{path}: {missing[0]} is missing" + _more(missing))
    if unlisted := sorted(present - set(manifest.files)):
        raise BundleError(f"{path}: {unlisted[0][:80]!a} is not listed in the manifest" + _more(unlisted))
    for name, entry in manifest.files.items():
        if found[name] != entry.size:
            raise IntegrityError(f"{path}: {name} has {found[name]} bytes; the manifest says {entry.size}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
