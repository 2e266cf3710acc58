"""A tiny CLIP with random weights, for the tests of what uses one."""

import torch

from clip import CLIP, CLIPConfig, ImageConfig, TextConfig


def tiny_clip(seed=0, **changes):
    """16 pixels, 24 features, 24 text positions; its features spread out, unlike a fresh one's."""
    image = ImageConfig(size=[16, 16], patch=8, width=32, depth=1, heads=2)
    text = TextConfig(merges=300, context=24, width=32, depth=1, heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(CLIPConfig(embed=24, image=image, text=text, **changes))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(2)
    return model.eval()


def save_clip(folder, seed=0, **changes):
    tiny_clip(seed, **changes).save_pretrained(folder)
    return folder
