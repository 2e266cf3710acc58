"""Whether a model folder is whole and computes what it did elsewhere: `maskgit doctor --model`.

Checked are the hashes that `source.json` has (see `maskgit/importing.py`), the structure (each part
loads, with every tensor in its place), that tokenizer and transformer belong together, and, where
the folder has a `trace.json`, that its seed gives its tokens. That is a record of

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
from maskgit.common.folder import FORMAT_VERSION, file_hash, read_json
from maskgit.importing import SOURCE, mismatch
from maskgit.model import MaskGIT
from maskgit.pipeline import Pipeline
from vqgan import VQGAN

Finding = tuple[str, str, bool]  # what, what was found, whether it is well

TRACE = "trace.json"
PARTS: dict[str, Any] = {"vqgan": VQGAN, "transformer": MaskGIT, "clip": CLIP}


def check_folder(folder: Path) -> Iterator[Finding]:
    """All that is looked at in a model folder."""
    source: dict[str, Any] = {}
    if (folder / SOURCE).is_file():
        try:
            source = read_source(folder)
        except UserError as error:
            yield SOURCE, str(error), False
        yield from _hashes(folder, source.get("files", {}))
        for kind, part in source.get("parts", {}).items():
            about = f"{part['family']}, from {part['file']}, sha256 {part['sha256']}"
            yield f"source of {kind}", f"{about}; {part['licence']}", True
    else:
        yield SOURCE, "none, so no hashes to compare with", True
    there = [kind for kind in PARTS if (folder / kind).is_dir()]
    if not there:
        yield "parts", f"none of {', '.join(PARTS)} is in {folder}", False
    for kind in there:
        yield _loads(kind, folder)
    if {"vqgan", "transformer"} <= set(there):
        yield from _pipeline(folder, source.get("parts", {}))


def read_source(folder: Path) -> dict[str, Any]:
    """What `source.json` says; UserError for another content."""
    content, path = read_json(folder / SOURCE), folder / SOURCE
    keys = {"family", "file", "sha256", "licence"}
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: no format_version {FORMAT_VERSION}")
    parts, files = content.get("parts"), content.get("files")
    if not isinstance(files, dict) or not isinstance(parts, dict):
        raise UserError(f"{path} has no parts or no files: import the model again")
    if not all(isinstance(part, dict) and keys <= set(part) for part in parts.values()):
        raise UserError(f"{path} does not say of each part {', '.join(sorted(keys))}")
    return content


def _hashes(folder: Path, files: dict[str, str]) -> Iterator[Finding]:
    """One line if all files are as they were written, else one for each that is not."""
    wrong = 0
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file():
            wrong += 1
            yield name, f"missing from {folder}: import the model again", False
        elif file_hash(path) != recorded:
            wrong += 1
            yield name, f"sha256 {file_hash(path)}, and {recorded} was written", False
    if files and not wrong:
        yield "hashes", f"{len(files)} files are as they were written", True


def _loads(kind: str, folder: Path) -> Finding:
    try:
        model = PARTS[kind].from_pretrained(folder / kind)
    except UserError as error:
        return kind, str(error), False
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
    if (folder / TRACE).is_file():
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
    kinds = {"seed": int, "labels": list, "tokens_sha256": str}
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: no format_version {FORMAT_VERSION}")
    wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
    if wrong or not isinstance(record.get("sources", {}), dict):
        raise UserError(f"{path}: {', '.join(wrong) or 'sources'} is missing or of another type")
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
