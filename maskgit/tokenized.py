"""The tokens that a transformer learns from: of a cache that a run names, or made of its images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit.common import UserError
from maskgit.common.device import pick_device
from maskgit.common.folder import file_hash, find
from maskgit.engine.data import SPLITS, ImageSet, open_images
from maskgit.engine.tokenize import SHARD_IMAGES, cached
from maskgit.engine.tokens import Stamp, TokenSet, is_cache, open_tokens

if TYPE_CHECKING:
    from maskgit.runs import MaskGITRun
    from vqgan import VQGAN

Sets = dict[str, TokenSet]  # by split


def token_stamp(
    name: str,
    tokenizer: VQGAN,
    images: ImageSet,
    crops: int = 0,
    seed: int = 0,
    shard_images: int = SHARD_IMAGES,
) -> Stamp:
    """What the tokens of a set depend on; `name` is where the tokenizer was loaded from.

    Raises UserError for images of a size that does not divide into tokens.
    """
    config, factor = images.config, tokenizer.config.factor
    if any(side % factor for side in config.size):
        height, width = config.size
        raise UserError(f"a size of {height} x {width} is no multiple of {factor} pixels a token")
    return Stamp(
        tokenizer=weights_hash(name),
        data=images.fingerprint,
        images=len(images),
        size=list(config.size),
        mirror=config.mirror,
        no_mirror=sorted(config.no_mirror) if config.mirror else [],
        crops=crops,
        seed=seed if crops else 0,
        dtype=str(tokenizer.encoder.conv_in.weight.dtype).removeprefix("torch."),
        codebook_size=tokenizer.config.codebook_size,
        grid=[side // factor for side in config.size],
        classes=images.classes,
        shard_images=shard_images,
        tokenizer_name=name,
        data_path=config.path,
    )


def weights_hash(tokenizer: str) -> str:
    """SHA-256 of the weights of a tokenizer: folder, bundled name or hub id."""
    folder = find(tokenizer)
    inner = folder / "vqgan"
    return file_hash((inner if inner.is_dir() else folder) / "model.safetensors")


def token_sets(run: MaskGITRun, folder: Path, tokenizer: VQGAN) -> tuple[Stamp, Callable[[], Sets]]:
    """The stamp of a run's training tokens, and what gives these and the held-out ones.

    Those of `run.data.path`, if it is a cache; else those of its images, which the call makes in
    the run's `folder` where they are not there. Raises UserError for a cache that does not fit.
    """
    given = Path(run.data.path).expanduser()
    if is_cache(given):
        stamp, sets = given_tokens(run, given)
        return stamp, lambda: sets
    images = {split: open_images(run.data, split) for split in SPLITS}
    stamps = {split: token_stamp(run.tokenizer, tokenizer, images[split]) for split in SPLITS}
    device = pick_device(run.train.device)

    def make() -> Sets:
        return {
            split: cached(folder / "tokens" / split, stamps[split], some, tokenizer.encode, device)
            for split, some in images.items()
        }

    return stamps["train"], make


def given_tokens(run: MaskGITRun, folder: Path) -> tuple[Stamp, Sets]:
    """The cache that a run names; UserError where its tokenizer or its data settings are others."""
    used, stamps, sets = weights_hash(run.tokenizer), {}, {}
    for split in SPLITS:
        if not (folder / split).is_dir():
            raise UserError(
                f"{folder} has no folder {split}: data.path takes what maskgit tokenize --out "
                f"wrote, a folder with train and heldout"
            )
        stamps[split], sets[split] = open_tokens(folder / split)
        if stamps[split].tokenizer != used:
            raise UserError(
                f"{folder / split} holds tokens of {stamps[split]}, and tokenizer={run.tokenizer} "
                f"is another (sha256 {used[:12]}): give tokenizer={stamps[split].tokenizer_name}, "
                f"or tokenize the images anew"
            )
    stamp, other = stamps["train"], stamps["heldout"]
    if (stamp.size, stamp.classes) != (other.size, other.classes):
        raise UserError(f"{folder}: train ({stamp}) and heldout ({other}) do not belong together")
    data = run.data
    fixed: dict[str, tuple[Any, Any]] = {
        "size": (stamp.size, list(data.size)),
        "mirror": (stamp.mirror, data.mirror),
        "no_mirror": (stamp.no_mirror, sorted(data.no_mirror) if data.mirror else []),
    }
    changed = [name for name, (made, wanted) in fixed.items() if made != wanted]
    if changed:
        give = " ".join(f"data.{name}={_plain(fixed[name][0])}" for name in changed)
        raise UserError(f"{folder} was made by other settings than this run's: give {give}")
    return stamp, sets


def _plain(value: Any) -> str:
    """A setting as it is written on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(str, value))}]"
