"""From pictures and tensors to pixels, against open_clip."""

import math

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line
from pictures import drawings
from PIL import Image
from test_clip_silent import small

from clip import CLIPConfig, ImageConfig
from clip.preprocess import preprocess
from maskgit.common import UserError

OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


SIZES = [(32, 32), (64, 64), (101, 67), (67, 101), (40, 300), (24, 20)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"resize": "squash"}, {"resize_mode": "squash"}),
        ({"interpolation": "bilinear"}, {"interpolation": "bilinear"}),
    ],
)
def test_pixels_equal_open_clips(size, ours, theirs):
    config = CLIPConfig(image=ImageConfig(size=[32, 32], patch=8, width=32, heads=2), **ours)
    transform = open_clip.image_transform(32, is_train=False, **OPENAI, **theirs)
    images = drawings(size, 2)
    expected = torch.stack([transform(image) for image in images])
    assert (preprocess(images, config) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("size", [(64, 64), (101, 67), (512, 400)])
def test_tensors_and_pictures_agree(size):
    """Within 0.1 % of the range on average; without antialiasing it is over ten times that."""
    config = CLIPConfig(
        image=ImageConfig(size=[32, 32], patch=8, width=32, heads=2), mean=[0.0] * 3, std=[1.0] * 3
    )
    images = drawings(size, 4)
    tensor = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])
    by_picture, by_tensor = preprocess(images, config), preprocess(tensor, config)
    assert by_tensor.min() >= 0 and by_tensor.max() <= 1
    error = (by_picture - by_tensor).abs().mean()
    assert error <= 0.001
    if size == (512, 400):
        plain = F.interpolate(tensor, (32, 40), mode="bicubic")[..., 4:36]
        assert (by_picture - plain).abs().mean() > 10 * error


def test_preprocess_refuses_what_it_cannot_scale():
    model = small()
    for images, part in (
        (torch.zeros(1, 3, 4, 4), "too small"),
        (torch.zeros(3, 32, 32), "(B, 3, H, W)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
        ([], "no image"),
    ):
        with pytest.raises(UserError) as error:
            model.preprocess(images)
        one_line(error, part)


def test_what_preprocess_refuses():
    config = CLIPConfig(image=ImageConfig(size=[32, 32]))
    image = torch.rand(2, 3, 32, 40)
    for bad in (image * 255, image.masked_fill(image > 0.9, math.nan), image - 1):
        with pytest.raises(UserError) as error:
            preprocess(bad, config)
        one_line(error, "not in [0, 1]", "255")
    for bad in ([image[0]], Image.new("RGB", (40, 40)), "image.png", image.numpy()):
        with pytest.raises(UserError) as error:
            preprocess(bad, config)
        one_line(error, "list of PIL images")
    for bad in (image[0], (image * 255).byte(), image[:, :1]):
        with pytest.raises(UserError) as error:
            preprocess(bad, config)
        one_line(error, "floats (B, 3, H, W)")
    with pytest.raises(UserError) as error:
        preprocess([Image.new("RGB", (40, 7))], config)
    one_line(error, "40x7", "too small")
