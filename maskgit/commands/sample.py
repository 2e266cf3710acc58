"""`maskgit sample`: images of classes."""

import argparse
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit.commands import shared
from maskgit.common import UserError
from maskgit.common.folder import write_json
from maskgit.common.progress import meter

if TYPE_CHECKING:
    from PIL.Image import Image

    from maskgit.evaluation.clip_model import ClipModel
    from maskgit.pipeline import Pipeline
    from maskgit.trace import Step

HELP = "make images of classes"
EXAMPLE = "maskgit sample --class cat-face --num 8 --out cats.png"

NUM = 4  # images of a class
FIRST = 8  # classes shown by a model that names none to show
TRACED = 8  # images in a trace
CANDIDATES = 8
NOT_WRITTEN = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_options(parser)
    parser.add_argument(
        "--class",
        dest="classes",
        nargs="+",
        action="extend",
        metavar="CLASS",
        help="names or numbers, with commas or spaces between them; or all (a varied choice)",
    )
    parser.add_argument(
        "--num", type=shared.at_least(1), default=NUM, help=f"images of each ({NUM})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image; +1 for each (0)")
    parser.add_argument("--batch-size", type=shared.at_least(1), default=64, help="at once (64)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        help="a .png for a labelled sheet, or a folder for PNGs and metadata.json (samples.png)",
    )
    parser.add_argument(
        "--trace", action="store_true", help=f"also show each step of the first {TRACED} images"
    )
    parser.add_argument(
        "--rerank",
        metavar="CLIP",
        help="keep the best of several by this CLIP: clip (the bundled one), a folder or a file",
    )
    parser.add_argument(
        "--candidates",
        type=shared.at_least(2),
        metavar="N",
        help=f"with --rerank, images drawn for each that is kept ({CANDIDATES})",
    )
    shared.add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check, sample, write, and print time, rate and, on the last line, the path."""
    from maskgit.metadata import to_png

    as_sheet = args.out.suffix.lower() == ".png"
    check_output(args.out, as_sheet)
    check_rerank(args)
    pipe = shared.load_pipeline(args)
    ids = [i for i in chosen_classes(pipe, args.classes) for _ in range(args.num)]
    settings = pipe.settings(shared.sampling_settings(args))
    records, clip = describe(pipe, ids, args, settings), load_clip(args, pipe)
    steps: list[Step] = []
    start = time.monotonic()
    if clip:
        pictures = draw_best(pipe, clip, ids, args, records)
    else:
        pictures = draw(pipe, ids, args, settings["steps"], steps)
    files: dict[Path, Image | bytes] = {}
    if as_sheet:
        sheet = labelled_sheet(pipe, ids, list(pictures), args, settings)
        files = {args.out: to_png(sheet, in_common(records))}
    else:
        write_folder(args.out, pictures, records)
    seconds = time.monotonic() - start
    if args.trace:
        files |= trace_files(args.out, steps, pipe)
    if files:
        from maskgit.sheet import save_all

        save_all(files)
    shared.report(pipe, len(ids), "images", seconds)
    for path in files:
        if path != args.out:
            print(path)
    print(args.out)


def check_output(out: Path, as_sheet: bool) -> None:
    """Raise UserError for an output that cannot be written, before the work is done."""
    if out.suffix.lower() in NOT_WRITTEN:
        raise UserError(f"--out {out}: images are written as .png, or as PNGs into a folder")
    if as_sheet or not out.is_dir():
        shared.check_writable(out)
    elif any(out.iterdir()):
        raise UserError(f"--out {out}: the folder is not empty: name another, or empty it")
    else:
        shared.check_writable(out / "metadata.json")
    if not as_sheet and out.is_file():
        raise UserError(f"--out {out} is a file: name a .png for a sheet, or another folder")


def check_rerank(args: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together; fill in those that follow."""
    if args.candidates and not args.rerank:
        raise UserError("--candidates are for --rerank: give that too, such as --rerank clip")
    if args.rerank and args.trace:
        raise UserError("--trace shows images as they are drawn, --rerank keeps a few: take one")
    args.candidates = args.candidates or CANDIDATES


def chosen_classes(pipe: "Pipeline", classes: list[str] | None) -> list[int | None]:
    """The class numbers that the option asks for; without it, some that show what there is."""
    if not pipe.labels and classes in (None, ["all"]):
        return [None]
    if not classes:
        return pipe.showcase or list(range(min(FIRST, len(pipe.labels))))
    names = []
    for text in classes:  # a name may have a comma of its own
        names += [text] if text in pipe.labels else [t.strip() for t in text.split(",")]
    if names == ["all"]:
        return list(range(len(pipe.labels)))
    if not any(names):
        raise UserError("--class names no class: leave the option out for a varied choice")
    return pipe.label_ids([name for name in names if name])


