"""Published models with random weights, reduced in width, and files of the formats they come in."""

import io
import pickle
import re
import struct
import tarfile
from pathlib import Path

import msgpack
import torch

KEYS = Path(__file__).parent / "keys"
KEPT = (1, 3, 8, 1024, 16384)  # sides that no width scales: kernels, colours, codes


def draw(shapes, seed=0):
    """Small random numbers in these shapes, by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def listed(file, pattern=r"(\S+) \((.*?)\)"):
    """Names and shapes that a file of keys lists."""
    found = (re.match(pattern, line) for line in (KEYS / file).read_text().splitlines())
    pairs = (match.groups() for match in found if match)
    return {name: tuple(int(n) for n in shape.split(",") if n.strip()) for name, shape in pairs}


def narrow(shapes, by=4):
    return {
        name: tuple(side if side in KEPT else side // by for side in shape)
        for name, shape in shapes.items()
    }


def official_tokenizer(seed=0):
    """Arrays of tokenizer_imagenet256_checkpoint at a quarter of its width."""
    shapes = narrow(listed("maskgit_flax_to_port.txt"))
    return draw(shapes, seed)


def official_transformer(side=4, width=32, heads=2, depth=2, seed=1):
    """Arrays of maskgit_imagenet256_checkpoint, with fewer tokens (side x side)."""
    inner, attention = width // heads, "Attention_0/self_attention"
    shapes = {
        "Embed_0/word_embeddings/embedding": (2025, width),
        "Embed_0/position_embeddings/embedding": (1 + side**2, width),
        "Embed_0/embeddings_ln/scale": (width,),
        "Embed_0/embeddings_ln/bias": (width,),
        "MlmLayer_0/mlm_dense/kernel": (width, width),
        "MlmLayer_0/mlm_dense/bias": (width,),
        "MlmLayer_0/mlm_ln/scale": (width,),
        "MlmLayer_0/mlm_ln/bias": (width,),
        "MlmLayer_0/mlm_bias/bias": (2025,),
    }
    for i in range(depth):
        layer = {
            f"{attention}/{part}/{leaf}": (width, heads, inner)[leaf == "bias" :]
            for part in ("query", "key", "value")
            for leaf in ("kernel", "bias")
        }
        layer |= {
            f"{attention}/out/kernel": (heads, inner, width),
            f"{attention}/out/bias": (width,),
        }
        for norm in ("Attention_0/attention_output_ln", "Mlp_0/layer_output_ln"):
            layer |= {f"{norm}/scale": (width,), f"{norm}/bias": (width,)}
        layer |= {"Mlp_0/intermediate_output/kernel": (width, 4 * width)}
        layer |= {"Mlp_0/intermediate_output/bias": (4 * width,)}
        layer |= {"Mlp_0/layer_output/kernel": (4 * width, width)}
        layer |= {"Mlp_0/layer_output/bias": (width,)}
        shapes |= {f"TransformerLayer_{i}/{name}": shape for name, shape in layer.items()}
    return draw({f"params/{name}": shape for name, shape in shapes.items()}, seed)


def llamagen_tokenizer(file="llamagen_vq16.txt", seed=2):
    """Tensors of vq_ds16_c2i.pt at a quarter of its width."""
    return draw(narrow(listed(file)), seed)


def taming_tokenizer(codes=1024, seed=3):
    """Tensors of taming's f16 tokenizer at a quarter of its width."""
    shapes = narrow(listed("taming_f16_16384.txt"))
    return draw(shapes | {"quantize.embedding.weight": (codes, 64)}, seed)


def halton_transformer(side=4, width=32, depth=2, seed=4):
    """Tensors of a Halton-MaskGIT of a size that nobody published."""
    hidden = 256
    shapes = {}
    for name, shape in listed("halton_transformer.txt").items():
        sides = {768: width, 4608: 6 * width, 1536: 2 * width, 2048: hidden, 256: side**2}
        if not name.startswith("pos_emb"):
            sides.pop(256)
        shape = tuple(sides.get(side, side) for side in shape)
        for i in range(depth if ".layers.0." in name else 1):
            shapes[name.replace(".layers.0.", f".layers.{i}.")] = shape
    tensors = draw(shapes, seed)
    return tensors | {"head.weight": tensors["tok_emb.weight"]}


def flax_bytes(tensors, chunk=None):
    """A msgpack as flax.serialization makes it; arrays of more than `chunk` numbers in chunks."""

    def array(tensor):
        kind = str(tensor.dtype).removeprefix("torch.")
        numbers = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return msgpack.ExtType(1, msgpack.packb((tuple(tensor.shape), kind, numbers)))

    def by_number(values):
        return {str(i): value for i, value in enumerate(values)}

    content = {}
    for name, tensor in tensors.items():
        *parents, leaf = name.split("/")
        inner = content
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if chunk and tensor.numel() > chunk:
            chunks = by_number(array(part) for part in tensor.flatten().split(chunk))
            shape = by_number(tensor.shape)
            inner[leaf] = {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks}
        else:
            inner[leaf] = array(tensor)
    return msgpack.packb(content)


def stacked_bytes(content):
    """A file as torch.save made it from 0.2 to 1.5."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


class Named:
    """Pickled as the key of a tensor."""

    def __init__(self, key):
        self.key = key


class NamingPickler(pickle.Pickler):
    def persistent_id(self, value):
        return str(value.key) if isinstance(value, Named) else None


STORAGE = {torch.float32: torch.FloatStorage, torch.int64: torch.LongStorage}


def tar_bytes(tensors, more=()):
    """A file as torch.save made it before 0.2: a dict of tensors, and what is in `more`. Every
    second storage is a part of another, of one number more."""
    storages, layouts, pickled = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pickle.dump(len(tensors), storages, 2)
    pickle.dump(len(tensors), layouts, 2)
    parts: list[tuple[int, int, int, int]] = []
    for i, tensor in enumerate(tensors.values()):
        flat = tensor.contiguous().flatten()
        if i % 2:
            parts.append((1000 + i, 2000 + i, 1, len(flat)))
            flat = torch.cat([flat[:1], flat])
        pickle.dump((1000 + i + 1000 * (i % 2), "cpu", STORAGE[tensor.dtype]), storages, 2)
        storages.write(struct.pack("<q", len(flat)) + flat.numpy().tobytes())
        pickle.dump((i, 1000 + i, STORAGE[tensor.dtype]), layouts, 2)
        sides = (*tensor.shape, *tensor.contiguous().stride(), 0)
        layouts.write(struct.pack(f"<i4x{len(sides)}q", tensor.ndim, *sides))
    pickle.dump(parts, storages, 2)
    NamingPickler(pickled, 2).dump({name: Named(i) for i, name in enumerate(tensors)} | dict(more))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as tar:
        members = {"storages": storages, "tensors": layouts, "pickle": pickled}
        for name, part in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(part.getvalue())
            tar.addfile(info, io.BytesIO(part.getvalue()))
    return file.getvalue()


def put(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return str(path)
