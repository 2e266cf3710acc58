"""Fetching from a real server on this machine: whole, cut, resumed, wrong, absent, killed."""

import base64
import hashlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, one_line
from file_server import CONTENT, SHA256, SIZE, serving

from maskgit.common import RunError, UserError, fetch


@pytest.fixture
def server():
    with serving() as running:
        yield running


@pytest.fixture
def target(tmp_path):
    return tmp_path / "new" / "file.bin"


def left(target):
    """What lies in the folder, by the kind of file."""
    kinds = (re.sub(r"\.[0-9a-f]{8}\.", ".TAG.", path.name) for path in target.parent.glob("*"))
    return sorted(kinds)


def test_a_whole_file(server, target):
    assert fetch.fetch(server.url, target, SIZE, SHA256) == "3.5 MB, SHA-256 as published"
    assert target.read_bytes() == CONTENT
    assert left(target) == ["file.bin"] and server.asked == [None]


def test_a_file_of_which_nothing_is_known(server, target):
    server.lengths = False
    assert fetch.fetch(server.url, target) == "3.5 MB, no hash to check"
    assert target.read_bytes() == CONTENT


def test_what_is_there_is_not_fetched(server, target):
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    for known in ((), (SIZE,), (SIZE, SHA256)):
        assert fetch.fetch(server.url, target, *known).endswith("there already")
    for size, sha256 in ((SIZE + 1, None), (SIZE, "0" * 64)):
        with pytest.raises(UserError) as error:
            fetch.fetch(server.url, target, size, sha256)
        one_line(error, target, "move it away")
        assert error.value.status == 2
    assert target.read_bytes() == CONTENT and server.asked == []


def test_cut_connections_go_on_where_they_were_cut(server, target):
    server.cut = lambda number: 1_000_000 if number < 4 else None
    fetch.fetch(server.url, target, SIZE, SHA256)
    starts = [None, "bytes=999999-", "bytes=1999998-", "bytes=2999997-"]
    assert server.asked == starts  # one byte comes again each time
    assert target.read_bytes() == CONTENT and left(target) == ["file.bin"]


def test_a_cut_without_anything_new_ends_and_the_next_call_goes_on(server, target):
    server.cut = lambda number: 1_000_000 if number == 1 else 0
    with pytest.raises(RunError) as error:
        fetch.fetch(server.url, target, SIZE, SHA256)
    one_line(error, server.url, "cut after 1.0 MB", "goes on from there")
    assert error.value.status == 1
    assert left(target) == [".file.bin.TAG.partial"]
    server.cut = lambda number: None
    fetch.fetch(server.url, target, SIZE, SHA256)
    assert server.asked[-1] == "bytes=999999-"
    assert target.read_bytes() == CONTENT and left(target) == ["file.bin"]


@pytest.mark.parametrize("have", [0, 1, 2, 1_234_567, SIZE - 1, SIZE])
def test_any_length_can_be_resumed(server, target, have):
    if have < SIZE:
        server.cut = lambda number: have if number == 1 else 0
        with pytest.raises(RunError):
            fetch.fetch(server.url, target)
        assert next(target.parent.glob(".*")).stat().st_size == have
    else:  # killed before the file got its name
        fetch.fetch(server.url, target)
        answer = fetch._ask(server.url, 0)
        answer.response.close()
        target.rename(target.with_name(f".file.bin.{answer.tag}.partial"))
    server.cut = lambda number: None
    fetch.fetch(server.url, target)
    assert target.read_bytes() == CONTENT and left(target) == ["file.bin"]


def test_a_server_that_knows_no_ranges_begins_anew(server, target):
    server.ranges = False
    server.cut = lambda number: 2_000_000 if number == 1 else None
    fetch.fetch(server.url, target, SIZE, SHA256)
    assert target.read_bytes() == CONTENT and len(server.asked) == 2
    server.cut = lambda number: 2_000_000
    target.unlink()
    with pytest.raises(RunError, match=r"cut after 2\.0 MB"):
        fetch.fetch(server.url, target, SIZE, SHA256)


