"""Whether a model folder is whole and computes what it did elsewhere: `maskgit doctor --model`.

Checked are the hashes that `source.json` has (see `maskgit/importing.py`), that nothing else is
there which would be read, the structure (each part loads, with every tensor in its place and every
number finite), that tokenizer and transformer belong together, and, where the folder has a
`trace.json`, that its seed gives its tokens. That is a record of

    {
      "format_version": 1,
      "seed": 0,                        image i has the seed 0 + i
      "labels": ["tench", 1],           names or numbers; null for no class
      "preset": "maskgit",              a name in presets.json; null: the model's own settings
      "sources": {"vqgan": "...", "transformer": "..."},
                                        SHA-256 of the files that were imported, as in source.json;
                                        left out for a model that was trained here
      "tokens_sha256": "..."            SHA-256 of the tokens, int64 (B, N), little-endian, by rows
    }

made by whoever has the files, in fp32 on a CPU. What a seed gives there is the same whatever the
batch or the number of processes; on another kind of processor, sums of another order can turn a
token now and then. To make a record, write one with any `tokens_sha256`: the check says the right
one.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clip import CLIP
from maskgit.common import UserError
from maskgit.common.folder import FORMAT_VERSION, KINDS, file_hash, find, read_json
from maskgit.importing import SOURCE, mismatch, not_finite, partners, written
from maskgit.model import MaskGIT
from maskgit.pipeline import Pipeline
from maskgit.published_files import identity
from vqgan import VQGAN

Finding = tuple[str, str, bool]  # what, what was found, whether it is well

TRACE = "trace.json"
LABELS = (int, str, type(None))  # of a trace
OTHERS = (SOURCE, TRACE, "metrics.json")  # that are no part of what was written
PARTS: dict[str, Any] = dict(zip(KINDS, (VQGAN, MaskGIT, CLIP), strict=True))


def check_folder(folder: Path) -> Iterator[Finding]:
    """All that is looked at in a model folder; UserError for one that is a part of a model."""
    if folder.resolve().name in PARTS and (folder / "config.json").exists():
        raise UserError(f"{folder} is one part of a model: give the folder above it")
    there = [kind for kind in PARTS if (folder / kind).is_dir()]
    source: dict[str, Any] = {}
    if (folder / SOURCE).exists():
        try:
            source = read_source(folder)
        except UserError as error:
            yield SOURCE, str(error), False
        else:
            listed = {*source["parts"], *(name.partition("/")[0] for name in source["files"])}
            added = [kind for kind in there if kind not in listed] if source["parts"] else []
            yield from _hashes(folder, source["files"], added)
            yield from _sources(source["parts"], there, added)
    else:
        yield SOURCE, "none, so no hashes to compare with", True
    if not there:
        yield "parts", f"none of {', '.join(PARTS)} is in {folder}", False
    for kind in there:
        yield _loads(kind, folder)
    if {"vqgan", "transformer"} <= set(there):
        yield from _pipeline(folder, source.get("parts", {}))


def read_source(folder: Path) -> dict[str, Any]:
    """What `source.json` says; UserError for another content."""
    content, path = read_json(folder / SOURCE), folder / SOURCE
    keys = ("family", "file", "licence", "sha256")
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: no format_version {FORMAT_VERSION}")
    parts, files = content.get("parts"), content.get("files")
    if not isinstance(files, dict) or not isinstance(parts, dict):
        raise UserError(f"{path} has no parts or no files: import the model again")
    if not set(parts) <= set(PARTS):
        raise UserError(f"{path} has other parts than {', '.join(PARTS)}: import the model again")
    if not all(
        isinstance(part, dict) and all(isinstance(part.get(key), str) for key in keys)
        for part in parts.values()
    ):
        raise UserError(f"{path} does not say of each part {', '.join(keys)}")
    if not all(isinstance(value, str) and _inside(name) for name, value in files.items()):
        raise UserError(f"{path}: its files are not all names in this folder with a SHA-256 each")
    return content


def _inside(name: str) -> bool:
    """Whether a name can be that of a file in a folder, or in one in it."""
    return name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


def _hashes(folder: Path, files: dict[str, str], added: list[str]) -> Iterator[Finding]:
    """One line if all files are as they were written, else one for each that is not. added: parts
    of the folder that were put beside those that were imported."""
    wrong = 0
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file():
            wrong += 1
            yield name, f"missing from {folder}: import the model again", False
        elif file_hash(path) != recorded:
            wrong += 1
            yield name, f"sha256 {file_hash(path)}, and {recorded} was written", False
    for name in written(folder):
        if name not in files and _read_with_it(name) and name.partition("/")[0] not in added:
            wrong += 1
            yield name, f"{SOURCE} has no hash of it: remove it, or import the model again", False
    if files and not wrong:
        yield "hashes", f"{len(files)} files are as they were written", True


def _read_with_it(name: str) -> bool:
    """Whether a file, by its name from the folder on, is one that loading the model may read."""
    top, _, rest = name.partition("/")
    return top in PARTS if rest else name.endswith((".json", ".safetensors")) and name not in OTHERS


def _sources(
    parts: dict[str, dict[str, str]], there: list[str], added: list[str]
) -> Iterator[Finding]:
    """Where each part came from, and whether it is the published file."""
    for kind, part in parts.items():
        about = f"{part['family']}, from {part['file']}, sha256 {part['sha256']}"
        known = identity(part["file"], part["sha256"])
        yield f"source of {kind}", f"{about}; {part['licence']}; {known}", True
    for kind in PARTS:
        if kind in added:
            yield f"source of {kind}", "put beside what was imported, so no hash to compare", True
        elif (kind in parts) != (kind in there):
            where = ("folder", SOURCE) if kind in there else (SOURCE, "folder")
            yield f"source of {kind}", f"in the {where[0]} and not in the {where[1]}", False


def _loads(kind: str, folder: Path) -> Finding:
    try:
        model = PARTS[kind].from_pretrained(folder / kind)
    except UserError as error:
        return kind, str(error), False
    if strange := not_finite(model):
        listed = ", ".join(strange[:3])
        return kind, f"{len(strange)} tensors hold numbers that are not finite ({listed})", False
    count = sum(parameter.numel() for parameter in model.parameters())
    return kind, f"loads, every tensor in its place, {count / 1e6:.1f} million weights", True


def _pipeline(folder: Path, parts: dict[str, Any]) -> Iterator[Finding]:
    """Whether the two fit, and whether they give the recorded tokens."""
    what = "tokenizer and transformer"
    try:
        pipe = Pipeline.from_pretrained(folder, "cpu", "fp32")
    except UserError as error:
        yield what, str(error), False
        return
    reason = None
    if {"vqgan", "transformer"} <= set(parts):
        ours, theirs = parts["vqgan"], parts["transformer"]
        configs = pipe.vqgan.config, pipe.transformer.config
        reason = mismatch(ours["family"], configs[0], theirs["family"], configs[1], ours["file"])
    h, w = pipe.image_size
    found = f"do not belong together: {reason}" if reason else f"fit: images of {h} x {w}"
    yield what, found, not reason
    if (folder / TRACE).exists():
        yield _trace(pipe, folder / TRACE, parts)


def _trace(pipe: Pipeline, path: Path, parts: dict[str, Any]) -> Finding:
    """Whether a record's seed gives its tokens."""
    try:
        record = read_trace(path)
        for kind, recorded in record.get("sources", {}).items():
            if parts.get(kind, {}).get("sha256") != recorded:
                return TRACE, f"is of another {kind}, imported from {recorded}", False
        found = tokens_hash(pipe, record)
    except UserError as error:
        return TRACE, str(error), False
    if found != record["tokens_sha256"]:
        recorded = record["tokens_sha256"]
        return TRACE, f"its seed gives tokens of sha256 {found}, not {recorded}", False
    return TRACE, f"seed {record['seed']} gives the {len(record['labels'])} recorded grids", True


