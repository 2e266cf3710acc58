"""What a picture of any kind is in RGB: once, for training data and for what is scored."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode in RGB, 8 bits a channel; what is transparent lies on white."""
    if image.mode.startswith("I") or image.mode == "F":  # 16-bit grey; floats in [0, 1]
        scale = 255.0 if image.mode == "F" else 255 / 65535
        grey = np.asarray(image, dtype=np.float64) * scale
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")
