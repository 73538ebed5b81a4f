"""A bundle: one folder with a model and what was built from it for each GPU, described by a manifest.

    name.plm/
      manifest.json          what is in it: every file with size and SHA-256, every artefact with its target
      manifest.sig           Ed25519 signature over the bytes of manifest.json, optional; 64 bytes
      model/ text/ onnx/ kernels/ engines/

A bundle is untrusted until it is checked, and a plan or a graph is code to the library that parses it. So the order is
fixed: the manifest's size, its signature, its JSON, its fields; then the folder against the manifest, names and sizes;
then every file's hash; and only then may a native library see a byte. `Bundle.read` hands out the very bytes that it
hashed, so a file that changes later changes nothing.

The manifest's fields (`manifest.py`), the folder (`folder.py`), opening, signing and writing live here.
Nothing here parses a weight, a graph or a plan.
"""

from pylumiere.checkpoints.bundle.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_VALUES,
    SCHEMA_VERSION,
    SIGNATURE,
    Artefact,
    Comparison,
    FileEntry,
    Library,
    Manifest,
    Receipt,
    ShapeRange,
    Target,
    TensorSpec,
    TextEncoder,
    parse_manifest,
)
from pylumiere.checkpoints.bundle.opening import Bundle, is_bundle, open_bundle
from pylumiere.checkpoints.bundle.signing import load_private_key, load_public_key, make_key_pair
from pylumiere.checkpoints.bundle.writing import describe_files, file_entry, write_manifest

__all__ = [
    "MANIFEST", "MAX_MANIFEST_BYTES", "MAX_MANIFEST_VALUES", "SCHEMA_VERSION", "SIGNATURE", "Artefact", "Bundle",
    "Comparison", "FileEntry", "Library", "Manifest", "Receipt", "ShapeRange", "Target", "TensorSpec", "TextEncoder",
    "describe_files", "file_entry", "is_bundle", "load_private_key", "load_public_key", "make_key_pair", "open_bundle",
    "parse_manifest", "write_manifest",
]  # fmt: skip
