"""`maskgit edit`: part of an image painted anew, or the image extended."""

import argparse
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskgit.commands import shared
from maskgit.common import UserError
from maskgit.common.progress import meter

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL.Image import Image

    from maskgit.pipeline import Pipeline

HELP = "paint part of an image anew, or extend it"
EXAMPLE = "maskgit edit photo.png --box 10,12,30,40 --class food-fruit --num 6 --out edit.png"

MOST_PIXELS = 50_000_000  # of an image that is opened or made
NUM = 4


def four(text: str) -> tuple[int, ...]:
    """An argparse type: four whole numbers with commas between them."""
    numbers = tuple(int(number) for number in text.split(","))
    if len(numbers) != 4 or min(numbers) < 0:
        raise ValueError
    return numbers


four.__name__ = "list of four whole numbers, each 0 or more"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="the image file")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--mask", type=Path, metavar="FILE", help="image of the same size, white: paint anew"
    )
    where.add_argument("--box", type=four, metavar="X,Y,W,H", help="rectangle to paint anew")
    where.add_argument(
        "--outpaint", type=four, metavar="L,T,R,B", help="pixels to add left, top, right, bottom"
    )
    shared.add_model_options(parser)
    parser.add_argument("--class", dest="label", help="name or number of what to paint (none)")
    parser.add_argument("--num", type=shared.at_least(1), default=NUM, help=f"variants ({NUM})")
    parser.add_argument("--seed", type=int, default=0, help="of the first variant; +1 for each (0)")
    parser.add_argument(
        "--dilate", type=shared.at_least(0), help="tokens around the mask that may change too (0)"
    )
    parser.add_argument(
        "--feather", type=shared.at_least(0), help="pixels over which the mask's inside fades (2)"
    )
    parser.add_argument(
        "--resize", action="store_true", help="fit the image into the model's size, and back"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("edit.png"), help="the sheet; variants beside (edit.png)"
    )
    shared.add_sampling_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check, edit, write, and print time, rate and, on the last line, the path of the sheet."""
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: the sheet is written as .png")
    paths = [args.out.with_name(f"{args.out.stem}_{i + 1}.png") for i in range(args.num)]
    for path in (args.out, *paths):
        shared.check_writable(path)
        if path.resolve() in (args.image.resolve(), args.mask and args.mask.resolve()):
            raise UserError(f"--out {args.out} would overwrite {path}: choose another name")
    pixels, mask = area(args, open_image(args.image))

    pipe = shared.load_pipeline(args)
    start = time.monotonic()
    variants = repaint(pipe, pixels, mask, args)
    seconds = time.monotonic() - start
    write(args, pixels, mask, variants, paths)
    shared.report(pipe, args.num, "variants", seconds)
    for path in (*paths, args.out):
        print(path)


def open_image(path: Path) -> "Image":
    """A picture, upright, as RGB or, where it has transparent parts, as RGBA.

    Raises UserError for a file that is missing, damaged, too large or no image.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture: Image.Image = Image.open(path)
            if picture.width * picture.height > MOST_PIXELS:
                raise UserError(f"{path} has {picture.width} x {picture.height} pixels: shrink it")
            picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits a pixel, or 32 of which 16 are used
            print(f"{path} has 16 bits a channel: reduced to 8")
            picture = Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
        see_through = "A" in picture.getbands() or "transparency" in picture.info
        return picture.convert("RGBA" if see_through else "RGB")
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that can be opened") from None
    except UserError:
        raise
    except Exception as error:  # on damaged bytes, decoders raise nearly anything
        raise UserError(f"{path} cannot be opened: {error}") from None


