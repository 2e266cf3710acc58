"""The recipe of a CLIP: all that its weights need around them to give the features they gave.

Half of it cannot be told from the weights: the heads of the attention, the activation, the eps of
the norms, how images are scaled and normalised. So it is saved beside them, and published files
get it from a table (`clip/recipes.py`).
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from maskgit.common import UserError, nearest, pick

# What OpenAI's CLIP normalises with (and nearly all that came after it).
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]

ACTIVATIONS = ("gelu", "quick_gelu", "gelu_tanh")
POOLS = ("class", "mean", "attention")
TOWERS = ("vit", "resnet", "timm")
MERGES = 48_894  # that OpenAI's tokenizer has


@dataclass
class ImageConfig:
    """An image tower: a ViT, the ResNet of OpenAI's RN50 family, or any network of timm.

    pool also names the rest of the published ViT that it belongs to. class: OpenAI's, a norm in
    front, the class token's last state, norm, projection. mean: CLIPA's, no norm in front, the mean
    of the patches, norm, projection. attention: SigLIP's, no class token and no norm in front,
    patches with a bias, norm, and an attention head of its own (whose width is the embedding's).
    Of a network of timm, class is what that network does by itself.
    """

    tower: str = "vit"
    size: list[int] = field(default_factory=lambda: [224, 224])  # height, width in pixels
    patch: int = 32  # side in pixels
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None  # of the feed-forward; None: 4 times the width
    pool: str = "class"
    activation: str = "gelu"
    eps: float = 1e-5
    patch_dropout: float = 0.0  # share of the patches left out in training (FLIP, Li et al. 2023)
    blocks: list[int] = field(default_factory=list)  # resnet: bottlenecks of each of the 4 levels
    name: str = ""  # timm: the network's
    # timm: from its features to the embedding: linear, mlp, none, or classifier, its own last layer
    projection: str = "linear"

    def __post_init__(self) -> None:
        self.size = list(self.size)  # JSON and YAML have no tuples
        pick(dict.fromkeys(TOWERS), self.tower, "image tower")
        pick(dict.fromkeys(POOLS), self.pool, "pool")
        pick(dict.fromkeys(ACTIVATIONS), self.activation, "activation")
        if len(self.size) != 2 or min(self.size) < 1:
            raise UserError(f"image size {self.size}: give height and width in pixels")
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"patch_dropout={self.patch_dropout} is not from 0 to below 1")
        if self.tower == "vit" and self.patch < 1:
            raise UserError(f"patch={self.patch} is not 1 or more")
        if self.tower == "vit":
            # SigLIP's So400m/14 has 384 pixels a side: its patches leave the last 6 out.
            rest = self.pool != "attention" and any(side % self.patch for side in self.size)
            if rest or min(self.size) < self.patch:
                raise UserError(f"patch={self.patch} does not divide the image size {self.size}")
            _check_heads("image", self.width, self.heads, self.depth)
        if self.tower == "resnet" and (len(self.blocks) != 4 or any(s % 32 for s in self.size)):
            raise UserError(
                f"a resnet takes blocks of 4 levels and sizes that 32 divides, not {self.blocks} "
                f"and {self.size}"
            )
        if self.tower == "timm" and not self.name:
            raise UserError("an image tower of timm needs image.name, such as convnext_tiny")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches (ViT), or of the last level's positions (ResNet)."""
        side = self.patch if self.tower == "vit" else 32
        return self.size[0] // side, self.size[1] // side


@dataclass
class TextConfig:
    """The text tower: a transformer, causal and pooled at the end token as OpenAI's is, or not
    causal and pooled at the last position, as SigLIP's and CLIPA's."""

    merges: int | None = MERGES  # of the tokenizer; None: it is another, and texts come as ids
    vocabulary: int | None = None  # ids, where `merges` is None
    context: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    hidden: int | None = None  # of the feed-forward; None: 4 times the width
    causal: bool = True
    bias: bool = False  # of the projection
    activation: str = "gelu"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        pick(dict.fromkeys(ACTIVATIONS), self.activation, "activation")
        _check_heads("text", self.width, self.heads, self.depth)
        if (self.merges is None) == (self.vocabulary is None):
            raise UserError(
                "a text tower takes either text.merges or, for another tokenizer's ids, "
                "text.vocabulary; the other is null"
            )
        if self.merges is not None and not 0 <= self.merges <= MERGES:
            raise UserError(f"text.merges={self.merges} is not from 0 to {MERGES}")
        if self.context < 3:
            raise UserError(f"text.context={self.context}: start, a word and end take 3")

    @property
    def rows(self) -> int:
        """Ids there are: 512 bytes (inside and at the end of a word), merges, start and end."""
        return self.vocabulary or 512 + (self.merges or 0) + 2


def _check_heads(what: str, width: int, heads: int, depth: int) -> None:
    if depth < 1 or heads < 1 or width % heads:
        raise UserError(
            f"{what}.heads={heads} must divide its width {width}, and depth be 1 or more"
        )


@dataclass
class CLIPConfig:
    """Both towers, what they see, and how they were, or will be, trained."""

    embed: int = 512  # width of the features, E
    image: ImageConfig = field(default_factory=ImageConfig)
    text: TextConfig = field(default_factory=TextConfig)
    mean: list[float] = field(default_factory=lambda: list(MEAN))  # of the pixels in [0, 1]
    std: list[float] = field(default_factory=lambda: list(STD))
    resize: str = "crop"  # cover the size, then crop the middle; or squash: both sides to it
    interpolation: str = "bicubic"  # or bilinear
    loss: str = "infonce"  # or sigmoid, which has a bias
    scale: float = 1 / 0.07  # by which cosines are multiplied, at the start of training
    bias: float = -10.0  # added to them (sigmoid)
    max_scale: float | None = 100.0  # the scale is kept from 1 to this
    dropout: float = 0.0  # of what each block adds
    recipe: str = ""  # what published weights are called: "ViT-B-32 openai"

    def __post_init__(self) -> None:
        self.image = _nested(ImageConfig, self.image, "image")
        self.text = _nested(TextConfig, self.text, "text")
        self.mean, self.std = list(self.mean), list(self.std)
        pick({"crop": 0, "squash": 0}, self.resize, "resize")
        pick({"bicubic": 0, "bilinear": 0}, self.interpolation, "interpolation")
        pick({"infonce": 0, "sigmoid": 0}, self.loss, "loss")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean={self.mean} and std={self.std}: three numbers each, std above 0")
        if self.embed < 1:
            raise UserError(f"embed={self.embed} must be 1 or more")
        if self.max_scale is not None and not 1 <= self.scale <= self.max_scale:
            raise UserError(
                f"scale={self.scale:g} is not from 1 to max_scale={self.max_scale:g} (null: no end)"
            )
        if not self.scale > 0 or not 0 <= self.dropout < 1:
            raise UserError(f"scale={self.scale} must be above 0, dropout={self.dropout} below 1")
        no_projection = self.image.tower == "vit" and self.image.pool == "attention"
        if no_projection and self.image.width != self.embed:
            raise UserError(
                f"with pool=attention the features are as wide as the image tower: "
                f"embed={self.embed} is not {self.image.width}"
            )

    @property
    def log_scale(self) -> float:
        return math.log(self.scale)


def _nested(cls: type, value: Any, where: str) -> Any:
    """A dataclass from what JSON has for it; UserError for a field that it does not have."""
    if not isinstance(value, dict):
        return value
    known = [f.name for f in fields(cls)]
    for key in value:
        if key not in known:
            raise UserError(f"{where} has no field {key!r}: {nearest(key, known)}")
    return cls(**value)
