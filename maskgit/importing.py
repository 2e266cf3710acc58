"""Published files -> a model folder of this project: what they are, whether they fit, and writing.

A folder has beside its parts a `source.json`: {"format_version": 1, "parts": {"vqgan": {"family",
"file" (its name), "sha256" (of that file), "licence", "ballast" (how the names of those tensors
begin that were left out)}, ...}, "files": {"vqgan/config.json": sha256, ...}}, the latter of all
that was written, so that `maskgit doctor --model` can tell a change.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip import CLIP
from clip.layouts import DROPPED, measure, to_native
from maskgit import weights as transformers
from maskgit.common import UserError
from maskgit.common.folder import FORMAT_VERSION, PARTIAL, file_hash, write_json
from maskgit.common.published import read_tensors
from maskgit.common.unpickle import printable
from maskgit.model import MaskGITConfig
from maskgit.pipeline import Pipeline
from maskgit.presets import HALTON, OFFICIAL, presets_for
from maskgit.published_files import CLIP as OPENAI
from maskgit.published_files import identity, licence_of
from vqgan import VQGANConfig, layouts
from vqgan import weights as tokenizers

SOURCE = "source.json"
# The tokenizers on whose tokens each family of transformers was trained, all of 16 pixels a token.
PARTNERS = {
    OFFICIAL: (layouts.OFFICIAL.family, layouts.PORT.family, layouts.MASKBIT.family),
    HALTON: (layouts.LLAMAGEN.family,),
}
FACTOR = 16
PORTED = 256  # pixels: of the two official tokenizers, the one that was ported
IMAGENET = 1000  # classes


@dataclass
class Part:
    """One model of a folder, in the folder `kind` there."""

    kind: str  # "vqgan", "transformer" or "clip"
    family: str
    model: Any
    path: Path
    sha256: str  # of the file
    licence: str
    ballast: dict[str, int]  # how many tensors were left out, by how their names begin

    def describe(self) -> Iterator[str]:
        """What a person who imports it wants to read."""
        config, count = self.model.config, sum(p.numel() for p in self.model.parameters()) / 1e6
        if self.kind == "vqgan":
            what = f"tokenizer: {config.codebook_size:,} codes, {config.factor} pixels a token"
        elif self.kind == "transformer":
            h, w = config.grid
            what = f"transformer: {h} x {w} tokens, {config.num_classes:,} classes"
        else:
            what = f"CLIP: images of {' x '.join(map(str, config.image.size))}"
        about = f"{self.family} {what}, {count:.1f} million weights"
        yield f"{self.path.name}: {about}; {identity(self.path.name, self.sha256)}"
        if self.ballast:
            names = ", ".join(f"{name} ({n})" for name, n in self.ballast.items())
            yield f"{self.path.name}: {sum(self.ballast.values())} tensors left out: {names}"


def import_files(
    files: Sequence[str],
    dest: str | Path,
    heads: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write the models in published files as the model folder `dest`, all of it or nothing.

    files: a tokenizer, a transformer, a CLIP (as "FILE@RECIPE" where its recipe is open): one of
        each at most. heads: see `maskgit.weights.published`.

    Raises UserError where `dest` holds something, where a file is damaged, would run code or is no
    model that is known here, and where tokenizer and transformer do not belong together.
    """
    dest = Path(dest).expanduser()
    place = dest.resolve()  # of a link, the folder that it leads to
    check_destination(place)
    parts: dict[str, Part] = {}
    for file in files:
        part = recognise(file, heads)
        for line in part.describe():
            say(line)
        if part.kind in parts:
            both = f"{parts[part.kind].path} and {part.path}"
            raise UserError(
                f"{both} are both for {part.kind}/: import them into folders of their own"
            )
        parts[part.kind] = part
    if heads is not None and "transformer" not in parts:
        raise UserError(f"--heads {heads} is for a transformer, and none of the files is one")
    check_together(parts)
    partial = place.with_name(f"{PARTIAL}{place.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of an import that was killed
    try:
        write(partial, parts)
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for line in next_steps(dest, parts):
        say(line)


def check_destination(dest: Path) -> None:
    """UserError for a place, as `resolve` gives it, where no new folder can be."""
    if dest == Path.cwd():
        raise UserError(f"{dest} is the folder you are in: give a new one, in it or elsewhere")
    if dest.is_dir() and any(dest.iterdir()):
        raise UserError(f"{dest} holds something already: give a folder that is new or empty")
    if dest.exists() and not dest.is_dir():
        raise UserError(f"{dest} is a file: the last argument is the folder to write")


def recognise(file: str, heads: int | None = None) -> Part:
    """The model in a published file; UserError where it is none that is known here."""
    name, _, recipe = file.rpartition("@")
    if not recipe or not Path(name).expanduser().is_file():
        name, recipe = file, ""
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the files with the weights in it")
    tensors, sha256 = read_tensors(path), file_hash(path)
    names = list(tensors)
    tokenizer = tokenizers.published(tensors)
    transformer = None if tokenizer else transformers.published(tensors, heads)
    model: Any
    if found := tokenizer or transformer:
        kind = "vqgan" if tokenizer else "transformer"
        known: Iterable[str] = tokenizers.BALLAST if tokenizer else transformers.BALLAST
        family, model = found
        licence = licence_of(path, sha256, family)
    else:
        check_clip(tensors, path)
        del tensors  # or there would be two of each
        kind, known, model = "clip", DROPPED, CLIP.from_pretrained(path, recipe=recipe or None)
        family = model.config.recipe or "CLIP"
        unknown = "not known here: see who published it"
        licence = OPENAI.licence if "openai" in family else unknown
    if strange := not_finite(model):
        raise UserError(
            f"{path}: {len(strange)} of its tensors hold numbers that are not finite "
            f"({', '.join(strange[:3])}): fetch it again, or take an earlier checkpoint"
        )
    return Part(kind, family, model, path, sha256, licence, begin_with(known, names))


def check_clip(tensors: Mapping[str, Tensor], path: Path) -> None:
    """UserError for tensors that are no CLIP's, nor of anything else."""
    try:
        measure(to_native(tensors), path)
    except UserError:
        some = ", ".join(map(printable, list(tensors)[:3]))
        raise UserError(
            f"{path} matches no tokenizer, transformer or CLIP that is known here (it has "
            f"{len(tensors)} tensors: {some}, ...)"
        ) from None


def not_finite(model: torch.nn.Module) -> list[str]:
    """The tensors of a model, by their names here, in which a number is infinite or none."""
    return [name for name, value in model.state_dict().items() if not value.isfinite().all()]


def begin_with(known: Iterable[str], names: Iterable[str]) -> dict[str, int]:
    """How many names begin with each of those that are known, where there are some."""
    starts = tuple(known)
    found = (next((k for k in starts if name.startswith(k)), None) for name in names)
    return dict(Counter(start for start in found if start))


def check_together(parts: Mapping[str, Part]) -> None:
    """UserError for a tokenizer and a transformer that do not belong together."""
    if not {"vqgan", "transformer"} <= set(parts):
        return
    tokenizer, transformer = parts["vqgan"], parts["transformer"]
    reason = mismatch(
        tokenizer.family,
        tokenizer.model.config,
        transformer.family,
        transformer.model.config,
        tokenizer.path.name,
    )
    if reason:
        raise UserError(
            f"{tokenizer.path} ({tokenizer.family}) and {transformer.path} ({transformer.family}) "
            f"do not belong together: {reason}"
        )


def mismatch(
    tokenizer: str, vqgan: VQGANConfig, transformer: str, config: MaskGITConfig, file: str = ""
) -> str | None:
    """Why a published tokenizer and transformer do not belong together; None if they do.

    tokenizer, transformer: their families. file: the name of the tokenizer's file; the official
    ones say for which size of images they are, which nothing in them does.
    """
    known, size = partners(transformer) or (tokenizer,), vqgan.factor * config.grid[0]
    made_for = image_size(tokenizer, file)
    if vqgan.codebook_size != config.codebook_size:
        return f"{vqgan.codebook_size:,} and {config.codebook_size:,} codes"
    if tokenizer not in known:
        return f"this transformer was trained on the tokens of {known[0]}"
    if vqgan.factor != FACTOR:
        return f"this transformer takes {FACTOR} pixels a token, not {vqgan.factor}"
    if made_for not in (None, size):
        return f"{file or tokenizer} is for images of {made_for}, and the transformer for {size}"
    return None


def partners(transformer: str) -> tuple[str, ...]:
    """The families of tokenizers that one of transformers was trained with; none if unknown."""
    return next((known for start, known in PARTNERS.items() if transformer.startswith(start)), ())


def image_size(tokenizer: str, file: str) -> int | None:
    """The size of the images that an official tokenizer is for, as given or ported, from its family
    and the name of its file: there are two, of one shape. None where neither tells."""
    if tokenizer not in PARTNERS[OFFICIAL]:
        return None
    named = re.search(r"imagenet(?:-f16-)?(256|512)(?!\d)", file)
    if named:
        return int(named[1])
    return None if tokenizer == layouts.OFFICIAL.family else PORTED


def write(folder: Path, parts: Mapping[str, Part]) -> None:
    """All files of a model folder, `source.json` last."""
    transformer = parts.get("transformer")
    config = transformer.model.config if transformer else None
    labels = imagenet() if config and config.num_classes == IMAGENET else []
    if transformer and config and "vqgan" in parts:
        presets = presets_for(transformer.family, config.grid)
        usual: dict[str, Any] = next(iter(presets.values()), {}).get("settings", {})
        pipe = Pipeline(parts["vqgan"].model, transformer.model, labels, usual, presets)
        pipe.save_pretrained(folder)
    for kind, part in parts.items():
        if not (folder / kind).exists():
            part.model.save_pretrained(folder / kind)
    if labels:  # for a transformer alone too: training from it keeps classes by their names
        write_json(folder / "labels.json", labels)
    about = {
        kind: {
            "family": part.family,
            "file": part.path.name,
            "sha256": part.sha256,
            "licence": part.licence,
            "ballast": list(part.ballast),
        }
        for kind, part in parts.items()
    }
    hashes = {name: file_hash(folder / name) for name in written(folder)}
    content = {"format_version": FORMAT_VERSION, "parts": about, "files": hashes}
    write_json(folder / SOURCE, content)


def written(folder: Path) -> list[str]:
    """The files in a folder and those in it, by their names from there."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files]


def imagenet() -> list[str]:
    """The 1000 class names of ImageNet in their usual order, torchvision's."""
    from torchvision.models import ResNet18_Weights

    return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def next_steps(dest: Path, parts: Mapping[str, Part]) -> Iterator[str]:
    """What was written, what its licence is, and what to do with it."""
    yield f"{dest}: {', '.join(f'{kind}/' for kind in parts)} and {SOURCE}"
    for kind, part in parts.items():
        yield f"licence of {kind}/: {part.licence}"
    if {"vqgan", "transformer"} <= set(parts):
        yield f"maskgit sample --model {dest}"
    elif "transformer" in parts:
        yield "to sample, a transformer needs its tokenizer: import both files at once"
