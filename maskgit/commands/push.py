"""`maskgit push`: a model folder -> the Hugging Face hub, with a card written from it."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit.common import RunError, UserError
from maskgit.common.folder import BUNDLED
from maskgit.common.hub import failures, hub_id, hub_reason, no_bars_in_pipes

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    CommitOperation = CommitOperationAdd | CommitOperationDelete

HELP = "publish a model folder on the Hugging Face hub"
EXAMPLE = "maskgit push emoji user/emoji --license apache-2.0 --dry-run"

Content = bytes | Path  # of a file: itself, or where it is


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="a model folder, or a bundled name")
    parser.add_argument("name", metavar="user/name", help="what it is called on the hub")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="as the hub calls it (mit, apache-2.0, ...), where the folder does not say it",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="metrics.json of `maskgit evaluate`, or their folders, for the card's numbers",
    )
    parser.add_argument("--private", action="store_true", help="only you can see it")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the card and what would go, and send nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Check the folder, write the card, say what goes, and send it in one commit."""
    folder = model_folder(args.folder)
    check_name(args.name)
    if args.license and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise UserError(f"--license {args.license}: the hub's ids are like mit, apache-2.0")
    api = None if args.dry_run else log_in()

    from maskgit import card
    from maskgit.card_numbers import private_paths, read_results
    from maskgit.importing import written

    model = card.read_model(folder)
    licence = card.licences(model, args.license)
    results = read_results(folder, args.metrics, model.hashes)
    text = card.card(model, args.name, licence, results)
    files: dict[str, Content] = {card.CARD: text.encode()}
    if model.pipe:
        files[card.SHEET] = card.sample_sheet(model.pipe, args.name)
    files |= {name: folder / name for name in written(folder) if card.belongs(name)}
    files |= {result.path: result.content for result in results}
    if args.dry_run:
        print(text)
    say_files(files)
    say_strays([name for name in written(folder) if not card.belongs(name)], list(files))
    for result in results:
        if paths := private_paths(result):
            print(f"note: {result.path} names {', '.join(paths)}")
    if api is None:
        print(f"nothing was sent: without --dry-run, this goes to {args.name}")
        return
    print(send(api, args.name, files, args.private))


def model_folder(source: str) -> Path:
    """A folder on this machine; the hub is where it goes, not where it comes from."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source in BUNDLED:
        return BUNDLED[source]
    raise UserError(f"no folder {source}: give a model folder, such as run/export, then user/name")


def check_name(name: str) -> None:
    """UserError for what cannot be a repository's name."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise UserError(f"{hub_reason(error)}: give user/name") from None
    if hub_id(name) != (name, None):
        raise UserError(f"{name!r} is no name on the hub: give user/name")


def log_in() -> "HfApi":
    """The hub, as whoever is logged in; UserError for nobody."""
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise UserError(
            "not logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token that may "
            "write; --dry-run needs neither"
        )
    return HfApi()


def say_files(files: dict[str, Content]) -> None:
    """Each file with its size, and all of them."""
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in files.items()
    }
    for name, size in sizes.items():
        print(f"{size:>15,}  {name}")
    print(f"{sum(sizes.values()):>15,}  bytes in {len(sizes)} files")


def say_strays(strays: list[str], sent: list[str]) -> None:
    """What lies in the folder and is not sent; folders of which nothing is, by their own names."""
    used = {name.partition("/")[0] for name in sent}
    tops = {name: name.partition("/") for name in strays}
    named = [
        f"{top}/" if slash and top not in used else name for name, (top, slash, _) in tops.items()
    ]
    if named:
        print(f"not sent, no part of the model: {', '.join(dict.fromkeys(named))}")


def send(api: "HfApi", name: str, files: dict[str, Content], private: bool) -> str:
    """Make the model on the hub what `files` are, in one commit; the commit's address.

    Raises UserError where one may not write, and where it is to be private and the repository is
    public; RunError for what happens on the way.
    """
    no_bars_in_pipes()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        there = api.model_info(name)
        if private and not there.private:
            raise UserError(f"{name} is public already: make it private there, or drop --private")
        old = [one.rfilename for one in there.siblings or []]
        done = api.create_commit(name, operations(files, old), commit_message="maskgit push")
    except failures() as error:
        raise refusal(name, error) from None
    return done.commit_url


def operations(files: dict[str, Content], old: list[str]) -> "list[CommitOperation]":
    """What a commit has to do. Of the `old` files, a model's that it has no longer go: they would
    be loaded with the rest."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from maskgit.card import CARD, SHEET, belongs

    stale = [name for name in old if name not in files]
    stale = [name for name in stale if belongs(name) or name in (CARD, SHEET)]
    for name in stale:
        print(f"removed on the hub, as the folder has none: {name}")
    remove = [CommitOperationDelete(name) for name in stale]
    return [*(CommitOperationAdd(name, content) for name, content in files.items()), *remove]


def refusal(name: str, error: Exception) -> UserError:
    """Why nothing was sent: who one is, or what happened on the way."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UserError(f"the hub does not let this account write {name}: {hub_reason(error)}")
    return RunError(
        f"{name} was not sent ({hub_reason(error)}): run the command again; what the hub has "
        "already is not sent twice"
    )
