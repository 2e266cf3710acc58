"""Where images come from: folders, tar shards, and the set that travels with the project."""

import json
import logging
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from webdataset.shardlists import expand_urls

from maskgit.common import UserError, pick
from maskgit.common.folder import ASSETS, read_json

log = logging.getLogger(__name__)

BUNDLED_FOLDER = ASSETS / "emoji" / "data"
BUNDLED_SHARDS = {  # name -> the shards of its training and of its held-out split
    "emoji": (["emoji-train"], ["emoji-heldout"]),
    "emoji:tones": (["emoji-train", "emoji-train-tones"], ["emoji-heldout"]),
    "emoji:heldout": (["emoji-heldout"], ["emoji-heldout"]),
}
IMAGE_SUFFIXES = {"png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jp2", "avif"}
MAX_CLASSES = 1_000_000  # more is a number that means something else
SIDECARS = {".txt", ".json", ".cls"}  # captions and the like, if they share an image's name


class Item(NamedTuple):
    """One image: a file, or a stretch of a tar shard."""

    name: str  # the path relative to the folder, or SHARD/KEY: reported, hashed for the split
    file: str
    offset: int
    size: int  # in bytes; 0 for what is no file, or a sample that has no image
    label: int  # -1 for none

    @property
    def where(self) -> str:
        """The path to report: FILE, or SHARD/KEY."""
        inside = not self.file.endswith(self.name)
        return str(Path(self.file).parent / self.name) if inside else self.file

    def read(self) -> bytes:
        if self.size == 0:
            return b""
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Source(NamedTuple):
    items: list[Item]
    classes: list[str]


def list_bundled(name: str, split: str) -> Source:
    """The items of "emoji", "emoji:tones" or "emoji:heldout"; classes in Unicode's order."""
    shards = pick(BUNDLED_SHARDS, name, "bundled data set")[split == "heldout"]
    classes = read_json(BUNDLED_FOLDER / "info.json")["classes"]
    return list_shards([str(BUNDLED_FOLDER / f"{shard}.tar") for shard in shards], classes)


def list_folder(folder: Path) -> Source:
    """The files of a folder of classes (one subfolder each), or of one flat folder.

    Every file counts as an image, whatever its suffix, except hidden ones and those that carry an
    image's caption: what turns out to be none is reported, not silently left out.
    """
    found: list[tuple[str, int]] = []  # relative path, size
    for root, folders, files in os.walk(folder, followlinks=True):
        here = Path(root).resolve()
        folders[:] = sorted(
            name
            for name in folders  # neither hidden, nor a link back to where we came from
            if not name.startswith(".") and not here.is_relative_to((here / name).resolve())
        )
        stems = {Path(name).stem for name in files if Path(name).suffix not in SIDECARS}
        for name in sorted(files):
            path = Path(name)
            if name.startswith(".") or (path.suffix in SIDECARS and path.stem in stems):
                continue
            full = Path(root, name)
            size = full.stat().st_size if full.is_file() else 0
            found.append((full.relative_to(folder).as_posix(), size))
    if not found:
        raise UserError(f"no images in {folder}: it is empty")
    classes = sorted({name.split("/")[0] for name, _ in found if "/" in name})
    loose = [name for name, _ in found if "/" not in name]
    if classes and loose:
        if images := [name for name in loose if _suffix(name) in IMAGE_SUFFIXES]:
            raise UserError(
                f"{folder} has class folders ({classes[0]}, ...) and loose images ({images[0]}, "
                "...): move these into a class folder, or elsewhere"
            )
        log.warning("skipped what lies beside the class folders: %s", ", ".join(loose))
        found = [(name, size) for name, size in found if "/" in name]
    number = {name: i for i, name in enumerate(classes)}
    items = [
        Item(name, str(folder / name), 0, size, number[name.split("/")[0]] if classes else -1)
        for name, size in found
    ]
    return Source(items, classes)


def expand_shards(path: str) -> list[str]:
    """The shards that a path with braces names ("set-{000..009}.tar"); [] if it names none."""
    try:
        shards = expand_urls(str(Path(path).expanduser()))
    except ValueError as error:
        raise UserError(f"data.path={path}: {error}") from None
    return shards if all(shard.endswith(".tar") for shard in shards) else []


def list_shards(shards: list[str], classes: list[str] | None = None) -> Source:
    """The samples of WebDataset shards, by reading their headers and labels once.

    A sample is the members that share a path up to the first dot of the file name. Its class is
    `KEY.cls` (a number or a name), or "class" or "label" in `KEY.json`. `classes` fixes the order
    of the class names, which else is alphabetic; numbers stay what they are.
    """
    found = [
        (Item(f"{Path(shard).name}/{key}", shard, offset, size, -1), label)
        for shard in shards
        for key, (offset, size, label) in _read_headers(shard).items()
    ]
    if not any(item.size for item, _ in found):
        raise UserError(f"no images in {shards[0]}: none of its samples has one")
    if all(label is None for _, label in found):
        return Source([item for item, _ in found], [])
    numbers = [label for _, label in found if isinstance(label, int)]
    for item, label in found:
        if label is None:
            raise UserError(
                f"{item.where} has no class, others have: add KEY.cls or a JSON 'class'"
            )
        if numbers and not (isinstance(label, int) and 0 <= label < MAX_CLASSES):
            raise UserError(
                f"{item.where} has class {label!r}: all names, or all numbers from 0 on"
            )
    if numbers:
        classes = [str(i) for i in range(1 + max(numbers))]
    number = {
        name: i for i, name in enumerate(classes or sorted({str(label) for _, label in found}))
    }
    return Source([item._replace(label=number[str(label)]) for item, label in found], list(number))


def _read_headers(shard: str) -> dict[str, tuple[int, int, int | str | None]]:
    """Each key's offset and size of the image and its label."""
    samples: dict[str, tuple[int, int, int | str | None]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                offset, size, label = samples.get(key, (0, 0, None))
                if _suffix(suffix) in IMAGE_SUFFIXES:
                    offset, size = member.offset_data, member.size
                elif suffix in ("cls", "json"):
                    content = tar.extractfile(member).read()  # type: ignore[union-attr]
                    found = _read_label(
                        content.decode("utf-8", "replace"), suffix, f"{shard}: {member.name}"
                    )
                    label = found if label is None else label
                samples[key] = (offset, size, label)
    except FileNotFoundError:
        raise UserError(f"no shard {shard}: check the path and the braces") from None
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"{shard} is no complete, uncompressed tar file ({error}): write it again"
        ) from None
    return samples


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _read_label(text: str, suffix: str, where: str) -> int | str | None:
    label: int | str | None = text.strip()
    if suffix == "json":
        try:
            record = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where} is not JSON ({error}): write it again") from None
        label = record.get("class", record.get("label")) if isinstance(record, dict) else None
    if label is None or isinstance(label, int):
        return label
    return int(label) if str(label).isdecimal() else str(label)
