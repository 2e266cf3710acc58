"""Models of the Hugging Face hub: their names, their files, and why it gives none."""

import errno
import re
import sys
from functools import cache
from pathlib import Path

from maskgit.common.errors import UserError

# What a full or a locked disk says.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


def hub_id(source: str | Path, revision: str | None = None) -> tuple[str, str | None] | None:
    """Name and revision (None: its newest) of "user/name" or "user/name@revision" on the hub; None
    for what can be no name there."""
    name, _, named = str(source).partition("@")
    return (name, revision or named or None) if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) else None


@cache  # so that all parts of a model, and the hashes that are told of it, are of one commit
def download(name: str, revision: str | None = None) -> Path:
    """The folder of a model of the hub, at a revision, in the cache on this machine.

    Raises UserError where neither the hub nor, without it, the cache has it.
    """
    from huggingface_hub import constants, snapshot_download

    no_bars_in_pipes()
    patterns = ["*.json", "*.safetensors"]  # in the folders of the parts, too
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except failures() as error:
        if isinstance(error, OSError) and error.errno in DISK:  # no fault of the hub's
            where = error.filename or constants.HF_HUB_CACHE
            raise OSError(error.errno, error.strerror, where) from None
        at = f" at revision {revision}" if revision else ""
        raise UserError(
            f"no folder {name} here, and the hub did not give it{at} ({hub_reason(error)}): fetch "
            f"its {' and '.join(patterns)} files elsewhere, keep their folders, and pass the one "
            "that all of it is in"
        ) from None


def no_bars_in_pipes() -> None:
    """Where stderr is no terminal, the hub's library draws no progress bars into it."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def failures() -> tuple[type[Exception], ...]:
    """What asking the hub raises: its client's own HTTP errors, OSError, and for names, answers and
    transfers that are wrong ValueError and RuntimeError."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*HfHubHTTPError.__bases__, ValueError, RuntimeError)


def hub_reason(error: Exception) -> str:
    """What the hub or the way to it said, in one line, and what helps if it is about rights."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not re.match(r"\d+ (Client|Server) Error", line)] or lines
    status = getattr(getattr(error, "response", None), "status_code", None)
    way_out = "; a private or gated one needs `hf auth login`, or HF_TOKEN, of whoever may read it"
    return (said or [type(error).__name__])[0].rstrip(".") + (
        way_out if status in (401, 403) else ""
    )
