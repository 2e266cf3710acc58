"""From the bytes of any image file to RGB pixels of one size."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from maskgit.common.images import to_rgb

# A random crop keeps at least this share of the sides of the largest box of the right aspect.
MIN_SCALE = 0.8


class BadImage(Exception):
    """No image, a damaged one, or one of too many pixels: the message says which."""


def decode(content: bytes, size: tuple[int, int], max_pixels: int) -> np.ndarray:
    """Any image that Pillow reads -> uint8 (H, W, 3): upright, on white, 8 bits a channel.

    `size` (height, width) is what it will be cropped and scaled to: a JPEG far larger than that is
    decoded at a fraction of its resolution, still at least twice `size`. `max_pixels` is compared
    with the header, before anything is decoded. Raises BadImage.
    """
    if not content:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's, about what is then reported or mended
            image = Image.open(io.BytesIO(content))
            if image.width * image.height > max_pixels:
                raise BadImage(f"oversized: {image.width}x{image.height} pixels")
            image.draft(None, (2 * max(size), 2 * max(size)))  # JPEG only
            image.load()
            return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    except BadImage:
        raise
    except Exception as error:  # on damaged bytes, decoders raise nearly anything
        reason = " ".join(str(error).split("<")[0].split()) or type(error).__name__
        raise BadImage(reason) from None


def fit(
    pixels: np.ndarray, size: tuple[int, int], draw: np.random.Generator | None = None
) -> np.ndarray:
    """Crop uint8 (H, W, 3) to the aspect of `size` (height, width) and scale it to that, once.

    The crop is the largest centred box; with a generator, a box at random of 0.8 to 1 times its
    sides. Pixels that have the size already are returned as they are.
    """
    height, width = pixels.shape[:2]
    scale = min(height / size[0], width / size[1])
    at_x = at_y = 0.5
    if draw is not None:
        shrink, at_x, at_y = draw.random(3)
        scale *= MIN_SCALE + (1 - MIN_SCALE) * shrink
    box_height, box_width = size[0] * scale, size[1] * scale
    x, y = at_x * (width - box_width), at_y * (height - box_height)
    if (box_height, box_width) == (height, width) == size:
        return pixels
    box = (max(x, 0), max(y, 0), min(x + box_width, width), min(y + box_height, height))
    scaled = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BICUBIC, box=box)
    return np.asarray(scaled)
