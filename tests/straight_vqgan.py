"""Published tokenizers, once more: files of their layouts with random weights, and what they
compute, in plain functions over the published names. Nothing here is of the project.

Written from the papers (Esser et al. 2021, appendix; Chang et al. 2022, section 3.1; Sun et al.
2024, section 2.1) and from what is known of the released code. `trap` names a mistake that is
easily made with these files, and computes what comes of it.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F

KEYS = Path(__file__).parent / "keys"  # names and shapes of the published weights


def keys(file):
    """Names and shapes of a file in `keys`; of flax, the first of each line's two."""
    found = re.findall(r"^(\S+) \((.*?)\)", (KEYS / file).read_text(), re.M)
    return {name: tuple(int(n) for n in shape.split(",") if n.strip()) for name, shape in found}


def taming_shapes(mult=(1, 1, 2, 2, 4), z=256, dim=256, codes=1024, gumbel=False, blocks=2):
    """taming-transformers' tokenizer of 128 channels with attention at the lowest resolution."""
    shapes = {}

    def conv(name, inputs, outputs, kernel=1):
        shapes[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name, width):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width)

    def middle(side, width):
        block(f"{side}.mid.block_1", width, width)
        attention(f"{side}.mid.attn_1", width)
        block(f"{side}.mid.block_2", width, width)

    last = len(mult) - 1
    conv("encoder.conv_in", 3, 128, 3)
    width = 128
    for i, times in enumerate(mult):
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", width, width := 128 * times)
            if i == last:
                attention(f"encoder.down.{i}.attn.{j}", width)
        if i < last:
            conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, z, 3)
    conv("decoder.conv_in", z, width, 3)
    middle("decoder", width)
    for i in range(last, -1, -1):
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", width, width := 128 * mult[i])
            if i == last:
                attention(f"decoder.up.{i}.attn.{j}", width)
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    conv("quant_conv", z, dim)
    conv("post_quant_conv", dim, z)
    if gumbel:
        conv("quantize.proj", dim, codes)
    shapes["quantize.embed.weight" if gumbel else "quantize.embedding.weight"] = (codes, dim)
    return shapes


def llamagen_shapes(mult=(1, 1, 2, 2, 4), blocks=2):
    """LlamaGen's: the same structure in other words, the decoder's levels the other way round."""
    shapes = {"quantize.codebook_used": (65536,)}
    for name, shape in taming_shapes(mult, 256, 8, 16384, blocks=blocks).items():
        for old, new in (("block_1", "0"), ("attn_1", "1"), ("block_2", "2")):
            name = name.replace(f"mid.{old}", f"mid.{new}")
        name = name.replace(".block.", ".res.").replace(".down.", ".conv_blocks.")
        name = re.sub(r"\.up\.(\d)", lambda m: f".conv_blocks.{len(mult) - 1 - int(m[1])}", name)
        shapes[name] = shape
    return shapes


def maskbit_shapes():
    """The port's tensors as MaskBit's class calls them."""
    shapes = {}
    for name, shape in keys("maskgit_port.txt").items():
        name = name.replace(".block.", ".res_blocks.")
        shapes[re.sub(r"mid\.(\d)", r"mid.res_blocks.\1", name)] = shape
    return shapes


