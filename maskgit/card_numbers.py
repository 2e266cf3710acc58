"""Measured numbers in a model's card: of this very model, with protocol, conditions and command."""

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip.recipes import recipes
from maskgit.common import UserError
from maskgit.evaluation import report
from maskgit.evaluation.protocol import clip_name, verdict

FILE = "metrics.json"
# What is measured by a command that says which model it was.
MEASURES = ("generator", "tokenizer", "clip")


@dataclass
class Result:
    """A metrics.json: where it will be on the hub, its bytes, and what it says."""

    path: str
    content: bytes
    result: dict[str, Any]


def read_results(folder: Path, given: list[Path], hashes: Mapping[str, str]) -> list[Result]:
    """The metrics.json in a model's folder, and those that are given (or their folders).

    Raises UserError for one that measured another model than the weights with these hashes.
    """
    found = [(file.relative_to(folder).as_posix(), file) for file in sorted(folder.rglob(FILE))]
    given = [file / FILE if file.is_dir() else file for file in map(Path.expanduser, given)]
    results = []
    for path, file in [*found, *(("", file) for file in given)]:
        if not file.is_file():
            raise UserError(f"no file {file}: give a {FILE} of `maskgit evaluate`, or its folder")
        result = report.load(file)
        check_model(file, result, hashes)
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()[:8]
        path = path or f"metrics/{result['command']}-{digest}/{FILE}"
        results.append(Result(path, content, result))
    return list({one.path: one for one in results}.values())


def check_model(file: Path, result: dict[str, Any], hashes: Mapping[str, str]) -> None:
    """UserError unless the numbers are of the weights with these hashes."""
    command = result["command"]
    if command not in MEASURES:
        raise UserError(
            f"{file} is of `evaluate {command}`, which does not know whose images they are: "
            f"take one of `evaluate {' or '.join(MEASURES)}`"
        )
    clip = {"clip": result["extractor"]["sha256"]}
    measured = clip if command == "clip" else result["model"]["sha256"]
    for kind, sha256 in measured.items():
        if hashes.get(kind) != sha256:
            raise UserError(
                f"{file} measured another {kind} (sha256 {sha256[:16]}...) than the one in the "
                "folder: evaluate that, or leave the file out"
            )


def private_paths(result: Result) -> list[str]:
    """Paths from the root or the home of a machine that a metrics.json names."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from texts(inner)
        elif isinstance(value, str) and value.startswith(("/", "~/")):
            yield value

    return sorted(set(texts(result.result)))


def numbers(results: list[Result], name: str, own: dict[str, Any]) -> str:
    """All of them. name: the model's on the hub. own: the settings that it samples by anyway."""
    return "\n\n".join(one_result(result, name, own) for result in results)


def one_result(one: Result, name: str, own: dict[str, Any]) -> str:
    """A table, what it compares with, under which conditions, and the command that gives it."""
    result = one.result
    rows = ["| Metric | Value | Deviation over |", "|---|---|---|"]
    rows += [
        f"| {metric} | {report.show(value)} | {value.get('over', '')} |"
        for metric, value in result["metrics"].items()
        if isinstance(value, dict) and "value" in value
    ]
    protocol = verdict(result) if "protocol" in result else "no protocol that others follow"
    lines = [
        "\n".join(rows),
        f"{protocol[0].upper()}{protocol[1:]}.",
        f"{'; '.join(conditions(result))}. All of it: [{one.path}]({one.path}).",
        f"```sh\n{command(result, name, own)}\n```",
    ]
    return "\n\n".join(lines)


def conditions(result: dict[str, Any]) -> Iterator[str]:
    """What was measured, with what, on what, each with its hash."""
    images, real, network = result["images"], result["reference"], result["extractor"]
    what = "Generated images" if result["command"] == "generator" else place(images["name"])
    runs = f" in each of {images['runs']} runs" if images.get("runs", 1) > 1 else ""
    yield f"{what}: {images['count']:,}{runs}"
    if real and result["command"] != "tokenizer":
        count = f"{real['count']:,} images, " if real["count"] else ""
        yield f"against {place(real['name'])} ({count}sha256 `{real['hash'][:16]}...`)"
    elif result["command"] == "tokenizer":
        yield f"sha256 `{images['hash'][:16]}...`"
    yield f"by {place(network['name'])} (sha256 `{network['sha256'][:16]}...`)"
    if result["command"] == "clip":
        yield "names of classes, templates and captions as the file has them"
    yield f"{result['dtype']} on {result['gpu'] or result['processor']}"
    versions = result["versions"]
    yield f"maskgit {versions['maskgit']}, torch {versions['torch']}"


def command(result: dict[str, Any], name: str, own: dict[str, Any]) -> str:
    """The command that measures it again. Files and folders of the machine that measured it are
    called by their names alone; their hashes say whether one has the same."""
    images = result["images"]
    words = ["maskgit", "evaluate", result["command"]]
    extractor = result["extractor"]
    if result["command"] == "generator":
        words += ["--model", name, "--reference", place(result["reference"]["name"])]
        words += ["--extractor", extractor_option(extractor["name"])]
        if (other := result.get("classifier", extractor))["sha256"] != extractor["sha256"]:
            words += ["--classifier", place(other["name"])]
        words += ["--num", str(images["count"]), "--runs", str(images["runs"])]
        words += ["--labels", place(result["labels"]), "--seed", str(result["seeds"][0])]
        words += ["--dtype", result["dtype"]]
        for key, value in changed(result["settings"], own).items():
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{key.replace('_', '-')}", text]
        if "clip_score" in result:
            words += ["--clip-score", place(result["clip_score"]["model"]["source"])]
    elif result["command"] == "tokenizer":
        words += ["--vqgan", name, "--data", place(images["name"])]
        words += ["--extractor", extractor_option(extractor["name"])]
        words += ["--size", str(images["size"][0])] if images["resized"] else []
    else:
        words += ["--clip", name, "--data", place(images["name"])]
        words += ["--train", place(result["reference"]["name"])] if result["reference"] else []
        words += ["--task", ",".join(result["tasks"]), "--seed", str(result["clip"]["seed"])]
    words += ["--tf32"] if extractor["tf32"] else []
    return shlex.join(words)


def extractor_option(name: str) -> str:
    """What --extractor is called for the extractor of that name: published CLIPs are clip:NAME."""
    if name.startswith("clip-"):
        return next((f"clip:{recipe}" for recipe in recipes() if clip_name(recipe) == name), name)
    return name


def changed(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from a model's own."""
    plain = json.loads(json.dumps(dict(own)))
    return {key: value for key, value in settings.items() if plain.get(key) != value}


def place(name: str) -> str:
    """A set, a file or a model by its name: of a path, the last part."""
    return Path(name).name if name.startswith(("/", "~", ".")) else name
