"""A file from the network: resumed where it was cut, in its place only when it is right.

What has come lies beside the file, as `.NAME.TAG.partial`. TAG stands for what the server says of
the file (its size; ETag or date of change), so that no two versions of it are ever joined.
"""

import base64
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from glob import escape
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from maskgit.common.errors import RunError, UserError
from maskgit.common.folder import check_space, file_hash, naming
from maskgit.common.progress import meter

TIMEOUT = 10.0  # seconds without an answer, or without a byte
CHUNK = 1_000_000  # bytes; progress is counted in these
HASHES = {"sha256": "SHA-256", "md5": "MD5"}


class Cut(Exception):
    """The connection ended before the file did."""


@dataclass
class Answer:
    """What a server says before it sends the bytes of a file."""

    response: HTTPResponse
    start: int  # the first byte that it sends
    total: int | None  # bytes of the whole file
    tag: str  # differs for another version of the file
    digest: tuple[str, str] | None  # an algorithm, and the file's hash by it in hexadecimal


def fetch(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> str:
    """Bring the file at `url` to `path`, and say in a few words what it was checked against.

    size, sha256: what it must have, where that is known; a hash that the server states is checked
    as well. A file that is there already is checked, and not fetched.

    What has come is kept whatever happens, and the next call goes on from there. Raises RunError
    where the server cannot be reached, has no such file or another one, or where the connection is
    cut without anything new; UserError for another file at `path`.
    """
    if path.exists():
        return _present(path, size, sha256)
    most = 0
    while True:
        try:
            partial, stated = _transfer(url, path, size)
            break
        except Cut as cut:
            came = sum(old.stat().st_size for old in _partials(path))
            if came <= most:
                raise RunError(
                    f"{url} was cut after {came / 1e6:,.1f} MB ({cut}): they are kept, and the "
                    f"same command goes on from there"
                ) from None
            most = came
    digest = ("sha256", sha256) if sha256 else stated
    _check_hash(partial, path, digest)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    return _checked(path, digest, "published" if sha256 else "its server states it")


def _present(path: Path, size: int | None, sha256: str | None) -> str:
    """The like of `fetch` for a file that is there."""
    if not path.is_file():
        raise UserError(f"{path} is no file: move it away, or give another folder")
    here = path.stat().st_size
    if size is not None and here != size:
        what = f"{here:,} bytes and not the {size:,} of the published file"
        raise UserError(f"{path} has {what}: move it away, to fetch that")
    if sha256 and file_hash(path) != sha256:
        raise UserError(f"{path} has not the SHA-256 of the published file: move it away")
    return f"{_checked(path, ('sha256', sha256) if sha256 else None, 'published')}, there already"


def _checked(path: Path, digest: tuple[str, str] | None, by: str) -> str:
    size = f"{path.stat().st_size / 1e6:,.1f} MB"
    return f"{size}, {HASHES[digest[0]]} as {by}" if digest else f"{size}, no hash to check"


def _transfer(url: str, path: Path, size: int | None) -> tuple[Path, tuple[str, str] | None]:
    """The complete partial file, and what its server says that its hash is. Cut, if cut."""
    old = next(_partials(path), None)
    have = old.stat().st_size if old else 0
    # The last byte once more: asked for nothing, a server would answer that this is no range.
    answer = _ask(url, max(have - 1, 0))
    if answer is None:
        return _anew(url, path, size)
    with answer.response:
        if size is not None and answer.total not in (size, None):
            raise RunError(
                f"{url} has {answer.total:,} bytes, and the published file {size:,}: it is another "
                f"file by now"
            )
        partial = path.with_name(f".{path.name}.{answer.tag}.partial")
        if answer.start and partial != old:
            return _anew(url, path, size)
        if old and partial != old:
            old.unlink()
        _receive(answer, partial, path, answer.total or size)
    return partial, answer.digest


def _anew(url: str, path: Path, size: int | None) -> tuple[Path, tuple[str, str] | None]:
    """`_transfer` from the first byte: what has come is of another version."""
    for old in _partials(path):
        old.unlink()
    return _transfer(url, path, size)


def _partials(path: Path) -> Iterator[Path]:
    return path.parent.glob(f".{escape(path.name)}.*.partial")


def _ask(url: str, start: int) -> Answer | None:
    """The server's answer to a request of the bytes from `start` on; None if it has none there."""
    redirects = Redirects()
    headers = {"User-Agent": "maskgit"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        opener = build_opener(redirects)
        response = opener.open(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and start:
            return None
        raise RunError(f"{url}: the server says {error.code} {error.reason}") from None
    except (OSError, HTTPException) as error:
        raise RunError(f"{url} cannot be reached ({_reason(error)})") from None
    said = response.headers
    part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", said.get("Content-Range", ""))
    if response.status == 206 and not (part and int(part[1]) == start):
        response.close()
        if start:
            return None
        raise RunError(f"{url}: the server sends only a part, unasked")
    if said.get_content_type() == "text/html":
        response.close()
        raise RunError(f"{url} is a web page and no file by now")
    first, length = (start, part[2]) if part else (0, said.get("Content-Length"))
    linked = next((h["X-Linked-Etag"] for h in redirects.passed if "X-Linked-Etag" in h), None)
    version = linked or said.get("ETag") or said.get("Last-Modified")
    tag = hashlib.sha256(f"{url} {version} {length}".encode()).hexdigest()[:8]
    digest = _stated(linked or "", ",".join(said.get_all("x-goog-hash", [])))
    return Answer(response, first, int(length) if length else None, tag, digest)


class Redirects(HTTPRedirectHandler):
    """Keeps what redirections say: the Hugging Face Hub states there what a file's hash is."""

    def __init__(self) -> None:
        self.passed: list[Any] = []

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        self.passed.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _stated(linked: str, stored: str) -> tuple[str, str] | None:
    """The hash of the whole file that the Hugging Face Hub or Google's storage states, in headers
    X-Linked-Etag (SHA-256 in quotes) and x-goog-hash ("crc32c=...,md5=...", base64)."""
    if re.fullmatch('"[0-9a-f]{64}"', linked):
        return "sha256", linked.strip('"')
    found = re.search(r"md5=([A-Za-z0-9+/]{22}==)", stored)
    return ("md5", base64.b64decode(found[1]).hex()) if found else None


def _receive(answer: Answer, partial: Path, path: Path, total: int | None) -> None:
    """Append what the server sends to the partial file, from where it begins; Cut, if cut."""
    done = answer.start
    if total is not None:
        check_space(path.parent, total - done, f"{path.name} takes")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = None if total is None else total // CHUNK
    with naming(partial), partial.open("ab") as file:
        _lock(file, path)
        with meter(count, path.name, "MB", done // CHUNK) as advance:
            while data := _read(answer.response):
                if done == answer.start:  # only now that there is something in its place
                    file.truncate(done)
                file.write(data)
                file.flush()  # whatever ends this process, all that has come is there
                before, done = done, done + len(data)
                if done // CHUNK > before // CHUNK:
                    advance(done // CHUNK - before // CHUNK)
    if total is not None and done != total:
        raise Cut("the server ended early")


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(CHUNK)
    except (OSError, HTTPException) as error:
        raise Cut(_reason(error)) from None


def _lock(file: Any, path: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"{path} is being fetched by another process: wait for it") from None


def _check_hash(partial: Path, path: Path, digest: tuple[str, str] | None) -> None:
    """RunError for a file with another hash, which it puts out of the way of the next attempt."""
    if digest is None or (found := file_hash(partial, digest[0])) == digest[1]:
        return
    wrong = path.with_name(f".{path.name}.wrong")
    partial.replace(wrong)
    raise RunError(
        f"{path.name} came with the {HASHES[digest[0]]} {found} and not {digest[1]}: it is kept as "
        f"{wrong}; fetch it again"
    )


def _reason(error: Exception) -> str:
    """What a network error says, in a few words."""
    inner = error.reason if isinstance(error, URLError) else error
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
