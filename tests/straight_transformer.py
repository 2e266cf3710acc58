"""The published transformers once more, in numpy and float64, straight from their description in
`tests/keys` and over the names that stand in their files; and files of them with random numbers.

Nothing here knows the code under test.
"""

import re
from pathlib import Path

import numpy as np

KEYS = Path(__file__).parent / "keys"


def layout(file, depth, sizes):
    """Names and shapes of a published file, its first layer repeated `depth` times.

    sizes: what takes the place of the numbers in the published shapes.
    """
    lines = re.findall(r"^([\w./]+) \(([\d, ]+)\)$", (KEYS / file).read_text(), re.MULTILINE)
    shapes = {}
    for name, shape in lines:
        shape = tuple(sizes.get(int(n), int(n)) for n in re.findall(r"\d+", shape))
        layers = range(depth) if re.search(r"(TransformerLayer_|layers\.)0", name) else [0]
        for i in layers:
            shapes[re.sub(r"(TransformerLayer_|layers\.)0", rf"\g<1>{i}", name)] = shape
    return shapes


def random_weights(shapes, seed=0):
    """Float32 arrays with the spread of trained ones: no bias is 0, no scale is 1."""
    generator, arrays = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        numbers = generator.standard_normal(shape).astype(np.float32)
        scale = name.endswith("scale") or "ln" in name or "norm_final.weight" in name
        if len(shape) == 1:
            arrays[name] = np.float32(scale and not name.endswith("bias")) + 0.2 * numbers
        elif "emb" in name or "reg_tokens" in name:
            arrays[name] = 0.5 * numbers
        else:
            arrays[name] = numbers / np.float32(np.sqrt(max(shape)))
    return arrays


def official_weights(width=48, heads=4, depth=2, tokens=16, seed=0):
    sizes = {768: width, 3072: 4 * width, 16: heads, 48: width // heads, 257: 1 + tokens}
    return random_weights(layout("maskgit_transformer_flax.txt", depth, sizes), seed)


def halton_weights(width=48, heads=4, depth=2, tokens=16, codes=20, classes=6, seed=0):
    hidden = -(-(8 * width // 3) // 256) * 256
    sizes = {768: width, 4608: 6 * width, 1536: 2 * width, 2048: hidden}
    sizes |= {256: tokens, 16385: codes + 1, 1001: classes + 1}
    shapes = layout("halton_transformer.txt", depth, sizes)
    inner = width // heads * heads
    for name in shapes:
        if re.search(r"attn\.w[qkv]", name):
            shapes[name] = (inner, width)
        elif "attn.wo" in name:
            shapes[name] = (width, inner)
    arrays = random_weights(shapes, seed)
    return arrays | {"head.weight": arrays["tok_emb.weight"]}


# ---------------------------------------------------------------- the networks


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def layer_norm(x, w, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
    return x * w[f"{name}/scale"] + w[f"{name}/bias"]


def gelu(x):  # flax's, the tanh approximation
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def official(w, tokens, labels, codes=1024):
    """Logits (B, N, codes) of tokens (B, N), -1 where masked, and labels (B,)."""
    w = {name.removeprefix("params/"): array.astype(np.float64) for name, array in w.items()}
    table = w["Embed_0/word_embeddings/embedding"]
    ids = np.concatenate([codes + labels[:, None], tokens], 1)
    x = table[ids] + w["Embed_0/position_embeddings/embedding"]  # -1 is the last row
    x = layer_norm(x, w, "Embed_0/embeddings_ln")
    layer = 0
    while f"TransformerLayer_{layer}/Mlp_0/layer_output/bias" in w:
        at = f"TransformerLayer_{layer}/Attention_0"
        q, k, v = (
            np.einsum("bnd,dhe->bhne", x, w[f"{at}/self_attention/{part}/kernel"])
            + w[f"{at}/self_attention/{part}/bias"][:, None]
            for part in ("query", "key", "value")
        )
        share = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))  # (B, heads, N, N)
        y = np.einsum("bhne,hed->bnd", share @ v, w[f"{at}/self_attention/out/kernel"])
        x = layer_norm(x + y + w[f"{at}/self_attention/out/bias"], w, f"{at}/attention_output_ln")
        at = f"TransformerLayer_{layer}/Mlp_0"
        y = x @ w[f"{at}/intermediate_output/kernel"] + w[f"{at}/intermediate_output/bias"]
        y = gelu(y) @ w[f"{at}/layer_output/kernel"] + w[f"{at}/layer_output/bias"]
        x = layer_norm(x + y, w, f"{at}/layer_output_ln")
        layer += 1
    x = gelu(x @ w["MlmLayer_0/mlm_dense/kernel"] + w["MlmLayer_0/mlm_dense/bias"])
    x = layer_norm(x, w, "MlmLayer_0/mlm_ln")
    return (x @ table.T + w["MlmLayer_0/mlm_bias/bias"])[:, 1:, :codes]


def silu(x):
    return x / (1 + np.exp(-x))


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def halton(w, tokens, labels, heads):
    """Logits (B, N, codes) of tokens (B, N), codes = masked, and labels (B,), the last: none."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    n = tokens.shape[1]
    x = w["tok_emb.weight"][tokens] + w["pos_emb.weight"]
    registers = np.broadcast_to(w["reg_tokens.weight"], (len(x), *w["reg_tokens.weight"].shape))
    x = np.concatenate([x, registers], 1)
    c = silu(w["cls_emb.weight"][labels])[:, None]
    layer = 0
    while f"transformer.layers.{layer}.ln1.weight" in w:
        own = f"transformer.layers.{layer}."
        p = {name.removeprefix(own): array for name, array in w.items() if name.startswith(own)}
        m = np.split(c @ p["mlp.1.weight"].T + p["mlp.1.bias"], 6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = m
        y = rms(x) * p["ln1.weight"] * (1 + scale1) + shift1
        q, k, v = (y @ p[f"attn.w{part}.weight"].T for part in "qkv")
        q, k, v = (
            part.reshape(len(x), x.shape[1], heads, -1).swapaxes(1, 2)
            for part in (rms(q), rms(k), v)
        )
        y = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])) @ v
        y = y.swapaxes(1, 2).reshape(len(x), x.shape[1], -1)
        x = x + gate1 * (y @ p["attn.wo.weight"].T)
        y = rms(x) * p["ln2.weight"] * (1 + scale2) + shift2
        y = silu(y @ p["ff.w1.weight"].T) * (y @ p["ff.w3.weight"].T)
        x = x + gate2 * (y @ p["ff.w2.weight"].T)
        layer += 1
    shift, scale = np.split(c @ w["last_norm.mlp.1.weight"].T + w["last_norm.mlp.1.bias"], 2, -1)
    x = rms(x) * w["last_norm.norm_final.weight"] + w["last_norm.norm_final.bias"]
    logits = (x * (1 + scale) + shift) @ w["head.weight"].T + w["head.bias"]
    return logits[:, :n, :-1]  # no register, and no mask
