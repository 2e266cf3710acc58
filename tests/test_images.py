"""One image file of any kind -> upright RGB pixels of one size, or the reason why not."""

import io

import numpy as np
import pytest
from pictures import SIZE, encoded, picture
from PIL import Image

from maskgit.engine.images import BadImage, decode, fit


def test_all_kinds_of_files_give_the_same_colours():
    red = Image.new("RGB", (32, 24), (200, 40, 40))
    half = Image.new("RGBA", (32, 24), (200, 40, 40, 255))
    half.paste((0, 0, 0, 0), (16, 0, 32, 24))  # transparent black: shows white
    files = {
        "png": encoded(red),
        "jpeg": encoded(red, "JPEG", quality=95),
        "webp": encoded(red, "WEBP", lossless=True),
        "bmp": encoded(red, "BMP"),
        "palette": encoded(red.convert("P", palette=Image.Palette.ADAPTIVE)),
        "cmyk": encoded(red.convert("CMYK"), "JPEG", quality=95),
        "rgba": encoded(half),
        "transparent palette": encoded(half.quantize(4)),
        "gif": encoded(red, "GIF"),
    }
    for kind, content in files.items():
        pixels = decode(content, SIZE, 10**6)
        assert (pixels.shape, pixels.dtype) == ((24, 32, 3), np.uint8), kind
        assert np.abs(pixels[12, 8].astype(int) - (200, 40, 40)).max() <= 4, kind
        if kind in ("rgba", "transparent palette"):
            assert (pixels[12, 24] == 255).all(), kind


def test_grey_and_deep_images_keep_their_brightness():
    ramp = np.linspace(0, 65535, 32 * 24).reshape(24, 32)
    expected = np.rint(ramp / 257)[..., None]
    deep = Image.fromarray(ramp.astype(np.uint16))
    floats = Image.fromarray((ramp / 65535).astype(np.float32))
    for content in (encoded(deep), encoded(deep, "TIFF"), encoded(floats, "TIFF")):
        assert np.abs(decode(content, SIZE, 10**6) - expected).max() <= 1
    grey = Image.fromarray(expected[..., 0].astype(np.uint8))
    alpha = grey.convert("LA")
    alpha.putalpha(0)
    assert (decode(encoded(grey), SIZE, 10**6) == expected).all()
    assert (decode(encoded(alpha), SIZE, 10**6) == 255).all()
    assert set(np.unique(decode(encoded(grey.convert("1")), SIZE, 10**6))) == {0, 255}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(orientation):
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste("red", (0, 0, 10, 10))  # at the top left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encoded(stored, exif=exif), SIZE, 10**6)
    assert (pixels == np.asarray(upright)).all()


def test_unusable_bytes_say_why():
    good = encoded(picture(1, (200, 200)), "JPEG")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    png = encoded(Image.fromarray(noise))
    for content, reason in (
        (b"", "empty"),
        (b"no image at all", "cannot identify"),
        (good[: len(good) // 2], "truncated"),
        (png[: len(png) // 2], "truncated"),
        (png[:2000] + b"\0" * 100 + png[2100:], "."),
        (encoded(Image.new("1", (5000, 5000))), "oversized: 5000x5000"),
        (encoded(Image.new("1", (10000, 10000))), "oversized: 10000x10000"),
    ):
        with pytest.raises(BadImage, match=reason) as error:
            decode(content, SIZE, 10**6)
        assert str(error.value)
        assert "\n" not in str(error.value)


def test_a_large_jpeg_is_decoded_small_but_looks_the_same():
    ramp = np.tile(np.linspace(0, 255, 1600).astype(np.uint8), (1200, 1))
    content = encoded(Image.fromarray(ramp).convert("RGB"), "JPEG", quality=95)
    pixels = decode(content, SIZE, 10**7)
    assert 32 <= pixels.shape[0] < 400
    exact = fit(np.asarray(Image.open(io.BytesIO(content))), SIZE)
    assert np.abs(fit(pixels, SIZE).astype(int) - exact).max() <= 3


def test_fit_crops_the_middle_and_scales_once():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    assert (fit(wide, (10, 10)) >= 230).all()
    assert (fit(wide, (10, 10))[:, 1:-1] == 255).all()
    assert fit(wide, (10, 30)).shape == (10, 30, 3)
    assert fit(wide, (40, 20)).shape == (40, 20, 3)
    assert fit(wide, (20, 60)) is wide
    assert fit(np.zeros((1, 500, 3), np.uint8), (16, 16)).shape == (16, 16, 3)


def test_a_random_crop_stays_inside_and_varies():
    y, x = np.mgrid[:100, :100].astype(np.uint8)
    pixels = np.stack([y, x, x], 2)
    random = np.random.default_rng(0)
    crops = [fit(pixels, (50, 50), random).astype(int) for _ in range(50)]
    heights = [crop[-1, 0, 0] - crop[0, 0, 0] for crop in crops]
    assert 76 <= min(heights) < 84
    assert 92 < max(heights) <= 99
    assert len({crop.tobytes() for crop in crops}) == 50
