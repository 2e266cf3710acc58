"""`maskgit import`: published weights -> a model folder that everything here works with."""

import argparse

from maskgit.commands.shared import at_least

HELP = "turn published weights into a model folder"
EXAMPLE = (
    "maskgit import tokenizer_imagenet256_checkpoint maskgit_imagenet256_checkpoint maskgit256"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="a tokenizer, a transformer, a CLIP (FILE@RECIPE where its recipe is open), in "
        "safetensors, torch's or flax's formats; what it is follows from the tensors in it",
    )
    parser.add_argument("dest", metavar="DEST", help="the folder to write, new or empty")
    parser.add_argument(
        "--heads", type=at_least(1), help="of a Halton-MaskGIT of no published size"
    )


def run(args: argparse.Namespace) -> None:
    """Read the files, and write the folder as a whole or not at all."""
    from maskgit.importing import import_files

    import_files(args.files, args.dest, args.heads)
