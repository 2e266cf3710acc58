"""Published files -> a model folder of this project: what they are, whether they fit, and writing.

A folder has beside its parts a `source.json`: {"format_version": 1, "parts": {"vqgan": {"family",
"file" (its name), "sha256" (of that file), "licence"}, ...}, "files": {"vqgan/config.json": sha256,
...}}, the latter of all that was written, so that `maskgit doctor --model` can tell a change.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip import CLIP
from clip.layouts import measure, to_native
from maskgit import weights as transformers
from maskgit.common import UserError
from maskgit.common.folder import FORMAT_VERSION, PARTIAL, file_hash, write_json
from maskgit.common.published import read_tensors
from maskgit.model import MaskGITConfig
from maskgit.pipeline import Pipeline
from maskgit.presets import HALTON, OFFICIAL, presets_for
from vqgan import VQGANConfig, layouts
from vqgan import weights as tokenizers

SOURCE = "source.json"
# Of the published weights, by the beginning of the family, the first that fits.
LICENCES = {
    "official MaskGIT": "Apache-2.0 (google-research/maskgit)",
    "MaskGIT, ported": "Apache-2.0 (google-research/maskgit, fun-research/TiTok)",
    "taming": "MIT (CompVis/taming-transformers; it states none for the weights)",
    "LlamaGen": "MIT (FoundationVision/LlamaGen)",
    "Halton-MaskGIT": "MIT (valeoai/Halton-MaskGIT)",
}
# The tokenizers on whose tokens each family of transformers was trained, all of 16 pixels a token.
PARTNERS = {
    OFFICIAL: (layouts.OFFICIAL.family, layouts.PORT.family, layouts.MASKBIT.family),
    HALTON: (layouts.LLAMAGEN.family,),
}
FACTOR = 16
IMAGENET = 1000  # classes


@dataclass
class Part:
    """One model of a folder, in the folder `kind` there."""

    kind: str  # "vqgan", "transformer" or "clip"
    family: str
    model: Any
    path: Path
    licence: str

    def describe(self) -> str:
        """What a person who imports it wants to read."""
        config, count = self.model.config, sum(p.numel() for p in self.model.parameters()) / 1e6
        if self.kind == "vqgan":
            what = f"tokenizer: {config.codebook_size:,} codes, {config.factor} pixels a token"
        elif self.kind == "transformer":
            h, w = config.grid
            what = f"transformer: {h} x {w} tokens, {config.num_classes:,} classes"
        else:
            what = f"CLIP: images of {' x '.join(map(str, config.image.size))}"
        return f"{self.path.name}: {self.family} {what}, {count:.1f} million weights"


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
    check_destination(dest)
    parts: dict[str, Part] = {}
    for file in files:
        part = recognise(file, heads)
        say(part.describe())
        if part.kind in parts:
            both = f"{parts[part.kind].path} and {part.path}"
            raise UserError(
                f"{both} are both for {part.kind}/: import them into folders of their own"
            )
        parts[part.kind] = part
    if heads is not None and "transformer" not in parts:
        raise UserError(f"heads={heads} is for a transformer, and none of the files is one")
    check_together(parts)
    partial = dest.with_name(f"{PARTIAL}{dest.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of an import that was killed
    try:
        write(partial, parts)
        partial.rename(dest)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for line in next_steps(dest, parts):
        say(line)


def check_destination(dest: Path) -> None:
    """UserError for a place where no new folder can be."""
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
    tensors = read_tensors(path)
    tokenizer = tokenizers.published(tensors)
    if tokenizer:
        return Part("vqgan", *tokenizer, path, _licence(tokenizer[0]))
    transformer = transformers.published(tensors, heads)
    if transformer:
        return Part("transformer", *transformer, path, _licence(transformer[0]))
    try:
        measure(to_native(tensors), path)
    except UserError:
        some = ", ".join(list(tensors)[:3])
        raise UserError(
            f"{path} matches no tokenizer, transformer or CLIP that is known here (it has "
            f"{len(tensors)} tensors: {some}, ...)"
        ) from None
    del tensors
    model = CLIP.from_pretrained(path, recipe=recipe or None)
    trained = model.config.recipe or "CLIP"
    licence = "MIT (openai/CLIP)" if "openai" in trained else "not known here: see who published it"
    return Part("clip", trained, model, path, licence)


def _licence(family: str) -> str:
    return next(text for start, text in LICENCES.items() if family.startswith(start))


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
    partners = next((v for k, v in PARTNERS.items() if transformer.startswith(k)), (tokenizer,))
    size = vqgan.factor * config.grid[0]
    named = re.search(r"imagenet(\d+)", file)
    if vqgan.codebook_size != config.codebook_size:
        return f"{vqgan.codebook_size:,} and {config.codebook_size:,} codes"
    if tokenizer not in partners:
        return f"this transformer was trained on the tokens of {partners[0]}"
    if vqgan.factor != FACTOR:
        return f"this transformer takes {FACTOR} pixels a token, not {vqgan.factor}"
    if named and tokenizer == layouts.OFFICIAL.family and int(named[1]) != size:
        return f"{file} is for images of {named[1]}, and the transformer for those of {size}"
    return None


def write(folder: Path, parts: Mapping[str, Part]) -> None:
    """All files of a model folder, `source.json` last."""
    if {"vqgan", "transformer"} <= set(parts):
        transformer = parts["transformer"]
        config = transformer.model.config
        presets = presets_for(transformer.family, config.grid)
        usual: dict[str, Any] = next(iter(presets.values()), {}).get("settings", {})
        labels = imagenet() if config.num_classes == IMAGENET else ()
        pipe = Pipeline(parts["vqgan"].model, transformer.model, labels, usual, presets)
        pipe.save_pretrained(folder)
    for kind, part in parts.items():
        if not (folder / kind).exists():
            part.model.save_pretrained(folder / kind)
    about = {
        kind: {
            "family": part.family,
            "file": part.path.name,
            "sha256": file_hash(part.path),
            "licence": part.licence,
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
