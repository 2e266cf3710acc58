"""The geometry of editing: pixel masks to token masks, fills, feathered paste, windows, canvases.

Pure functions on tensors; none knows a model. A mask is bool (B, 1, H, W), True = paint anew. A
cell is the patch of `factor` x `factor` pixels that one token stands for.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit.common import UserError

# (views (b, 3, H, W), unknown pixels (b, 1, H, W), which images they are of, how many windows of
# these came before) -> the views with something in place of the unknown pixels
Paint = Callable[[Tensor, Tensor, list[int], int], Tensor]


def check(images: Tensor, masks: Tensor, dilate: int, feather: int) -> Tensor:
    """The masks as bool (B, 1, H, W) on the images' device; UserError for what does not fit."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(f"images must be floats (B, 3, H, W): got {tuple(images.shape)}")
    if not (images.min() >= 0 and images.max() <= 1):
        raise UserError("images must lie in [0, 1]: divide 8-bit ones by 255")
    b, _, h, w = images.shape
    if masks.shape not in ((b, 1, h, w), (1, 1, h, w)):
        raise UserError(f"masks must be ({b}, 1, {h}, {w}): got {tuple(masks.shape)}")
    if dilate < 0 or feather < 0:
        raise UserError(f"dilate and feather are 0 or more: got {dilate} and {feather}")
    if feather > max(h, w):
        raise UserError(f"feather is {feather} pixels, more than the image has: {w} x {h}")
    return (masks.to(images.device) > 0.5).expand(b, -1, -1, -1)


def token_mask(mask: Tensor, factor: int, dilate: int = 0) -> Tensor:
    """Which tokens to paint anew: bool (B, H/factor, W/factor).

    A token is one if any of its pixels is, or if such a token lies within `dilate` steps of it
    (diagonals count as one). H and W are multiples of `factor`.
    """
    cells = F.max_pool2d(mask.float(), factor)  # (B, 1, h, w)
    dilate = min(dilate, max(cells.shape[-2:]))  # more reaches no further
    if dilate:
        cells = F.max_pool2d(cells, 2 * dilate + 1, stride=1, padding=dilate)
    return cells[:, 0] > 0