@pytest.mark.parametrize("size", [SIZE, 400_000])
@pytest.mark.parametrize("etag", ['"two"', None])
def test_versions_are_never_joined(server, target, size, etag):
    """Another file stands at the address by the time that the rest is asked for."""
    server.cut = lambda number: 500_000 if number == 1 else 0
    with pytest.raises(RunError):
        fetch.fetch(server.url, target)
    server.content, server.etag = random.Random(1).randbytes(size), etag
    server.cut = lambda number: None
    fetch.fetch(server.url, target)
    assert target.read_bytes() == server.content and left(target) == ["file.bin"]


def test_a_wrong_hash_gets_no_final_name(server, target):
    for _ in range(2):  # the second attempt is from the first byte
        with pytest.raises(RunError) as error:
            fetch.fetch(server.url, target, SIZE, "0" * 64)
        one_line(error, "SHA-256", SHA256, "0" * 64, ".file.bin.wrong")
        assert left(target) == [".file.bin.wrong"] and server.asked[-1] is None
    assert target.with_name(".file.bin.wrong").read_bytes() == CONTENT


def test_another_size_is_not_even_fetched(server, target):
    with pytest.raises(RunError) as error:
        fetch.fetch(server.url, target, SIZE - 1, SHA256)
    one_line(error, f"{SIZE:,} bytes", "another file")
    assert not target.parent.exists()


def test_hashes_that_servers_state_are_checked(server, target):
    moved = server.url.replace("/file", "/moved")
    md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    for url, headers, name in (
        (moved, {"X-Linked-Etag": f'"{SHA256}"'}, "SHA-256"),
        (server.url, {"x-goog-hash": f"crc32c=AAAAAA==,md5={md5}"}, "MD5"),
    ):
        server.headers = headers
        assert fetch.fetch(url, target) == f"3.5 MB, {name} as its server states it"
        target.unlink()
        server.content = CONTENT[:-1] + b"?"
        with pytest.raises(RunError, match=f"came with the {name}"):
            fetch.fetch(url, target)
        assert left(target) == [".file.bin.wrong"]
        server.content = CONTENT


def test_pages_and_missing_files_are_told(server, target):
    with pytest.raises(RunError) as error:
        fetch.fetch(f"{server.url}s", target)
    one_line(error, f"{server.url}s", "404 Not Found")
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(RunError) as error:
        fetch.fetch(server.url, target)
    one_line(error, server.url, "web page")
    assert not target.parent.exists()


def test_no_space_is_told_before_anything_is_written(server, target):
    free = os.statvfs(target.parent.parent)
    total = free.f_bavail * free.f_frsize * 10
    answer = fetch._ask(server.url, 0)
    answer.response.close()
    with pytest.raises(OSError, match=r"file\.bin takes") as error:
        fetch._receive(answer, target.with_name(".file.bin.tag.partial"), target, total)
    assert error.value.errno == 28 and not target.parent.exists()


def test_a_server_that_does_not_answer(monkeypatch, target):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(RunError) as error:
        fetch.fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/file", target)
    one_line(error, "cannot be reached", "timed out")


PROGRAM = """
import sys
from maskgit.commands.main import main
from maskgit.published_files import PUBLISHED, File, Published, Source
PUBLISHED["one"] = Published("", (File("f", {url!r}, Source("", "", ""), {size}, {sha256!r}),))
sys.exit(main(["download", "one", "--out", {folder!r}]))
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_what_came_before_a_signal_is_kept(server, tmp_path, number, status):
    server.pause = 0.02
    words = {"url": server.url, "size": SIZE, "sha256": SHA256, "folder": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM.format(**words)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while sum(path.stat().st_size for path in tmp_path.glob(".*")) < 500_000:
        assert process.poll() is None
        time.sleep(0.01)
    with pytest.raises(UserError, match="being fetched by another process"):
        fetch.fetch(server.url, tmp_path / "f", SIZE, SHA256)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status and b"Traceback" not in err
    [partial] = tmp_path.iterdir()
    came = partial.stat().st_size
    assert 500_000 <= came < SIZE and partial.read_bytes() == CONTENT[:came]
    server.pause = 0.0
    fetch.fetch(server.url, tmp_path / "f", SIZE, SHA256)
    assert server.asked[-1] == f"bytes={came - 1}-"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == CONTENT
