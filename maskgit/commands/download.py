"""`maskgit download`: published weights from their publishers; no other command goes there."""

import argparse
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from maskgit.common import RunError, UserError, pick
from maskgit.published_files import PUBLISHED, File, Published

HELP = "fetch published weights, to import them"
EXAMPLE = "maskgit download maskgit256"

NOTE = """Licences are those of the repositories, which seldom speak of weights.
Where no hash is known here, the one that the server states is checked, if it states one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="what to fetch; without one, all there is is listed",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="where to put it (here)"
    )


def run(args: argparse.Namespace) -> None:
    """Fetch what is not there yet, check all of it, and say how it is imported."""
    if not args.names:
        print(
            "\n\n".join("\n".join(describe(*item)) for item in PUBLISHED.items()), NOTE, sep="\n\n"
        )
        return
    models = {name: pick(PUBLISHED, name, "published model") for name in args.names}
    folder = args.out.expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file: give a folder")
    fetch_all({file.name: file for what in models.values() for file in what.files}, folder)
    for name, what in models.items():
        print("\n".join(next_steps(name, what, folder)))


def fetch_all(files: dict[str, File], folder: Path) -> None:
    """Bring the files into the folder. Where one does not come, list those that are missing."""
    from maskgit.common.fetch import fetch

    for file in files.values():
        try:
            checked = fetch(file.url, folder / file.name, file.size, file.sha256)
        except RunError as error:
            print("not there yet, to be fetched by other means if need be:")
            for missing in files.values():
                if not (folder / missing.name).exists():
                    print(f"  {missing.url}\n    as {folder / missing.name}")
            sys.stdout.flush()
            raise RunError(
                f"{error}; fetched elsewhere and put there, the files are checked by the same "
                f"command (see also {file.source.page})"
            ) from None
        print(f"{folder / file.name}: {checked}", flush=True)


def describe(name: str, what: Published) -> Iterator[str]:
    """An entry of the list."""
    yield f"{name}: {what.about}"
    for file in what.files:
        size = f"{file.size / 1e6:,.0f} MB" if file.size else "size not known here"
        known = f"SHA-256 {file.sha256}" if file.sha256 else "no hash known here"
        yield f"  {file.name} ({size}; {known})\n    {file.url}"
    yield from terms(what.files)


def terms(files: Iterable[File]) -> Iterator[str]:
    """Licence and citation of each source, once."""
    for source in dict.fromkeys(file.source for file in files):
        yield f"  licence: {source.licence}"
        yield f"  cite: {source.cite}"


def next_steps(name: str, what: Published, folder: Path) -> Iterator[str]:
    """The commands that import the files, and on which terms these are published."""
    yield f"{name}: to import it,"
    paths = []
    for file in what.files:
        path = folder / file.name
        if file.member:
            unpacked = path.with_suffix("")
            yield "  " + shlex.join(["python", "-m", "zipfile", "-e", str(path), str(unpacked)])
            path = unpacked / file.member
        paths.append(str(path))
    yield "  " + shlex.join(["maskgit", "import", *paths, name])
    yield from terms(what.files)