def fill(image: Tensor, known: Tensor) -> Tensor:
    """Continue the known pixels smoothly into the others, from coarse to fine ("push-pull").

    Image (B, C, H, W), known bool (B, 1, H, W). Each unknown pixel becomes a mean of the known
    ones around it, the wider the farther they are (Gortler et al. 1996, The Lumigraph); 0
    where nothing at all is known. Known pixels stay as they are.

    An encoder looks beyond a token's own patch: with a 24 x 24 hole in 95 held-out emoji filled
    like this, an 8 x 8 tokenizer of emoji gave 47% of the tokens next to it another code than
    without a hole; filled with the mean, white or black, 62, 64 and 81%.
    """
    weight = known.float()
    image = image * weight
    if image.shape[-1] * image.shape[-2] == 1 or bool(known.all()):
        return image
    total = F.avg_pool2d(weight, 2, ceil_mode=True)  # (B, 1, H/2, W/2)
    mean = F.avg_pool2d(image, 2, ceil_mode=True) / total.clamp(min=1e-6)
    coarse = fill(mean, total > 0)
    smooth = F.interpolate(coarse, image.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(known, image, smooth)


def feathered(mask: Tensor, feather: int) -> Tensor:
    """Weight of the painting, (B, 1, H, W): 0 outside the mask, rising over its outermost
    `feather` pixels to 1. The image's own border is no edge of the mask."""
    outside = 1 - mask.float()
    weight = 1 - outside
    for _ in range(feather):
        outside = F.max_pool2d(outside, 3, stride=1, padding=1)
        weight = weight + (1 - outside)
    return weight / (1 + feather)


def paste(image: Tensor, painting: Tensor, mask: Tensor, feather: int) -> Tensor:
    """`painting` inside the mask, `image` outside it, bit for bit.

    A tokenizer does not reproduce pixels exactly, so colours would jump at the edge of the mask.
    What the painting misses by outside is therefore continued inwards and added to its outermost
    `feather` pixels, fading: detail stays sharp, and the mask's old content plays no part.
    """
    missed = fill(image - painting, ~mask)
    inside = painting + (1 - feathered(mask, feather)) * missed
    return torch.where(mask, inside.clamp(0, 1), image)


class Canvas(NamedTuple):
    """An image laid on whole cells, at least as large as the model's window."""

    image: Tensor  # (B, 3, H, W)
    mask: Tensor  # what to paint, bool (B, 1, H, W)
    free: Tensor  # cells without a pixel of the image, bool (1, 1, H, W)
    place: tuple[slice, slice]  # where the image lies on it: rows, columns


def lay(image: Tensor, mask: Tensor, window: tuple[int, int], factor: int) -> Canvas:
    """Put an image of any size on a canvas of whole cells; `window` is the model's (H, W).

    Sides that do not fill a cell go on as their last pixels do, mask included. An image smaller
    than the window lies in its middle; the cells around it are free for the model to imagine.
    """
    before, after, place = [], [], []
    for side, least in zip(image.shape[-2:], window, strict=True):
        whole = max(-(-side // factor) * factor, least)
        start = (whole - side) // 2 // factor * factor
        before.append(start)
        after.append(whole - side - start)
        place.append(slice(start, start + side))
    pad = (before[1], after[1], before[0], after[0])
    inside = F.pad(torch.ones_like(image[:1, :1]), pad)
    cells = F.max_pool2d(inside, factor)
    free = F.interpolate(cells, scale_factor=float(factor), mode="nearest") == 0
    mask = F.pad(mask.float(), pad, mode="replicate") > 0
    return Canvas(F.pad(image, pad, mode="replicate"), mask & ~free, free, (place[0], place[1]))


def extend(images: Tensor, left: int, right: int, top: int, bottom: int) -> tuple[Tensor, Tensor]:
    """The images with empty (white) margins, and the mask (B, 1, H, W) of these margins."""
    pad = (left, right, top, bottom)
    if min(pad) < 0:
        raise UserError("outpainting adds pixels: left, right, top and bottom are 0 or more")
    mask = F.pad(torch.zeros_like(images[:, :1], dtype=torch.bool), pad, value=True)
    return F.pad(images, pad, value=1), mask


def window_seed(seed: int, index: int) -> int:
    """The seed of the index-th window of an image: its own for the first, far from all the seeds
    in use for the others."""
    return (seed + index * 0x9E3779B97F4A7C15) % 2**63


def surroundings(mask: Tensor, size: tuple[int, int], factor: int) -> tuple[slice, slice]:
    """Rows and columns of the part of an image that decides how its mask (H, W) is filled.

    It reaches a window, `size` (H, W), beyond the mask, and begins at a whole cell: edited alone,
    it becomes what it becomes in the whole image.
    """
    place = []
    for axis, reach in enumerate(size):
        set_at = mask.any(1 - axis).nonzero()
        first, last = int(set_at.min()) - reach, int(set_at.max()) + reach
        place.append(slice(max(0, first // factor * factor), last + 1))
    return place[0], place[1]


def paint_in_windows(
    paint: Paint, images: Tensor, masks: Tensor, size: tuple[int, int], factor: int, feather: int
) -> Tensor:
    """Fill the masks of images of any size, window by window; `size` (H, W) is the window's.

    Those after see what those before have painted. The next windows of all images are one batch.
    """
    image, mask, free, place = lay(images, masks, size, factor)
    image = image.clone()  # never the caller's own
    plans = windows(masks, size, factor)
    for turn in range(max(map(len, plans), default=0)):
        rows = [i for i, plan in enumerate(plans) if turn < len(plan)]
        corners = [plans[i][turn] for i in rows]
        views = [(slice(y, y + size[0]), slice(x, x + size[1])) for y, x in corners]
        old = torch.stack([image[i, :, y, x] for i, (y, x) in zip(rows, views, strict=True)])
        hole = torch.stack([mask[i, :, y, x] for i, (y, x) in zip(rows, views, strict=True)])
        unknown = hole | torch.stack([free[0, :, y, x] for y, x in views])
        new = paste(old, paint(old, unknown, rows, turn), hole, feather)  # (b, 3, H, W)
        for i, (y, x), picture in zip(rows, views, new, strict=True):
            image[i, :, y, x] = picture
            mask[i, :, y, x] = False
    return image[:, :, place[0], place[1]]


def paint_in_one(
    paint: Paint, images: Tensor, masks: Tensor, size: tuple[int, int], factor: int, feather: int
) -> Tensor:
    """Fill the masks of images shrunk, or enlarged, to fit one window of `size` (H, W)."""
    sides = images.shape[-2:]
    scale = min(ours / theirs for ours, theirs in zip(size, sides, strict=True))
    fitted = [max(1, min(s, round(scale * side))) for s, side in zip(size, sides, strict=True)]
    shown = fill(images, ~masks)  # lest shrinking spread what the mask hides
    small = F.interpolate(shown, fitted, mode="bicubic", antialias=True).clamp(0, 1)
    hole = F.adaptive_max_pool2d(masks.float(), fitted) > 0
    small = paint_in_windows(paint, small, hole, size, factor, feather)
    painting = F.interpolate(small, sides, mode="bicubic", antialias=True).clamp(0, 1)
    return paste(images, painting, masks, feather)


def windows(masks: Tensor, size: tuple[int, int], factor: int) -> list[list[tuple[int, int]]]:
    """For each mask, the corners (top, left), in pixels of its canvas, of the windows to paint."""
    canvas = lay(masks.float(), masks, size, factor)
    cells = token_mask(canvas.mask, factor).cpu()
    window = size[0] // factor, size[1] // factor
    return [[(factor * y, factor * x) for y, x in plan_windows(image, window)] for image in cells]


def plan_windows(cells: Tensor, window: tuple[int, int]) -> list[tuple[int, int]]:
    """Windows (top, left), in cells, that paint all of `cells` (h, w) one after the other.

    Each next window is the one of all places in which the share left to paint comes nearest to
    half: less would waste a window, more would leave it too little to go by. Cells that it paints
    are known to those after it, so that they overlap. Of equals, the one with the paint nearest to
    its middle comes first, then the upper, then the left one.
    """
    left_over = cells.double()
    half = window[0] * window[1] / 2
    tents = [1 + torch.minimum(torch.arange(n), torch.arange(n).flip(0)).double() for n in window]
    windows: list[tuple[int, int]] = []
    while left_over.any():
        paint = _over_windows(left_over, torch.ones(window[0]), torch.ones(window[1]))
        middle = _over_windows(left_over, tents[0], tents[1])
        score = -(paint - half).abs() + middle / (1 + middle.max())  # counts first, then the middle
        score[paint == 0] = -torch.inf
        top, left = divmod(int(score.argmax()), score.shape[1])
        left_over[top : top + window[0], left : left + window[1]] = 0
        windows.append((top, left))
    return windows


def _over_windows(cells: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """For each place of a window, the sum of its cells weighted by `rows` x `columns`."""
    sums = F.conv2d(cells[None, None], rows.to(cells)[None, None, :, None])
    return F.conv2d(sums, columns.to(cells)[None, None, None, :])[0, 0]
