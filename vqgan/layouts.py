"""Under which names tokenizers are published, and what names and shapes tell of them.

What shapes cannot tell (the range of images, normalized codes, where a stride pads) belongs to the
layout: each comes from one code base, which fixes it.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from statistics import mode
from typing import Any

from maskgit.common import UserError
from vqgan.model import VQGANConfig
from vqgan.quantizer import QuantizerConfig

SIDES = {"encoder": "down", "decoder": "up"}
KINDS = ("weight", "bias")
LARGEST = 12  # levels, and residual blocks of one; those that are published have 5 and 4
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """One code base's names, as patterns of a side, its way (down or up), a level and a block."""

    family: str
    marks: tuple[str, ...]  # each begins a name in every file of this layout, and of it alone
    block: str = "{side}.{way}.{level}.block.{index}"
    attention: str = "{side}.{way}.{level}.attn.{index}"
    sample: str = "{side}.{way}.{level}.{way}sample.conv"  # down or up, after the level's blocks
    middle: tuple[str, ...] = ("{side}.mid.0", "{side}.mid.1")
    codebook: str = "quantize.embedding.weight"
    lowest_first: bool = False  # the decoder's level 0 is that of the lowest resolution
    config: Mapping[str, Any] = field(default_factory=dict)  # what differs from MaskGIT's
    quantizer: Mapping[str, Any] = field(default_factory=dict)

    def at(self, pattern: str, side: str, level: int, levels: int, index: int = 0) -> str:
        """The name of a module, where level 0 is the full resolution."""
        number = levels - 1 - level if self.lowest_first and side == "decoder" else level
        return pattern.format(side=side, way=SIDES[side], level=number, index=index)


TAMING_CONFIG: dict[str, Any] = {
    **{"middle_attention": True, "down": "conv", "shortcut": "input", "biasless": False},
    **{"out_kernel": 3, "quant_conv": True, "signed": True},
}
TAMING_MIDDLE = ("{side}.mid.block_1", "{side}.mid.attn_1", "{side}.mid.block_2")
TAMING = Layout(
    "taming",
    (r"(encoder|decoder)\.mid\.block_1\.",),
    middle=TAMING_MIDDLE,
    config=TAMING_CONFIG,
)
GUMBEL = Layout(
    "taming, Gumbel",
    (*TAMING.marks, r"quantize\.(proj|embed)\."),
    middle=TAMING_MIDDLE,
    codebook="quantize.embed.weight",
    config=TAMING_CONFIG,
    quantizer={"gumbel": True},
)
LLAMAGEN = Layout(
    "LlamaGen",
    (r"(encoder|decoder)\.conv_blocks\.",),
    block="{side}.conv_blocks.{level}.res.{index}",
    attention="{side}.conv_blocks.{level}.attn.{index}",
    sample="{side}.conv_blocks.{level}.{way}sample.conv",
    middle=("{side}.mid.0", "{side}.mid.1", "{side}.mid.2"),
    lowest_first=True,
    config=TAMING_CONFIG,
    quantizer={"normalize": True},
)
PORT = Layout(  # open-muse's port of the official tokenizer
    "MaskGIT, ported",
    (r"encoder\.mid\.[01]\.", r"decoder\.up\.\d+\.upsample_conv\."),
    sample="{side}.{way}.{level}.{way}sample_conv",
)
MASKBIT = Layout(
    "MaskGIT, ported, MaskBit's names",
    (r"(encoder|decoder)\.(mid|down\.\d+|up\.\d+)\.res_blocks\.",),
    block="{side}.{way}.{level}.res_blocks.{index}",
    sample="{side}.{way}.{level}.{way}sample_conv",
    middle=("{side}.mid.res_blocks.0", "{side}.mid.res_blocks.1"),
)
OFFICIAL = Layout(  # read under the port's names: see `official_names`
    "official MaskGIT",
    (r"params/(encoder|decoder)/ResBlock_\d+/",),
    sample=PORT.sample,
)
LAYOUTS = (OFFICIAL, LLAMAGEN, MASKBIT, GUMBEL, TAMING, PORT)  # the first that fits


