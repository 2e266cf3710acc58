"""Small pictures and folders of them, for the tests of the data sets."""

import io

import numpy as np
from conftest import pictures
from PIL import Image

from maskgit.engine.data import DataConfig

SIZE = (16, 16)


def picture(number, size=(20, 20)):
    """A picture that differs with its number and is not its own mirror image."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = (number * 37 % 256, number * 91 % 256, 200)
    pixels[: size[1] // 2, -1] = 255
    return Image.fromarray(pixels)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def make_folder(root, classes, each):
    for group in classes:
        (root / group).mkdir(parents=True)
        for i in range(each):
            picture(i + 100 * len(group)).save(root / group / f"{i:03}.png")
    return root


def config(path, **options):
    return DataConfig(path=str(path), size=list(SIZE), **options)


def drawings(size, count):
    """Bundled drawings with noise on them, at `size` (width, height)."""
    noise = np.random.default_rng(0)
    images = []
    for _, content in pictures(count):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        image = image.resize(size, Image.Resampling.BICUBIC)
        grain = noise.normal(0, 12, (size[1], size[0], 3))
        images.append(Image.fromarray(np.uint8(np.clip(np.asarray(image) + grain, 0, 255))))
    return images
