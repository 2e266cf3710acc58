"""`maskgit evaluate tokenizer`: how well it reconstructs."""

import argparse
from pathlib import Path

from maskgit.commands import shared
from maskgit.commands.evaluate import options

HELP = "measure a tokenizer's reconstructions"
EXAMPLE = (
    "maskgit evaluate tokenizer --vqgan emoji --data emoji:heldout --extractor emoji "
    "--out tokenizer"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vqgan", required=True, help="folder, bundled name or hub id")
    parser.add_argument("--data", required=True, metavar="REF", help="images, as --reference has")
    parser.add_argument(
        "--size", type=shared.at_least(16), help="crop and resize to this side (as they are)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    options.add_extractor_options(parser)
    parser.add_argument(
        "--vgg", type=Path, help="VGG-16 weights for LPIPS (else where training looks for them)"
    )
    options.add_out_option(parser, "a sheet and metrics.json")


def run(args: argparse.Namespace) -> None:
    """Reconstruct, score, draw the worst, and print the path."""
    from maskgit.common import UserError
    from maskgit.common.device import pick_device
    from maskgit.common.folder import file_hash, find
    from maskgit.evaluation import report
    from maskgit.evaluation.score import describe_extractor, describe_set
    from maskgit.evaluation.sets import open_pixels
    from maskgit.evaluation.sheets import reconstruction_sheet
    from maskgit.evaluation.tokenizer import reconstruct
    from maskgit.sheet import save_all
    from vqgan import VQGAN
    from vqgan.losses import perceptual
    from vqgan.task import VQGANLossConfig

    device, extractor = pick_device(args.device), options.extractor_of(args)
    vgg = Path(args.vgg or VQGANLossConfig().vgg).expanduser()
    lpips = perceptual(vgg) if args.vgg or vgg.is_file() else None
    images = open_pixels(args.data, (args.size, args.size) if args.size else None)
    vqgan = VQGAN.from_pretrained(args.vqgan).to(device)
    factor = vqgan.config.factor
    if any(side % factor for side in images.size):
        raise UserError(f"images of {images.size} for tokens of {factor} pixels: give --size")
    options.say("data", f"{images.name}: {len(images):,} images, sha256 {images.hash}")
    left = {} if lpips else {"LPIPS": f"no VGG-16 weights at {vgg}"}
    if len(images) <= extractor.dim:
        left["rFID"] = f"needs {extractor.dim + 1:,} images, and there are {len(images):,}"
    metrics, worst = reconstruct(
        vqgan, images, device, None if "rFID" in left else extractor, lpips
    )
    folder = find(args.vqgan)
    folder = folder / "vqgan" if (folder / "vqgan").is_dir() else folder
    weights = file_hash(folder / "model.safetensors")
    result = {
        "command": "tokenizer",
        "metrics": metrics,
        "left_out": left,
        "model": {"source": args.vqgan, "sha256": {"vqgan": weights}},
        "images": describe_set(images),
        "reference": describe_set(images),
        "extractor": describe_extractor(extractor),
        "device": str(device),
        "dtype": "fp32",
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_all({args.out / "reconstructions.png": reconstruction_sheet(worst)})
    report.print_result(report.finish(args.out, result))
    print(args.out / "metrics.json")
