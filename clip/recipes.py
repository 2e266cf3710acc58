"""What the usual published CLIPs were trained as: what their files do not say.

Facts from the tables of OpenCLIP (open_clip_torch 3.3:
`pretrained.py`, `model_configs/`) and timm. A recipe is called MODEL/TRAINING, as OpenCLIP's two
names for it.
"""

import re
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from clip.config import CLIPConfig, ImageConfig, TextConfig
from maskgit.common import pick

# Embedding; image: size, patch, width, depth, heads, hidden; text: width, depth, heads.
# The heads are those that no shape tells: H, g and bigG have 80, 88 and 104 channels each.
VITS: dict[str, tuple[Any, ...]] = {
    "ViT-B-32": (512, 224, 32, 768, 12, 12, None, 512, 12, 8),
    "ViT-B-32-256": (512, 256, 32, 768, 12, 12, None, 512, 12, 8),
    "ViT-B-16": (512, 224, 16, 768, 12, 12, None, 512, 12, 8),
    "ViT-B-16-plus-240": (640, 240, 16, 896, 12, 14, None, 640, 12, 10),
    "ViT-L-14": (768, 224, 14, 1024, 24, 16, None, 768, 12, 12),
    "ViT-L-14-336": (768, 336, 14, 1024, 24, 16, None, 768, 12, 12),
    "ViT-H-14": (1024, 224, 14, 1280, 32, 16, None, 1024, 24, 16),
    "ViT-H-14-378": (1024, 378, 14, 1280, 32, 16, None, 1024, 24, 16),
    "ViT-g-14": (1024, 224, 14, 1408, 40, 16, 6144, 1024, 24, 16),
    "ViT-bigG-14": (1280, 224, 14, 1664, 48, 16, 8192, 1280, 32, 20),
}
VITS["ViT-L-14-CLIPA"], VITS["ViT-L-14-CLIPA-336"] = VITS["ViT-L-14"], VITS["ViT-L-14-336"]
VITS["ViT-H-14-CLIPA"], VITS["ViT-bigG-14-CLIPA"] = VITS["ViT-H-14"], VITS["ViT-bigG-14"]
VITS["ViT-H-14-CLIPA-336"] = (1024, 336, *VITS["ViT-H-14"][2:])
VITS["ViT-bigG-14-CLIPA-336"] = (1280, 336, *VITS["ViT-bigG-14"][2:])

RESNETS: dict[
    str, tuple[Any, ...]
] = {  # embedding; image: size, width, blocks; text: width (heads have 64 channels)
    "RN50": (1024, 224, 64, [3, 4, 6, 3], 512),
    "RN101": (512, 224, 64, [3, 4, 23, 3], 512),
    "RN50x4": (640, 288, 80, [4, 6, 10, 6], 640),
    "RN50x16": (768, 384, 96, [6, 8, 18, 8], 768),
    "RN50x64": (1024, 448, 128, [3, 15, 36, 10], 1024),
}
CONVNEXTS: dict[
    str, tuple[Any, ...]
] = {  # embedding; image: size, timm's name, projection; text: depth (64 channels)
    "convnext_base": (512, 224, "convnext_base", "linear", 12),
    "convnext_base_w": (640, 256, "convnext_base", "linear", 12),
    "convnext_base_w_320": (640, 320, "convnext_base", "linear", 12),
    "convnext_large_d": (768, 256, "convnext_large", "mlp", 16),
    "convnext_large_d_320": (768, 320, "convnext_large", "mlp", 16),
    "convnext_xxlarge": (1024, 256, "convnext_xxlarge", "linear", 24),
}
SIGLIPS: dict[str, tuple[Any, ...]] = {  # image: width, depth, heads, hidden; text: the same
    "B": (768, 12, 12, None, 768, 12, 12, None),
    "L": (1024, 24, 16, None, 1024, 24, 16, None),
    "SO400M": (1152, 27, 16, 4304, 1152, 27, 16, 4304),
    "gopt": (1536, 40, 16, None, 1152, 27, 16, 4304),
}
# timm gives these towers GELU's approximation by tanh, the other SigLIP towers the exact one.
TANH = ("vit_base_patch32", "vit_large_patch16_siglip_512", "vit_so400m_patch16", "vit_giantopt")
TIMM_SIGLIPS = {"base": "B", "large": "L", "so400m": "SO400M", "giantopt": "gopt"}

