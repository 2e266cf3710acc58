"""The captions of images: from files beside them, from shards, or from one table for all."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maskgit.common import UserError, nearest
from maskgit.common.folder import read_text
from maskgit.engine.sources import IMAGE_SUFFIXES, Item

IDS = ("image", "id", "file", "filepath", "file_name", "filename", "key", "name")
TEXTS = ("captions", "caption", "text", "title")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def captions_of(
    items: Sequence[Item], table: str | Path | None = None, surplus: bool = False
) -> list[list[str]]:
    """One or several captions of each image, in the order of `items`.

    They come from `table` (see `read_captions` and `join`), or else from what shares an
    image's name: `NAME.txt` (a caption a line) or `NAME.json` ("captions", "caption", "text", or
    "name" and "keywords"), in a folder as in a shard. Raises UserError for images without any.
    """
    if table is not None:
        return join(items, read_captions(table), str(table), surplus)
    shards: dict[str, dict[str, list[str]]] = {}
    found = []
    for item in items:
        if item.file.endswith(".tar"):
            if item.file not in shards:
                shards[item.file] = _read_shard(item.file)
            captions = shards[item.file].get(item.name, [])
        else:
            captions = _read_beside(Path(item.file))
        found.append(captions)
    bare = [item.where for item, captions in zip(items, found, strict=True) if not captions]
    if bare:
        raise UserError(
            f"{len(bare)} of {len(items)} images have no caption ({bare[0]}, ...): put NAME.txt or "
            "NAME.json beside each, or give a table of captions"
        )
    return found


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Image -> its captions, from a `.csv` or `.tsv` (with a header), `.json` or `.jsonl` file.

    A row has the image's name (column image, id, file, filepath, ...) and caption, text or title;
    further captions stand in columns that begin with "caption". JSON: {image: caption or list of
    them}, or a list of such rows. Raises UserError for an image named twice and an empty caption.
    """
    path, text = Path(path), read_text(path)
    if path.suffix in DELIMITERS:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=DELIMITERS[path.suffix])
        try:
            pairs = [_from_row(row, f"{path}, line {reader.line_num}") for row in reader]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    elif path.suffix == ".jsonl":
        lines = enumerate(text.splitlines(), 1)
        pairs = [
            _from_row(_parse(line, f"{path}, line {i}"), f"{path}, line {i}")
            for i, line in lines
            if line.strip()
        ]
    elif path.suffix == ".json":
        content = _parse(text, str(path), object_pairs_hook=_Pairs)
        if isinstance(content, _Pairs):
            pairs = [(name, _listed(value)) for name, value in content]
        elif isinstance(content, list):
            pairs = [_from_row(row, f"{path}, entry {i}") for i, row in enumerate(content)]
        else:
            raise UserError(f"{path} is no JSON object from image to caption, nor a list of rows")
    else:
        raise UserError(f"{path}: captions come as .csv, .tsv, .json or .jsonl")
    if not pairs:
        raise UserError(f"{path} has no captions")
    found: dict[str, list[str]] = {}
    for name, captions in pairs:
        if name in found:
            raise UserError(f"{path} names {name} twice: give all its captions in one entry")
        if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
            raise UserError(f"{path}: the caption of {name} is empty or no text")
        found[name] = [caption.strip() for caption in captions]
    return found


