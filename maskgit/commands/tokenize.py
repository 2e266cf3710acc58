"""`maskgit tokenize`: a set of images as tokens, encoded once, to train transformers from."""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit.commands import shared

if TYPE_CHECKING:
    import torch

    from maskgit.engine.data import ImageSet
    from vqgan import VQGAN

HELP = "encode images once, to train transformers from their tokens"
EXAMPLE = "maskgit tokenize --data emoji --tokenizer emoji --out tokens"

SIZE = (64, 64)
BATCH, SHARD = 64, 4096
HELDOUT, BROKEN = 0.1, 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", required=True, help="folder, shards or bundled set of images")
    parser.add_argument("--tokenizer", required=True, help="folder, bundled name or hub id")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder; train and heldout are made in it"
    )
    parser.add_argument("--split", choices=("train", "heldout"), help="only this one (both)")
    parser.add_argument(
        "--size",
        type=shared.at_least(1),
        nargs=2,
        default=SIZE,
        metavar=("H", "W"),
        help="crop and resize to this height and width ({} {})".format(*SIZE),
    )
    varied = parser.add_argument_group("variants of each training image, from which training draws")
    varied.add_argument(
        "--no-mirror",
        nargs="*",
        metavar="CLASS",
        help="never mirror images of these classes; of none, where no name follows",
    )
    varied.add_argument(
        "--crops", type=shared.at_least(0), default=0, help="random ones beside the middle (0)"
    )
    varied.add_argument("--seed", type=shared.at_least(0), default=0, help="of the crops (0)")
    parser.add_argument(
        "--heldout", type=float, default=HELDOUT, help=f"share of one's own images ({HELDOUT})"
    )
    parser.add_argument(
        "--max-broken", type=float, default=BROKEN, help=f"share that may be unusable ({BROKEN})"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument(
        "--dtype", default="fp32", help="fp32; bf16 is faster on GPUs, and changes some tokens"
    )
    parser.add_argument(
        "--batch-size", type=shared.at_least(1), default=BATCH, help=f"images at once ({BATCH})"
    )
    parser.add_argument(
        "--workers", type=shared.at_least(0), default=0, help="processes that decode images (0)"
    )
    parser.add_argument(
        "--shard-images", type=shared.at_least(1), default=SHARD, help=f"a file has ({SHARD})"
    )


def run(args: argparse.Namespace) -> None:
    """Check everything, encode what is not there yet, and print the path.

    With RANK and WORLD_SIZE, as launchers set them, this process makes its share of the shards.
    """
    from maskgit.commands.evaluate.options import say
    from maskgit.common.device import pick_device
    from maskgit.common.folder import locked
    from maskgit.engine.tokenize import check_stamp, make_tokens
    from maskgit.evaluation.processes import Processes
    from maskgit.tokenized import token_stamp

    processes = Processes()
    device = pick_device(processes.device(args.device))
    tokenizer = load_tokenizer(args.tokenizer, args.dtype, device)
    sets, stamps = open_sets(args), {}
    for split, images in sets.items():
        crops = args.crops if split == "train" else 0  # held-out images are never varied
        how = (crops, args.seed, args.shard_images)
        stamps[split] = stamp = token_stamp(args.tokenizer, tokenizer, images, *how)
        check_stamp(args.out / split, stamp)
        shape = " x ".join(map(str, (stamp.variants, *stamp.grid)))
        say(split, f"{len(images):,} images of {shape} tokens (variants, rows, columns)")
    alone = processes.count == 1  # several that a launcher started share the work, others do not
    with locked(args.out) if alone else nullcontext():
        for split, images in sets.items():
            complete = make_tokens(
                args.out / split,
                stamps[split],
                images,
                tokenizer.encode,
                device,
                args.batch_size,
                processes.index,
                processes.count,
            )
            left = f"; {len(images.broken):,} unusable images left out" if images.broken else ""
            what = "complete" if complete else "waits for the shards of the other processes"
            say(split, what + left)
    if processes.first:
        print(args.out)


def open_sets(args: argparse.Namespace) -> "dict[str, ImageSet]":
    """The images of each split that is asked for."""
    from maskgit.common import UserError, nearest
    from maskgit.engine.data import SPLITS, DataConfig, open_images

    config = DataConfig(
        path=args.data,
        size=list(args.size),
        mirror=args.no_mirror != [],
        no_mirror=args.no_mirror or [],
        heldout=args.heldout,
        max_broken=args.max_broken,
        workers=args.workers,
    )
    sets = {name: open_images(config, name) for name in SPLITS if args.split in (name, None)}
    for images in sets.values():
        for name in config.no_mirror:
            if name not in images.classes:
                hint = nearest(name, images.classes)
                raise UserError(f"--no-mirror {name}: {args.data} has no such class: {hint}")
    return sets


def load_tokenizer(source: str, dtype: str, device: "torch.device") -> "VQGAN":
    """The tokenizer, its encoder in `dtype`; codes are compared in fp32 all the same."""
    import torch

    from maskgit.common import UserError
    from maskgit.common.device import pick_dtype
    from vqgan import VQGAN

    kind = pick_dtype(dtype, device)
    if kind == torch.float16:
        raise UserError("--dtype fp16: a tokenizer's activations overflow: take bf16 or fp32")
    tokenizer = VQGAN.from_pretrained(source).to(device)
    for part in (tokenizer.encoder, tokenizer.quant_conv):
        part.to(kind)
    return tokenizer
