"""Writing a bundle's manifest over the files that are there."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from pylumiere.checkpoints.bundle.folder import CHUNK
from pylumiere.checkpoints.bundle.manifest import MANIFEST, SIGNATURE, FileEntry, Manifest, parse_manifest
from pylumiere.checkpoints.bundle.signing import load_private_key


def file_entry(path: str | os.PathLike) -> FileEntry:
    """Size and SHA-256 of a file, read in pieces."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            size += len(piece)
    return FileEntry(size=size, sha256=digest.hexdigest())


def describe_files(folder: str | os.PathLike) -> dict[str, FileEntry]:
    """Every file below a folder but the manifest and its signature, sorted by path: `Manifest.files`."""
    folder = Path(folder)
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    return {name: file_entry(found[name]) for name in sorted(found) if name not in (MANIFEST, SIGNATURE)}


def write_manifest(folder: str | os.PathLike, manifest: Manifest, sign_key: Any = None) -> None:
    """Writes manifest.json, and manifest.sig where a key is given, into a folder that has all the files already.

    Args:
        sign_key: an Ed25519PrivateKey of `cryptography`, or the path of one in PEM.

    Raises:
        BundleError: a manifest that no loader would take, or a key that is none.
    """
    folder = Path(folder)
    raw = (manifest.model_dump_json(indent=1) + "\n").encode()
    parse_manifest(raw)
    signature = None if sign_key is None else load_private_key(sign_key).sign(raw)
    (folder / SIGNATURE).unlink(missing_ok=True)
    _write(folder / MANIFEST, raw)
    if signature is not None:
        _write(folder / SIGNATURE, signature)


def _write(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