def area(args: argparse.Namespace, picture: "Image") -> "tuple[ndarray, ndarray]":
    """The pixels, uint8 (H, W, 3 or 4), and where to paint, bool (H, W)."""
    import numpy as np

    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    size = f"{args.image} is {width} x {height}"
    if args.outpaint:
        left, top, right, bottom = args.outpaint
        if not any(args.outpaint):
            raise UserError("--outpaint 0,0,0,0 adds nothing: give pixels on at least one side")
        if (left + width + right) * (top + height + bottom) > MOST_PIXELS:
            raise UserError(f"--outpaint makes more than {MOST_PIXELS} pixels: add fewer")
        margins = ((top, bottom), (left, right))
        mask = np.pad(np.zeros((height, width), bool), margins, constant_values=True)
        return np.pad(pixels, (*margins, (0, 0)), constant_values=255), mask
    mask = np.zeros((height, width), bool)
    if args.box:
        x, y, w, h = args.box
        if w == 0 or h == 0 or x + w > width or y + h > height:
            raise UserError(f"--box {x},{y},{w},{h} (x,y,w,h) is empty or not inside: {size}")
        mask[y : y + h, x : x + w] = True
        return pixels, mask
    marks = open_image(args.mask)
    if marks.size != picture.size:
        other = f"{marks.width} x {marks.height}"
        raise UserError(f"--mask {args.mask} is {other}, but {size}: they must be the same")
    grey = np.asarray(marks.convert("RGBA"), np.float32)
    mask = grey[..., :3].mean(-1) * grey[..., 3] > 127.5 * 255  # see-through is not marked
    if not mask.any():
        raise UserError(f"--mask {args.mask} marks nothing: paint white what is to change")
    return pixels, mask


def repaint(
    pipe: "Pipeline", pixels: "ndarray", mask: "ndarray", args: argparse.Namespace
) -> "list[ndarray]":
    """The variants, like `pixels`, which stay as they are outside the mask."""
    import numpy as np
    import torch

    from maskgit import editing
    from maskgit.pipeline import DILATE, FEATHER

    size, factor = pipe.image_size, pipe.vqgan.config.factor
    here = (slice(None), slice(None))
    if not args.resize:  # of a large image, compute only on what matters
        here = editing.surroundings(torch.from_numpy(mask), size, factor)
    hole = torch.from_numpy(mask[here])[None, None]
    colours = over_white(pixels[here]).transpose(2, 0, 1)
    image = torch.from_numpy(np.ascontiguousarray(colours)).float()[None] / 255

    turns = 1 if args.resize else len(editing.windows(hole, size, factor)[0])
    tell(pixels, size, turns, args.resize)
    options: dict[str, Any] = dict(
        dilate=DILATE if args.dilate is None else args.dilate,
        feather=FEATHER if args.feather is None else args.feather,
        resize=args.resize,
        **shared.sampling_settings(args),
    )
    with meter(turns * pipe.settings(shared.sampling_settings(args))["steps"], "editing") as step:
        painted = pipe.inpaint(
            image.expand(args.num, -1, -1, -1),
            hole,
            args.label,
            seed=args.seed,
            on_step=lambda *state: step(),
            **options,
        )
    variants = []
    for new in (painted * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        variant = pixels.copy()
        inside = variant[here]
        inside[..., :3][mask[here]] = new[mask[here]]
        inside[..., 3:][mask[here]] = 255
        variants.append(variant)
    return variants


def tell(pixels: "ndarray", size: tuple[int, int], turns: int, resized: bool) -> None:
    """Say how an image of another size than the model's is edited."""
    height, width = pixels.shape[:2]
    if (height, width) != size:
        how = "resized to fit, and back" if resized else f"edited in {turns} window(s) of that size"
        print(f"image {width} x {height}, model {size[1]} x {size[0]}: {how}")


def over_white(pixels: "ndarray") -> "ndarray":
    """RGB of what one sees: (H, W, 3 or 4) uint8 -> (H, W, 3) uint8."""
    import numpy as np
    from PIL import Image

    if pixels.shape[-1] == 3:
        return pixels
    picture = Image.fromarray(pixels)
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def write(
    args: argparse.Namespace,
    pixels: "ndarray",
    mask: "ndarray",
    variants: "list[ndarray]",
    paths: list[Path],
) -> None:
    """The variants as they are, and the sheet: input, mask, variants with their seeds."""
    import numpy as np
    from PIL import Image

    from maskgit.sheet import save_all, sheet

    shown = [Image.fromarray(over_white(image)) for image in (pixels, *variants)]
    groups = [("input", shown[:1]), ("mask", [Image.fromarray(mask * np.uint8(200))])]
    groups += [(f"{i + 1}: seed {args.seed + i}", [shown[i + 1]]) for i in range(args.num)]
    files = dict(zip(paths, map(Image.fromarray, variants), strict=True))
    save_all({**files, args.out: sheet(groups)})