def recognise(names: Iterable[str]) -> Layout | None:
    """The layout that these names of tensors belong to."""
    names = list(names)
    for layout in LAYOUTS:
        if all(any(re.match(mark, name) for name in names) for mark in layout.marks):
            return layout
    return None


def layer_names(layout: Layout, config: VQGANConfig, side: str) -> list[str]:
    """What the layout calls each of our `layers` of the encoder or decoder, in their order."""
    down, levels = side == "encoder", len(config.mult)
    middle = [name.format(side=side) for name in layout.middle]
    names = []
    for level in range(levels) if down else reversed(range(levels)):
        for index in range(config.encoder_blocks if down else config.decoder_blocks):
            names.append(layout.at(layout.block, side, level, levels, index))
            if level in config.attention:
                names.append(layout.at(layout.attention, side, level, levels, index))
        if level != (levels - 1 if down else 0):
            names.append(layout.at(layout.sample, side, level, levels))
    return names + middle if down else middle + names


def their_names(layout: Layout, config: VQGANConfig, ours: Iterable[str]) -> dict[str, str]:
    """Published names by our names of the same tensors."""
    layers = {side: layer_names(layout, config, side) for side in SIDES}
    leaves = {"shortcut": ".nin_shortcut", "out": ".proj_out", "conv": ""}
    found = {}
    for name in ours:
        side, _, rest = name.partition(".layers.")
        if rest:
            number, leaf, kind = rest.split(".")
            found[name] = f"{layers[side][int(number)]}{leaves.get(leaf, f'.{leaf}')}.{kind}"
        elif name == "quantizer.codebook":
            found[name] = layout.codebook
        else:
            found[name] = name.replace("quantizer.", "quantize.")
    return found