def draw(
    pipe: "Pipeline",
    ids: list[int | None],
    args: argparse.Namespace,
    steps: int,
    traced: "list[Step]",
) -> "Iterator[Image]":
    """The pictures one after the other. Puts the steps of the first ones into `traced`."""
    from maskgit.sheet import to_pictures
    from maskgit.trace import Step

    starts = range(0, len(ids), args.batch_size)
    with meter(len(starts) * steps, "sampling", "steps") as advance:

        def on_step(step: int, *state: Any) -> None:
            if len(traced) < steps:
                traced.append(Step(step, *(tensor[:TRACED] for tensor in state)))
            advance()

        for start in starts:
            images = pipe.sample(
                ids[start : start + args.batch_size],
                seed=args.seed + start,
                batch_size=args.batch_size,
                on_step=on_step,
                **shared.sampling_settings(args),
            )
            yield from to_pictures(images)


def load_clip(args: argparse.Namespace, pipe: "Pipeline") -> "ClipModel | None":
    """The CLIP of --rerank."""
    if not args.rerank:
        return None
    from maskgit.evaluation.clip_model import open_clip_model

    return open_clip_model("emoji" if args.rerank == "clip" else args.rerank, pipe.device)


def draw_best(
    pipe: "Pipeline",
    clip: "ClipModel",
    ids: list[int | None],
    args: argparse.Namespace,
    records: list[dict[str, Any]],
) -> "Iterator[Image]":
    """The best candidates one after the other, whose seeds and choice are put into `records`."""
    from maskgit.rerank import rerank
    from maskgit.sheet import to_pictures

    options = dict(seed=args.seed, batch_size=args.batch_size, **shared.sampling_settings(args))
    with meter(len(ids), f"sampling the best of {args.candidates}", "images") as advance:
        best = rerank(pipe, clip, ids, args.candidates, **options)
        for kept, record in zip(best, records, strict=True):
            record |= {"seed": kept.seed, "rerank": kept.record(clip, args.candidates)}
            yield from to_pictures(kept.image[None])
            advance()


def name_of(pipe: "Pipeline", label: int | None) -> str:
    return "image" if label is None else pipe.labels[label]


def labelled_sheet(
    pipe: "Pipeline",
    ids: list[int | None],
    pictures: "list[Image]",
    args: argparse.Namespace,
    settings: dict[str, Any],
) -> "Image":
    """A sheet with the images of each class under its name."""
    from maskgit.sheet import sheet

    groups = [
        (name_of(pipe, ids[i]), pictures[i : i + args.num]) for i in range(0, len(ids), args.num)
    ]
    how = f"{settings['steps']} steps, guidance {settings['guidance']:g}, seed {args.seed}"
    how += f", the best of {args.candidates} by CLIP" if args.rerank else ""
    return sheet(groups, f"{Path(args.model).name}: {how}")


def describe(
    pipe: "Pipeline", ids: list[int | None], args: argparse.Namespace, settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """For each image: its file, class, seed, and what it takes to make it again."""
    model = {"source": args.model, "sha256": shared.model_hashes(args.model)}
    records = []
    for i, label in enumerate(ids):
        slug = re.sub(r"[^\w.-]+", "-", name_of(pipe, label))
        records.append(
            {
                "file": f"{i:06}_{slug}.png",
                "class": None if label is None else pipe.labels[label],
                "label": label,
                "seed": args.seed + i,
                "settings": {**settings, **shared.computed_on(pipe)},
                "model": model,
            }
        )
    return records


def in_common(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The records of a sheet's images, what is the same for all of them once."""
    common = {name: records[0][name] for name in ("settings", "model")}
    own = [{k: v for k, v in record.items() if k not in ("file", *common)} for record in records]
    return {**common, "images": own}


def write_folder(folder: Path, pictures: "Iterable[Image]", records: list[dict[str, Any]]) -> None:
    """Write the images and metadata.json: into a neighbour first, which then takes the name. Each
    record is written into its image as well."""
    from maskgit.metadata import to_png

    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".maskgit-", dir=folder.parent))
    try:
        for picture, record in zip(pictures, records, strict=True):
            (scratch / record["file"]).write_bytes(to_png(picture, record))
        write_json(scratch / "metadata.json", {"format_version": 1, "images": records})
        scratch.chmod(0o755)  # mkdtemp's are for their owner alone
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def trace_files(out: Path, steps: "list[Step]", pipe: "Pipeline") -> "dict[Path, Image | bytes]":
    """The steps as a strip and as an animation, to be written beside `out`."""
    from maskgit.trace import save_gif, strip

    with tempfile.TemporaryDirectory() as scratch:
        gif = Path(scratch, "trace.gif")
        save_gif(gif, steps, pipe.render)
        stem = out.stem if out.suffix.lower() == ".png" else out.name
        return {
            out.with_name(f"{stem}_trace.png"): strip(steps, pipe.render),
            out.with_name(f"{stem}_trace.gif"): gif.read_bytes(),
        }