def read_trace(path: Path) -> dict[str, Any]:
    """A record of tokens, see above; UserError for another content."""
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: no format_version {FORMAT_VERSION}")
    labels, sources = record.get("labels"), record.get("sources", {})
    fine = {
        "seed": type(record.get("seed")) is int,  # True is none
        "labels": isinstance(labels, list) and all(type(one) in LABELS for one in labels),
        "tokens_sha256": isinstance(record.get("tokens_sha256"), str),
        "preset": isinstance(record.get("preset"), str | None),
        "sources": isinstance(sources, dict) and all(isinstance(v, str) for v in sources.values()),
    }
    if wrong := [name for name, good in fine.items() if not good]:
        raise UserError(f"{path}: {', '.join(wrong)} is missing or of another type")
    return record


def tokens_hash(pipe: Pipeline, record: dict[str, Any]) -> str:
    """SHA-256 of the tokens that a record's seed, labels and preset give."""
    steps: list[Any] = []
    pipe.sample(
        record["labels"],
        seed=record["seed"],
        preset=record.get("preset"),
        batch_size=max(1, len(record["labels"])),
        on_step=lambda step, tokens, mask, confidence: steps.append(tokens),
    )
    return hashlib.sha256(steps[-1].cpu().numpy().astype("<i8").tobytes()).hexdigest()


def foreign(init: str, tokenizer: str) -> Iterator[str]:
    """What to tell of an imported transformer to train on and a tokenizer to train it with, where
    these are of families that do not go together: the same numbers mean other tokens there."""
    theirs, ours = family(init, "transformer"), family(tokenizer, "vqgan")
    if theirs and ours and ours not in partners(theirs):
        yield f"warning: {theirs} was not trained on the tokens of {ours}, tokenizer={tokenizer}"


def family(source: str, kind: str) -> str | None:
    """The family of a part of a model, if it was imported and its folder says so."""
    folder = find(source)
    parts = read_source(folder)["parts"] if (folder / SOURCE).is_file() else {}
    return parts.get(kind, {}).get("family")