def official_names(names: Iterable[str]) -> dict[str, str]:
    """The official names, as far as these names of a file tell how many there are, by the port's.

    flax numbers the modules of a kind in the order of the forward pass: ResBlock_10 and _11 of five
    levels of two are the encoder's middle. The decoder's convolutions are the first, one after each
    level but the last, and the last.
    """
    names = list(names)

    def last(module: str) -> int:
        found = [re.match(rf"params/{module}_(\d{{1,3}})/", name) for name in names]
        return max((int(match[1]) for match in found if match), default=0)

    levels = min(max(1, last("decoder/Conv")), LARGEST)
    blocks = [min(max(1, (last(f"{side}/ResBlock") - 1) // levels), LARGEST) for side in SIDES]
    config = VQGANConfig(mult=[1] * levels, encoder_blocks=blocks[0], decoder_blocks=blocks[1])
    modules = {
        **{"encoder.conv_in": "encoder/Conv_0", "encoder.conv_out": "encoder/Conv_1"},
        **{"decoder.conv_in": "decoder/Conv_0", "decoder.conv_out": f"decoder/Conv_{levels}"},
        **{f"{side}.norm_out": f"{side}/GroupNorm_0" for side in SIDES},
    }
    parts = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "norm2": "GroupNorm_1", "conv2": "Conv_1"}
    for side in SIDES:
        block, up = count(), count(1)
        for name in layer_names(OFFICIAL, config, side):
            if name.endswith(".upsample_conv"):
                modules[name] = f"{side}/Conv_{next(up)}"
            if name.endswith("sample_conv"):  # the way down has none
                continue
            prefix = f"{side}/ResBlock_{next(block)}"
            for ours, theirs in {**parts, "nin_shortcut": "Conv_2"}.items():
                modules[f"{name}.{ours}"] = f"{prefix}/{theirs}"
    found = {OFFICIAL.codebook: "params/quantizer/codebook"}
    for name, module in modules.items():
        found[f"{name}.weight"] = f"params/{module}/{'scale' if 'Group' in module else 'kernel'}"
        found[f"{name}.bias"] = f"params/{module}/bias"
    return found


# Where a size stands: names of tensors and their axes.
LATENT = (
    ("encoder.conv_out.weight", 0),
    ("encoder.conv_out.bias", 0),
    ("decoder.conv_in.weight", 1),
)
CODE = (("quant_conv.weight", 0), ("quant_conv.bias", 0), ("post_quant_conv.weight", 1))
LOGITS = (("quantize.proj.weight", 0), ("quantize.proj.bias", 0))


def measure(layout: Layout, shapes: Shapes) -> VQGANConfig:
    """The configuration that tensors of these names and shapes have, kernels as (out, in, ...).

    Several have a say in each size, so that one which is missing or of another shape can be told.
    UserError where no configuration has such sizes.
    """

    def size(*places: tuple[str, int]) -> int:
        return _most(shapes[name][i] for name, i in places if len(shapes.get(name, ())) > i)

    depths = {side: _depths(layout, layout.block, side, shapes) for side in SIDES}
    levels = max(1, *map(len, depths.values()))
    if max([levels, *depths["encoder"], *depths["decoder"]]) > LARGEST:
        raise UserError(f"{layout.family}: more than {LARGEST} levels, or residual blocks of one")
    widths = []
    for level in range(levels):  # a level's tensors are as wide as what comes out, but for norm1
        blocks = (layout.at(layout.block, side, level, levels) for side in SIDES)
        starts = tuple(block.removesuffix("0") for block in blocks)
        widths.append(_most(s[0] for name, s in shapes.items() if name.startswith(starts) and s))
    norm1 = f"{layout.at(layout.block, 'encoder', 0, levels)}.norm1"
    first = [(f"{name}.{kind}", 0) for name in ("encoder.conv_in", norm1) for kind in KINDS]
    channels = size(*first) if any(name in shapes for name, _ in first) else widths[0]
    if any(width % channels for width in widths):
        raise UserError(
            f"{layout.family}: levels {widths} wide after a first convolution of {channels} "
            "channels: no tokenizer that is known here has such"
        )
    book = (layout.codebook, 1)
    apart = layout.config.get("quant_conv")  # else codes are as wide as latents
    attention = [_depths(layout, layout.attention, side, shapes, levels) for side in SIDES]
    return VQGANConfig(
        channels=channels,
        mult=[width // channels for width in widths],
        encoder_blocks=_most(depths["encoder"] or [1]),
        decoder_blocks=_most(depths["decoder"] or [1]),
        z_channels=size(*LATENT, *(() if apart else (book,))),
        attention=[level for level in range(levels) if all(found[level] for found in attention)],
        quantizer=QuantizerConfig(
            codebook_size=size((layout.codebook, 0), *LOGITS),
            dim=size(*(CODE if apart else LATENT), book),
            **layout.quantizer,
        ),
        **layout.config,
    )


def _depths(
    layout: Layout, pattern: str, side: str, shapes: Shapes, levels: int | None = None
) -> list[int]:
    """How many modules of a pattern each level of a side has, level 0 being the full resolution.
    Without `levels`, there are as many as have some."""
    parts = pattern.count(".") + 1
    modules = {".".join(name.split(".", parts)[:parts]) for name in shapes}
    found: list[int] = []
    while len(found) != levels:
        name = partial(pattern.format, side=side, way=SIDES[side], level=len(found))
        found.append(next(i for i in count() if name(index=i) not in modules))
        if levels is None and not found[-1]:
            found.pop()
            break
    return found[::-1] if layout.lowest_first and side == "decoder" else found


def _most(sizes: Iterable[int]) -> int:
    """The size that occurs most, at least 1; where there is none, one that can be."""
    return max(1, mode([*sizes] or [VQGANConfig.groups]))