def join(
    items: Sequence[Item], table: dict[str, list[str]], where: str, surplus: bool = False
) -> list[list[str]]:
    """The captions of each item, by its name: the path in its folder or shard, with or without the
    suffix; or the file's name alone, in rows that have no folder or where no image has one.

    Raises UserError for an image without a caption, or with two, for a name that several images
    have and, unless `surplus` rows are allowed, for one that none has.
    """
    levels: list[dict[str, int | None]] = [{}, {}, {}, {}]
    flat = not any("/" in item.name for item in items)
    for i, item in enumerate(items):
        inner = item.name.partition("/")[2] if item.file.endswith(".tar") else item.name
        file = Path(inner).name
        for level, keys in zip(
            levels,
            ({item.name, inner}, {_stem(item.name), _stem(inner)}, {file}, {_stem(file)}),
            strict=True,
        ):
            for key in keys:
                level[key] = i if key not in level else None  # None: of several images
    found: dict[int, list[str]] = {}
    for name, captions in table.items():
        path = name.removeprefix("./")
        whole, bare = {path, _stem(path)}, {Path(path).name, _stem(Path(path).name)}
        options = [whole, whole, *([bare, bare] if flat or "/" not in path else [])]
        ways = zip(levels, options, strict=False)
        known = [level[key] for level, keys in ways for key in keys if key in level]
        if not known and surplus:
            continue
        if not known:
            hint = nearest(name, [item.name for item in items[:2000]])
            raise UserError(f"{where} has a caption for {name}, and there is no such image: {hint}")
        if known[0] is None:
            raise UserError(f"{where}: {name} names several images: write the path inside the set")
        if known[0] in found:
            raise UserError(f"{where} names the image {items[known[0]].name} twice")
        found[known[0]] = captions
    for i, item in enumerate(items):
        if i not in found:
            raise UserError(f"{where} has no caption for the image {item.name}")
    return [found[i] for i in range(len(items))]


def _stem(name: str) -> str:
    """The name without the suffix of an image file."""
    stem, _, suffix = name.rpartition(".")
    return stem if stem and suffix.lower() in IMAGE_SUFFIXES else name


class _Pairs(list):
    """A JSON object as a list of pairs, so that a name that stands twice is seen."""


def _parse(text: str, where: str, **options: Callable[..., Any]) -> Any:
    try:
        return json.loads(text, **options)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from None


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def _from_row(row: Any, where: str) -> tuple[str, list[str]]:
    """An image's name and captions, from a row of a table."""
    if not isinstance(row, (dict, _Pairs)):
        raise UserError(f"{where} is no row of a table: it has to have an image and a caption")
    row = dict(row)
    lower = {str(key).strip().lower(): value for key, value in row.items()}
    name = next((lower[key] for key in IDS if lower.get(key) not in (None, "")), None)
    if name is None:
        raise UserError(f"{where} names no image: a column of {', '.join(IDS)}")
    captions = [c for key in TEXTS if key in lower for c in _listed(lower[key])]
    captions += [
        c for key, c in lower.items() if key.startswith("caption") and key not in TEXTS and c
    ]
    if not captions:
        raise UserError(f"{where} has no caption: a column of {', '.join(TEXTS)}")
    return str(name), captions


def _read_beside(image: Path) -> list[str]:
    for suffix in (".txt", ".json"):
        path = image.with_suffix(suffix)
        if path.is_file():
            return _from_text(path.read_text(encoding="utf-8", errors="replace"), str(path))
    return []


def _read_shard(shard: str) -> dict[str, list[str]]:
    """The captions of a shard's samples, by their names as `list_shards` gives them."""
    found: dict[str, list[str]] = {}
    with tarfile.open(shard, "r:") as tar:  # `list_shards` has read it: it is there and whole
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if not member.isfile() or not stem or suffix not in ("txt", "json"):
                continue
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            captions = _from_text(content.decode("utf-8", "replace"), f"{shard}: {member.name}")
            name = f"{Path(shard).name}/{folder}/{stem}" if folder else f"{Path(shard).name}/{stem}"
            if captions and (suffix == "txt" or name not in found):  # as it is in a folder
                found[name] = captions
    return found


def _from_text(text: str, where: str) -> list[str]:
    """The captions in the content of a `.txt` or `.json` file."""
    if not where.endswith(".json"):
        return [line.strip() for line in text.splitlines() if line.strip()]
    record = _parse(text, where)
    if not isinstance(record, dict):
        return []
    for key in TEXTS:
        if record.get(key):
            return [str(c).strip() for c in _listed(record[key]) if str(c).strip()]
    if "name" in record and isinstance(record.get("keywords"), list):
        name, keywords = str(record["name"]), [str(k) for k in record["keywords"]]
        return list(dict.fromkeys([name, ", ".join([name, *keywords]), *keywords]))
    return []
