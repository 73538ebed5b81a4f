"""The bundle: plans what is to be built for which GPU, has it built, and writes it in one piece.

Everything goes into a folder beside the output, which takes the output's name when it is complete.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pylumiere.export import to_tensorrt
from pylumiere.export.cache import Cache
from pylumiere.export.source import Source
from pylumiere.export.spec import network_specs
from pylumiere.export.steps import Export, Progress
from pylumiere.export.targets import ExportOptions, Targets, choose_targets, local_gpu

from pylumiere import __version__
from pylumiere.checkpoints import bundle
from pylumiere.errors import BundleError, InvalidRequest, UnsupportedDevice


def export_bundle(
    model: str,
    output: str | os.PathLike,
    options: ExportOptions = ExportOptions(),  # noqa: B008 (frozen)
    *,
    force: bool = False,
    sign_key: str | os.PathLike | None = None,
    temporal_shift: Any = None,
    cache_folder: Path | None = None,
    on_progress: Progress = lambda job, done, phase: None,
) -> dict[str, Any]:
    """Writes a bundle.

    Args:
        model: a shipped name, a model folder, a folder as diffusers saves it, or a bundle, whose artefacts are then
            kept beside the new ones.
        output: NAME.plm; the bundle is there in one piece or not at all.
        force: replace a bundle that is there.
        sign_key: private Ed25519 key in PEM.
        temporal_shift: for a folder as diffusers saves it; see `Engine.load`.

    Returns:
        what was built: output, bytes, seconds, artefacts (name, bytes, seconds, cached), notes, peak_bytes (of the
        largest process), cached (steps taken from the cache), steps.

    Raises:
        InvalidRequest, BundleError, UnsupportedDevice: the user's mistakes, a full disk among them.
    """
    begun = time.monotonic()
    output = _check_output(Path(output), force)
    gpu = local_gpu() if "this" in options.skus else None
    targets = choose_targets(options, gpu)
    _check_libraries(targets)
    if sign_key is not None:
        bundle.load_private_key(sign_key)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    except OSError as error:
        raise BundleError(f"{output.parent} cannot be written: {error.strerror}") from error
    try:
        staging.chmod(0o755)
        source = Source(model, staging, temporal_shift)
        targets.fit(source.config.networks)
        specs = network_specs(source.config, batch=options.batch, frames=options.frames, sizes=options.sizes)
        export = Export(source, specs, targets, options, staging, Cache(cache_folder), on_progress)
        artefacts = export.run()
        manifest = _finish(source, staging, artefacts, sign_key)
        _replace(staging, output, force)
    except OSError as error:
        raise BundleError(f"{output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sizes = {path: entry.size for path, entry in manifest.files.items()}
    own = {path for path in sizes if path.startswith(("onnx/", "kernels/", "engines/"))}
    return {
        "output": str(output),
        "bytes": sum(sizes.values()),
        "seconds": round(time.monotonic() - begun, 2),
        "artefacts": [
            {
                "name": artefact.name, "target": artefact.target.label,
                "bytes": sum(sizes[f] for f in artefact.files if f in own),
                "seconds": round(artefact.receipt.build_seconds, 2), "cached": artefact.name in export.cached,
            }
            for artefact in manifest.artefacts
        ],
        "notes": targets.notes,
        "steps": export.steps,
        "cached": export.hits,
        "peak_bytes": export.peak_bytes,
    }  # fmt: skip


def _check_output(output: Path, force: bool) -> Path:
    output = output.absolute()
    if output.suffix != ".plm":
        raise InvalidRequest(f"--output {str(output)!r} does not end in .plm")
    if not output.parent.is_dir():
        raise BundleError(f"folder {output.parent} does not exist")
    if output.is_symlink() or output.exists():
        if not force:
            raise BundleError(f"{output} exists; --force replaces it")
        if output.is_symlink() or not (output / bundle.MANIFEST).is_file():
            raise BundleError(f"{output} is no bundle, and --force replaces nothing else")
    return output


def _check_libraries(targets: Targets) -> None:
    needed = {"onnx": "export", "onnxscript": "export", "onnxruntime": "export", "filelock": "export"}
    if targets.cubins:
        needed["triton"] = "export"
    for module, extra in needed.items():
        if importlib.util.find_spec(module) is None:
            raise UnsupportedDevice(f"export needs {module}, which is not installed: pip install 'pylumiere[{extra}]'")
    for flavour in {plan.flavour for plan in targets.plans}:
        to_tensorrt.load_flavour(flavour)


def _finish(source: Source, staging: Path, artefacts: Iterable[bundle.Artefact], sign_key: Any) -> bundle.Manifest:
    together: Mapping[str, bundle.Artefact] = {**source.kept, **{artefact.name: artefact for artefact in artefacts}}
    used = {path for artefact in together.values() for path in artefact.files}
    used |= {*source.weights.values(), *source.text.files}
    for path in sorted(staging.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(staging).as_posix() not in used:
            path.unlink()
    order = {"onnx": 0, "plan": 1, "cubins": 2}
    ordered = sorted(together.values(), key=lambda a: (order[a.kind], a.stage, a.target.sms, a.name))
    manifest = bundle.Manifest(
        name=re.sub(r"[^A-Za-z0-9_+.-]", "_", source.config.name) or "model",
        created_by=f"pylumiere {__version__}",
        model=source.config.to_dict(),
        weights={stage: path for stage, path in source.weights.items() if stage != "text"},
        text=source.text,
        files=bundle.describe_files(staging),
        artefacts=tuple(ordered),
    )
    bundle.write_manifest(staging, manifest, sign_key)
    return manifest


def _replace(staging: Path, output: Path, force: bool) -> None:
    """Gives the folder its name. A bundle that stood there is moved aside first, and back if that fails."""
    if not output.exists():
        os.rename(staging, output)
        return
    if not force:
        raise BundleError(f"{output} exists; --force replaces it")
    aside = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".old", dir=output.parent))
    try:
        os.rename(output, aside / "bundle")
        try:
            os.rename(staging, output)
        except BaseException:
            os.rename(aside / "bundle", output)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