def small(shapes):
    """A quarter of the width, and 96 codes."""
    return {
        name: tuple(96 if n > 512 else n // 4 if n >= 128 else n for n in shape)
        for name, shape in shapes.items()
    }


def fill(shapes, seed=0):
    """Random weights that keep what passes through them near unit size. Codes have unlike lengths,
    so that normalizing them matters."""
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith(("codebook", "embedding.weight", "embed.weight")):
            tensor *= 0.3 + torch.rand((shape[0], 1), generator=generator)
        elif len(shape) == 4:
            tensor /= math.prod(shape[:3] if name.endswith("kernel") else shape[1:]) ** 0.5
        else:
            tensor = 0.1 * tensor + (not name.endswith("bias"))
        weights[name] = tensor
    return weights


# The steps of the encoder and the decoder, in order: what, and the name of its tensors.


def official_steps(levels=5, blocks=2):
    def residual(side, numbers):
        return [("residual", f"params/{side}/ResBlock_{n}") for n in numbers]

    encoder, decoder = [], residual("decoder", (0, 1))
    for i in range(levels):
        encoder += residual("encoder", range(i * blocks, (i + 1) * blocks))
        decoder += residual("decoder", range(2 + i * blocks, 2 + (i + 1) * blocks))
        if i < levels - 1:
            encoder.append(("pool", ""))
            decoder.append(("up", f"params/decoder/Conv_{i + 1}"))
    encoder += residual("encoder", (levels * blocks, levels * blocks + 1))
    return encoder, decoder


def port_steps(word="block", middle="mid", levels=5):
    encoder, decoder = [], [("residual", f"decoder.{middle}.{j}") for j in (0, 1)]
    for i in range(levels):
        encoder += [("residual", f"encoder.down.{i}.{word}.{j}") for j in (0, 1)]
        encoder += [("pool", "")] if i < levels - 1 else []
    encoder += [("residual", f"encoder.{middle}.{j}") for j in (0, 1)]
    for i in reversed(range(levels)):
        decoder += [("residual", f"decoder.up.{i}.{word}.{j}") for j in (0, 1)]
        decoder += [("up", f"decoder.up.{i}.upsample_conv")] if i > 0 else []
    return encoder, decoder


def taming_steps(levels, blocks=2, several=False):
    """`several`: attention only where a level has more than one, as in a port that is in use."""

    def level(name, blocks, lowest):
        steps = []
        for j in range(blocks):
            steps.append(("residual", f"{name}.block.{j}"))
            if lowest and (blocks > 1 or not several):
                steps.append(("attend", f"{name}.attn.{j}"))
        return steps

    def middle(side):
        return [
            ("residual", f"{side}.mid.block_1"),
            ("attend", f"{side}.mid.attn_1"),
            ("residual", f"{side}.mid.block_2"),
        ]

    encoder, decoder = [], middle("decoder")
    for i in range(levels):
        encoder += level(f"encoder.down.{i}", blocks, i == levels - 1)
        encoder += [("down", f"encoder.down.{i}.downsample.conv")] if i < levels - 1 else []
    for i in reversed(range(levels)):
        decoder += level(f"decoder.up.{i}", blocks + 1, i == levels - 1)
        decoder += [("up", f"decoder.up.{i}.upsample.conv")] if i > 0 else []
    return encoder + middle("encoder"), decoder


def llamagen_steps(levels, reverse=False):
    """`reverse`: the decoder's levels from the last to the first, as taming's."""

    def level(side, i, blocks, lowest):
        name, steps = f"{side}.conv_blocks.{i}", []
        for j in range(blocks):
            steps.append(("residual", f"{name}.res.{j}"))
            steps += [("attend", f"{name}.attn.{j}")] if lowest else []
        return steps

    def middle(side):
        kinds = ("residual", "attend", "residual")
        return [(kind, f"{side}.mid.{j}") for j, kind in enumerate(kinds)]

    encoder, decoder = [], middle("decoder")
    for i in range(levels):
        encoder += level("encoder", i, 2, i == levels - 1)
        encoder += [("down", f"encoder.conv_blocks.{i}.downsample.conv")] if i < levels - 1 else []
    for i in reversed(range(levels)) if reverse else range(levels):
        decoder += level("decoder", i, 3, i == 0)
        decoder += [("up", f"decoder.conv_blocks.{i}.upsample.conv")] if i < levels - 1 else []
    return encoder + middle("encoder"), decoder


class Network:
    """The layers, over one file's tensors; a trap changes one of them."""

    def __init__(self, weights, trap):
        self.weights, self.trap = weights, trap
        self.flax = any("/" in name for name in weights)

    def conv(self, name, x, same=True, **options):
        """`same`: padded so that the size stays (at stride 1)."""
        if self.flax:  # (height, width, in, out)
            order = (3, 2, 1, 0) if self.trap == "kernel transposed" else (3, 2, 0, 1)
            kernel, bias = self.weights[f"{name}/kernel"].permute(order), f"{name}/bias"
        else:
            kernel, bias = self.weights[f"{name}.weight"], f"{name}.bias"
        bias = self.weights.get(bias)
        if bias is None and self.trap == "biases":
            bias = torch.full((len(kernel),), 0.02)
        padding = kernel.shape[-1] // 2 if same else 0
        return F.conv2d(x, kernel, bias, padding=padding, **options)

    def norm(self, name, x):
        scale = self.weights[f"{name}/scale" if self.flax else f"{name}.weight"]
        bias = self.weights[f"{name}/bias" if self.flax else f"{name}.bias"]
        groups = x.unflatten(1, (32, -1))
        mean = groups.mean((2, 3, 4), keepdim=True)
        variance = groups.var((2, 3, 4), keepdim=True, correction=0)
        eps = 1e-5 if self.trap == "eps" else 1e-6
        x = ((groups - mean) / (variance + eps).sqrt()).flatten(1, 2)
        return x * scale[:, None, None] + bias[:, None, None]

    def residual(self, name, x):
        parts = ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
        if self.flax:
            parts = ("GroupNorm_0", "Conv_0", "GroupNorm_1", "Conv_1", "Conv_2")
        norm1, conv1, norm2, conv2, shortcut = (f"{name}{'./'[self.flax]}{p}" for p in parts)
        middle = self.conv(conv1, F.silu(self.norm(norm1, x)))
        h = self.conv(conv2, F.silu(self.norm(norm2, middle)))
        if x.shape[1] == h.shape[1]:
            return x + h
        kernel = self.weights[f"{shortcut}/kernel" if self.flax else f"{shortcut}.weight"]
        if kernel.shape[-2 if self.flax else 1] == h.shape[1]:  # MaskGIT's: the input is dropped
            return h + self.conv(shortcut, middle if self.trap == "shortcut" else h)
        return h + self.conv(shortcut, x)

    def attend(self, name, x):
        if self.trap == "attention by the image's size" and x.shape[2] != 16:
            return x
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{p}", h).flatten(2) for p in "qkv")  # (B, C, N)
        share = torch.softmax(q.mT @ k / q.shape[1] ** 0.5, dim=2)  # of keys, for each query
        return x + self.conv(f"{name}.proj_out", (v @ share.mT).view_as(x))

    def down(self, name, x):
        if self.trap == "symmetric padding":
            return self.conv(name, x, stride=2)
        return self.conv(name, F.pad(x, (0, 1, 0, 1)), same=False, stride=2)

    def pool(self, name, x):
        return F.avg_pool2d(x, 2)

    def up(self, name, x):
        return self.conv(name, x.repeat_interleave(2, 2).repeat_interleave(2, 3))

    def lookup(self, z, codes, unit):
        """Tokens (B, h, w) of latents (B, D, h, w)."""
        rows = z.movedim(1, -1)
        if "quantize.proj.weight" in self.weights and self.trap != "nearest":
            logits = self.conv("quantize.proj", z)
            if self.trap == "noise":
                torch.manual_seed(0)
                logits = logits - torch.empty_like(logits).exponential_().log()
            return logits.argmax(1)
        if unit:
            rows = rows / rows.norm(dim=-1, keepdim=True)
            if self.trap != "raw codes in the search":
                codes = codes / codes.norm(dim=-1, keepdim=True)
        return torch.cdist(rows.flatten(0, 2), codes).argmin(1).view(rows.shape[:3])


def straight(weights, steps, images, signed, unit=False, trap=""):
    """Latents (B, D, h, w), tokens (B, h, w) and the decoded images (B, 3, H, W) in [0, 1].

    steps: of the encoder and the decoder. signed: the network's images are in [-1, 1]. unit: codes
    and latents are compared, and decoded, as unit vectors.
    """
    network = Network(weights, trap)
    root = "params/{}/{}" if network.flax else "{}.{}"
    if network.flax:
        last = max(int(m[1]) for n in weights if (m := re.match(r"params/decoder/Conv_(\d+)/", n)))
        ends = {
            "in": "Conv_0",
            "norm": "GroupNorm_0",
            "encoder": "Conv_1",
            "decoder": f"Conv_{last}",
        }
    else:
        ends = {"in": "conv_in", "norm": "norm_out", "encoder": "conv_out", "decoder": "conv_out"}

    def run(side, x):
        x = network.conv(root.format(side, ends["in"]), x)
        for what, name in steps[side == "decoder"]:
            x = getattr(network, what)(name, x)
        x = F.silu(network.norm(root.format(side, ends["norm"]), x))
        return network.conv(root.format(side, ends[side]), x)

    signed = signed != (trap == "range")
    z = run("encoder", images * 2 - 1 if signed else images)
    if "quant_conv.weight" in weights:
        z = network.conv("quant_conv", z)
    names = ("params/quantizer/codebook", "quantize.embedding.weight", "quantize.embed.weight")
    codes = next(weights[name] for name in names if name in weights)
    tokens = network.lookup(z, codes, unit)
    if unit and trap != "raw codes in the decoder":
        codes = codes / codes.norm(dim=1, keepdim=True)
    x = codes[tokens].movedim(-1, 1)
    if "post_quant_conv.weight" in weights:
        x = network.conv("post_quant_conv", x)
    x = run("decoder", x)
    return z, tokens, ((x + 1) / 2 if signed else x).clamp(0, 1)
