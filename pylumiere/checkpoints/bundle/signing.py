"""Ed25519 keys in PEM, and the check of a manifest's signature."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pylumiere.checkpoints.bundle.folder import read_limited
from pylumiere.checkpoints.bundle.manifest import MANIFEST, SIGNATURE
from pylumiere.errors import BundleError, IntegrityError, one_line


def check_signature(root: int, raw: bytes, is_signed: bool, key: Any, path: Path) -> None:
    from cryptography.exceptions import InvalidSignature

    if not is_signed:
        raise IntegrityError(f"{path} is not signed ({SIGNATURE} is missing), and a trusted key was given")
    signature = read_limited(root, SIGNATURE, 64, path)
    try:
        key.verify(signature, raw)
    except InvalidSignature:
        raise IntegrityError(f"{path}: {SIGNATURE} is not the trusted key's signature of {MANIFEST}") from None


def load_public_key(key: Any):
    """An Ed25519 public key from a PEM file.

    Raises:
        BundleError: no such file, or no such key in it.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if isinstance(key, Ed25519PublicKey):
        return key
    try:
        loaded = serialization.load_pem_public_key(_read_small(Path(key)))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise BundleError(f"{key} is no public key in PEM: {one_line(error)[:120]}") from None
    if not isinstance(loaded, Ed25519PublicKey):
        raise BundleError(f"{key} is no Ed25519 key")
    return loaded


def make_key_pair(private: str | os.PathLike, public: str | os.PathLike) -> None:
    """Writes a new Ed25519 key pair as PEM files, the private one for its owner's eyes only. Nothing is overwritten.

    Raises:
        BundleError: a file is there already, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    shown = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    if Path(public).exists():
        raise BundleError(f"{public} exists; it is not overwritten")
    for path, data, mode in ((private, secret, 0o600), (public, shown, 0o644)):
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        except OSError as error:
            raise BundleError(f"{path} cannot be written: {error.strerror}") from None
        with os.fdopen(handle, "wb") as file:
            file.write(data)


def load_private_key(key: Any):
    """An Ed25519 private key from a PEM file.

    Raises:
        BundleError: no such file, or no such key in it.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if isinstance(key, Ed25519PrivateKey):
        return key
    try:
        loaded = serialization.load_pem_private_key(_read_small(Path(key)), password=None)
    except (ValueError, TypeError) as error:
        raise BundleError(f"{key} is no private key in PEM without a password: {one_line(error)}") from None
    if not isinstance(loaded, Ed25519PrivateKey):
        raise BundleError(f"{key} is no Ed25519 key")
    return loaded


def _read_small(path: Path, limit: int = 2**16) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise BundleError(f"{path} is larger than {limit} bytes")
    return data
