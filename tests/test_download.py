"""`maskgit download`, and the catalogue of what it fetches. See test_fetch.py for the fetching."""

import re
import socket
from pathlib import Path

import pytest
from file_server import CONTENT, SHA256, SIZE, serving

from clip.recipes import recipes
from maskgit import published_files
from maskgit.commands.main import main
from maskgit.presets import HALTON, OFFICIAL
from maskgit.published_files import PUBLISHED, File, Published, Source, licence_of
from vqgan.layouts import LAYOUTS


@pytest.fixture
def server():
    with serving() as running:
        yield running


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.fixture
def published(server, monkeypatch):
    """`one`, with two files that the server has, and `zip`."""
    source = Source("MIT (a/b)", "Someone, Something, 2026", "https://example.org/a/b")
    files = tuple(File(f"{n} file", server.url, source, SIZE, SHA256) for n in ("first", "second"))
    archive = File("vq.zip", server.url, source, member="model.ckpt")
    monkeypatch.setitem(PUBLISHED, "one", Published("what it is", files))
    monkeypatch.setitem(PUBLISHED, "zip", Published("what it is", (archive,)))
    return server


def test_the_command(published, tmp_path, capsys):
    folder = tmp_path / "weights"
    assert main(["download", "one", "zip", "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert (folder / "first file").read_bytes() == CONTENT
    assert f"{folder / 'second file'}: 3.5 MB, SHA-256 as published\n" in out
    assert f"  maskgit import '{folder}/first file' '{folder}/second file' one\n" in out
    assert f"  python -m zipfile -e {folder}/vq.zip {folder}/vq\n" in out
    assert f"  maskgit import {folder}/vq/model.ckpt zip\n" in out
    assert out.count("licence: MIT (a/b)\n") == out.count("cite: Someone, Something, 2026\n") == 2
    assert len(published.asked) == 3
    assert main(["download", "one", "--out", str(folder)]) == 0
    assert capsys.readouterr().out.count("there already") == 2
    assert len(published.asked) == 3


def test_without_network_the_addresses_are_listed(published, tmp_path, capsys):
    address = f"http://127.0.0.1:{free_port()}/file"
    first, second = PUBLISHED["one"].files
    PUBLISHED["one"] = Published("", (first, File(second.name, address, second.source)))
    assert main(["download", "one", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1].startswith(f"maskgit: {address} cannot be reached (Conn")
    assert f"  {address}\n    as {tmp_path}/second file\n" in shown.out
    assert first.url not in shown.out  # it is there
    (tmp_path / "second file").write_bytes(CONTENT)
    assert main(["download", "one", "--out", str(tmp_path)]) == 0


def test_mistakes_of_the_command(published, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words, hint in (
        (["maskgit265"], "did you mean 'maskgit256'"),
        (["one", "--out", str(tmp_path / "file")], "is a file: give a folder"),
    ):
        assert main(["download", *words]) == 2
        shown = capsys.readouterr()
        assert hint in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    assert published.asked == []


def test_the_list_has_everything(maskgit):
    done = maskgit("download")
    assert (done.returncode, done.stderr) == (0, "")
    for name, what in PUBLISHED.items():
        assert f"{name}: {what.about}\n" in done.stdout
        for file in what.files:
            assert file.url in done.stdout and file.source.licence in done.stdout
            assert (file.sha256 or "no hash known here") in done.stdout


def test_the_catalogue_agrees_with_itself_and_with_the_rest():
    files = {file for what in PUBLISHED.values() for file in what.files}
    assert len({file.name for file in files}) == len({file.url for file in files}) == len(files)
    for file in files:
        assert file.url.startswith("https://") and file.source.page.startswith(
            "https://github.com/"
        )
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
    clips = [file for file in files if file.source is published_files.CLIP]
    assert len(clips) == 3
    for file in clips:
        recipe = recipes()[f"{file.name.removesuffix('.pt')}/openai"]
        assert file.name == recipe.file and file.sha256.startswith(recipe.sha256)
        assert f"/{file.sha256}/{file.name}" in file.url
    for family in (*(layout.family for layout in LAYOUTS), OFFICIAL, HALTON):
        assert licence_of(Path("last.ckpt"), "", family)