FLAGS: dict[str, dict[str, Any]] = {
    "-": {},
    "quick": {},  # QuickGELU in both towers
    "half": {"mean": [0.5] * 3, "std": [0.5] * 3},
    "squash": {"resize": "squash"},
    "clipa": {  # ImageNet's
        **{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        **{"resize": "squash", "interpolation": "bilinear"},
    },
}
# MODEL/TRAINING, flags joined by "+", and where it is published: a hub id, or the file's name with
# the beginning of its SHA-256 (OpenAI and OpenCLIP publish that; of Meta's files it is not known).
TABLE = """
RN50/openai quick RN50.pt afeb0e10f9e5a86d
RN50/yfcc15m quick rn50-quickgelu-yfcc15m-455df137.pt 455df137
RN50/cc12m quick rn50-quickgelu-cc12m-f000538c.pt f000538c
RN101/openai quick RN101.pt 8fa8567bab74a42d
RN101/yfcc15m quick rn101-quickgelu-yfcc15m-3e04b30e.pt 3e04b30e
RN50x4/openai quick RN50x4.pt 7e526bd135e493ce
RN50x16/openai quick RN50x16.pt 52378b407f34354e
RN50x64/openai quick RN50x64.pt be1cfb55d75a9666
ViT-B-32/openai quick ViT-B-32.pt 40d365715913c9da
ViT-B-32/laion400m_e31 quick vit_b_32-quickgelu-laion400m_e31-d867053b.pt d867053b
ViT-B-32/laion400m_e32 quick vit_b_32-quickgelu-laion400m_e32-46683a32.pt 46683a32
ViT-B-32/laion2b_e16 - vit_b_32-laion2b_e16-af8dbd0c.pth af8dbd0c
ViT-B-32/laion2b_s34b_b79k - laion/CLIP-ViT-B-32-laion2B-s34B-b79K
ViT-B-32/datacomp_xl_s13b_b90k - laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K
ViT-B-32/datacomp_m_s128m_b4k - laion/CLIP-ViT-B-32-DataComp.M-s128M-b4K
ViT-B-32/datacomp_s_s13m_b4k - laion/CLIP-ViT-B-32-DataComp.S-s13M-b4K
ViT-B-32/metaclip_400m quick b32_400m.pt
ViT-B-32/metaclip_fullcc quick b32_fullcc2.5b.pt
ViT-B-32-256/datacomp_s34b_b86k - laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K
ViT-B-16/openai quick ViT-B-16.pt 5806e77cd80f8b59
ViT-B-16/laion400m_e31 - vit_b_16-laion400m_e31-00efa78f.pt 00efa78f
ViT-B-16/laion400m_e32 - vit_b_16-laion400m_e32-55e67d44.pt 55e67d44
ViT-B-16/laion2b_s34b_b88k - laion/CLIP-ViT-B-16-laion2B-s34B-b88K
ViT-B-16/datacomp_xl_s13b_b90k - laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K
ViT-B-16/datacomp_l_s1b_b8k - laion/CLIP-ViT-B-16-DataComp.L-s1B-b8K
ViT-B-16/dfn2b quick apple/DFN2B-CLIP-ViT-B-16
ViT-B-16/metaclip_400m quick b16_400m.pt
ViT-B-16/metaclip_fullcc quick b16_fullcc2.5b.pt
ViT-B-16-plus-240/laion400m_e31 - vit_b_16_plus_240-laion400m_e31-8fb26589.pt 8fb26589
ViT-B-16-plus-240/laion400m_e32 - vit_b_16_plus_240-laion400m_e32-699c4b84.pt 699c4b84
ViT-L-14/openai quick ViT-L-14.pt b8cca3fd41ae0c99
ViT-L-14/laion400m_e31 - vit_l_14-laion400m_e31-69988bb6.pt 69988bb6
ViT-L-14/laion400m_e32 - vit_l_14-laion400m_e32-3d133497.pt 3d133497
ViT-L-14/laion2b_s32b_b82k half laion/CLIP-ViT-L-14-laion2B-s32B-b82K
ViT-L-14/datacomp_xl_s13b_b90k - laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K
ViT-L-14/dfn2b quick apple/DFN2B-CLIP-ViT-L-14
ViT-L-14/dfn2b_s39b - apple/DFN2B-CLIP-ViT-L-14-39B
ViT-L-14/metaclip_400m quick l14_400m.pt
ViT-L-14/metaclip_fullcc quick l14_fullcc2.5b.pt
ViT-L-14-336/openai quick ViT-L-14-336px.pt 3035c92b35095992
ViT-H-14/laion2b_s32b_b79k - laion/CLIP-ViT-H-14-laion2B-s32B-b79K
ViT-H-14/metaclip_fullcc quick h14_fullcc2.5b.pt
ViT-H-14/metaclip_altogether - h14_v1.2_altogether.pt
ViT-H-14/dfn5b quick+squash apple/DFN5B-CLIP-ViT-H-14
ViT-H-14-378/dfn5b quick+squash apple/DFN5B-CLIP-ViT-H-14-378
ViT-g-14/laion2b_s12b_b42k - laion/CLIP-ViT-g-14-laion2B-s12B-b42K
ViT-g-14/laion2b_s34b_b88k - laion/CLIP-ViT-g-14-laion2B-s34B-b88K
ViT-bigG-14/laion2b_s39b_b160k - laion/CLIP-ViT-bigG-14-laion2B-39B-b160k
ViT-bigG-14/metaclip_fullcc quick G14_fullcc2.5b.pt
ViT-L-14-CLIPA/datacomp1b clipa UCSC-VLAA/ViT-L-14-CLIPA-datacomp1B
ViT-L-14-CLIPA-336/datacomp1b clipa UCSC-VLAA/ViT-L-14-CLIPA-336-datacomp1B
ViT-H-14-CLIPA/datacomp1b clipa UCSC-VLAA/ViT-H-14-CLIPA-datacomp1B
ViT-H-14-CLIPA-336/laion2b clipa UCSC-VLAA/ViT-H-14-CLIPA-336-laion2B
ViT-H-14-CLIPA-336/datacomp1b clipa UCSC-VLAA/ViT-H-14-CLIPA-336-datacomp1B
ViT-bigG-14-CLIPA/datacomp1b clipa UCSC-VLAA/ViT-bigG-14-CLIPA-datacomp1B
ViT-bigG-14-CLIPA-336/datacomp1b clipa UCSC-VLAA/ViT-bigG-14-CLIPA-336-datacomp1B
convnext_base/laion400m_s13b_b51k - laion/CLIP-convnext_base-laion400M-s13B-b51K
convnext_base_w/laion2b_s13b_b82k - laion/CLIP-convnext_base_w-laion2B-s13B-b82K
convnext_base_w/laion2b_s13b_b82k_augreg - laion/CLIP-convnext_base_w-laion2B-s13B-b82K-augreg
convnext_base_w/laion_aesthetic_s13b_b82k - laion/CLIP-convnext_base_w-laion_aesthetic-s13B-b82K
convnext_large_d/laion2b_s26b_b102k_augreg - laion/CLIP-convnext_large_d.laion2B-s26B-b102K-augreg
convnext_large_d_320/laion2b_s29b_b131k_ft - laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft
convnext_xxlarge/laion2b_s34b_b82k_augreg - laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg
"""
# All of SigLIP's are trained on WebLI and published as timm/MODEL.
SIGLIP_NAMES = """
ViT-B-16-SigLIP ViT-B-16-SigLIP-256 ViT-B-16-SigLIP-384 ViT-B-16-SigLIP-512
ViT-B-16-SigLIP-i18n-256 ViT-L-16-SigLIP-256 ViT-L-16-SigLIP-384 ViT-SO400M-14-SigLIP
ViT-SO400M-14-SigLIP-384 ViT-B-32-SigLIP2-256 ViT-B-16-SigLIP2
ViT-B-16-SigLIP2-256 ViT-B-16-SigLIP2-384 ViT-B-16-SigLIP2-512 ViT-L-16-SigLIP2-256
ViT-L-16-SigLIP2-384 ViT-L-16-SigLIP2-512 ViT-SO400M-14-SigLIP2 ViT-SO400M-14-SigLIP2-378
ViT-SO400M-16-SigLIP2-256 ViT-SO400M-16-SigLIP2-384 ViT-SO400M-16-SigLIP2-512
ViT-gopt-16-SigLIP2-256 ViT-gopt-16-SigLIP2-384
"""
SIGLIP_NAME = re.compile(r"ViT-(\w+)-(\d+)-SigLIP(2?)(-i18n)?(?:-(\d+))?")


@dataclass
class Recipe:
    """A published model: its config, where it is published, and how its file's SHA-256 begins."""

    config: CLIPConfig
    file: str = ""  # the file's name, or
    hub: str = ""  # the hub id
    sha256: str = ""


@cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name."""
    table = {}
    for line in TABLE.split("\n")[1:-1]:
        name, flags, *where = line.split()
        config = _config(name.split("/")[0], "quick_gelu" if "quick" in flags else "gelu")
        for flag in flags.split("+"):
            config = replace(config, recipe=name, **FLAGS[flag])
        place = {"hub": where[0]} if "/" in where[0] else {"file": where[0]}
        table[name] = Recipe(config, sha256="".join(where[1:]), **place)
    for model in SIGLIP_NAMES.split():
        config = _siglip(model)
        config.recipe = f"{model}/webli"
        table[config.recipe] = Recipe(config, hub=f"timm/{model}")
    return table


def recipe_config(name: str) -> CLIPConfig:
    """The config of the recipe called `name`, such as "ViT-B-32/openai", for the caller to keep;
    UserError with the nearest names where there is none."""
    return deepcopy(pick(recipes(), name, "recipe").config)


def _config(model: str, activation: str) -> CLIPConfig:
    image: dict[str, Any]
    text: dict[str, Any] = {"activation": activation}
    if model in RESNETS:
        embed, size, channels, blocks, text["width"] = RESNETS[model]
        image = {"tower": "resnet", "width": channels, "blocks": blocks, "heads": channels // 2}
        text["heads"] = text["width"] // 64
    elif model in CONVNEXTS:
        embed, size, name, projection, text["depth"] = CONVNEXTS[model]
        image = {"tower": "timm", "name": name, "projection": projection}
        text |= {"width": embed, "heads": embed // 64}
    else:
        embed, size, patch, width, depth, heads, hidden, *of_text = VITS[model]
        image = {"patch": patch, "width": width, "depth": depth, "heads": heads, "hidden": hidden}
        image["activation"] = activation
        text |= zip(("width", "depth", "heads"), of_text, strict=True)
    if "CLIPA" in model:  # texts by BERT's tokenizer
        image["pool"] = "mean"
        text |= {"merges": None, "vocabulary": 32_000, "context": 32, "causal": False}
    return CLIPConfig(embed, ImageConfig(size=[size, size], **image), TextConfig(**text))


def _siglip(model: str) -> CLIPConfig:
    found = SIGLIP_NAME.fullmatch(model)
    assert found
    kind, patch, second, i18n, side = found.groups()
    size = int(side or 224)
    timm = next(name for name, short in TIMM_SIGLIPS.items() if short == kind)
    image = siglip_tower(f"vit_{timm}_patch{patch}_siglip_{size}", size)
    assert image
    width, depth, heads, hidden = SIGLIPS[kind][4:]
    text = TextConfig(
        merges=None,
        vocabulary=256_000 if second else 250_000 if i18n else 32_000,
        context=16 if model == "ViT-SO400M-14-SigLIP" else 64,
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        causal=False,
        bias=True,
        activation="gelu_tanh" if second else "gelu",
        eps=1e-6,
    )
    return CLIPConfig(image.width, image, text, **SIGLIP)


# What all of them share beside the towers; the scale of some is above 100.
SIGLIP: dict[str, Any] = {
    **{"mean": [0.5] * 3, "std": [0.5] * 3, "resize": "squash"},
    **{"loss": "sigmoid", "scale": 10.0, "max_scale": None},
}


def siglip_tower(name: str, size: int) -> ImageConfig | None:
    """SigLIP's image tower of timm's name, such as vit_base_patch16_siglip_224, as our own ViT;
    None for any other network."""
    found = re.fullmatch(r"vit_([a-z0-9]+)_patch(\d+)_siglip_\d+", name)
    if not found or found[1] not in TIMM_SIGLIPS:
        return None
    width, depth, heads, hidden = SIGLIPS[TIMM_SIGLIPS[found[1]]][:4]
    return ImageConfig(
        size=[size, size],
        patch=int(found[2]),
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        pool="attention",
        activation="gelu_tanh" if name.startswith(TANH) else "gelu",
        eps=1e-6,
    )
