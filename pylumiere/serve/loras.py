"""LoRA files that requests may name: those of one folder, by their names without the ending.

The folder is read at the start. A name is looked up among those that were found, so nothing of a request becomes part
of a path; and what is refused is told by the name, never by the file.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from os import PathLike
from pathlib import Path

from pylumiere.errors import InvalidRequest
from pylumiere.request import GenerationRequest

logger = logging.getLogger("pylumiere")

_NAME = re.compile(r"\w[\w .+-]{0,99}")
_MAX_LISTED = 20  # in an error


def find_loras(folder: str | PathLike | None) -> dict[str, Path]:
    """The safetensors files of a folder by their names; none for None.

    Raises:
        InvalidRequest: it is no folder, or cannot be read.
    """
    if folder is None:
        return {}
    try:
        files = sorted(path for path in Path(folder).iterdir() if path.suffix == ".safetensors" and path.is_file())
    except OSError as error:
        raise InvalidRequest(f"LoRA folder {str(folder)!r} cannot be read: {error.strerror}") from None
    if strange := [path.name for path in files if not _NAME.fullmatch(path.stem)]:
        logger.warning("LoRA files left out, whose names hold more than letters, digits and _ .+-: %s", strange)
    return {path.stem: path.absolute() for path in files if _NAME.fullmatch(path.stem)}


def check_loras(request: GenerationRequest, known: Collection[str]) -> None:
    """A client names a LoRA of the operator's folder; an engine would take any file's path.

    Raises:
        InvalidRequest: there is none of that name.
    """
    for name, _ in request.lora or ():
        if name not in known:
            listed = ", ".join(sorted(known)[:_MAX_LISTED]) or "none"
            more = f" and {len(known) - _MAX_LISTED} more" if len(known) > _MAX_LISTED else ""
            shown = name if len(name) <= 60 else name[:57] + "..."
            raise InvalidRequest(f"lora={shown!r}: this server has {listed}{more}")


@contextlib.contextmanager
def lora_files(request: GenerationRequest, loras: Mapping[str, Path]) -> Iterator[GenerationRequest]:
    """The request as an engine takes it: with files in place of names.

    Raises:
        InvalidRequest: an unknown name; or what is raised inside, with names in place of files.
    """
    check_loras(request, loras)
    files = {name: str(loras[name]) for name, _ in request.lora or ()}
    named = tuple((files[name], strength) for name, strength in request.lora or ())
    try:
        yield request.model_copy(update={"lora": named}) if named else request
    except InvalidRequest as error:
        text = str(error)
        for name, file in files.items():
            text = text.replace(repr(file), repr(name))
        raise InvalidRequest(text) from None
