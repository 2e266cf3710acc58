"""Where published weights are: addresses, sizes, hashes, licences, and what to cite.

Addresses are those of the publishers' own READMEs (of taming-transformers, the file behind the
folder that its README gives). A size or a hash stands here only where it is public: OpenAI's hashes
are in their addresses, those of two files of taming-transformers are what several unrelated
projects found; None where nothing is known. `maskgit download` is all that reads these addresses;
`maskgit import` and `maskgit doctor` go by the names, the hashes and the licences.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """Who published a file: the licence is the repository's, which seldom speaks of weights."""

    licence: str
    cite: str
    page: str  # where to look if an address leads nowhere


@dataclass(frozen=True)
class File:
    """A published file, under the name that it is saved as."""

    name: str
    url: str
    source: Source
    size: int | None = None  # bytes
    sha256: str | None = None
    member: str = ""  # of a zip archive: the file in it that has the weights


@dataclass(frozen=True)
class Published:
    """What `maskgit import` takes at once."""

    about: str
    files: tuple[File, ...]


OFFICIAL = Source(
    "Apache-2.0 (google-research/maskgit)",
    "Chang et al., MaskGIT: Masked Generative Image Transformer, CVPR 2022 (arXiv 2202.04200)",
    "https://github.com/google-research/maskgit",
)
PORT = Source(
    "Apache-2.0 (google-research/maskgit, fun-research/TiTok)",
    OFFICIAL.cite,
    "https://github.com/bytedance/1d-tokenizer",
)
TAMING = Source(
    "MIT (CompVis/taming-transformers; it states none for the weights)",  # its issue 209 asks
    "Esser et al., Taming Transformers for High-Resolution Image Synthesis, CVPR 2021 "
    "(arXiv 2012.09841)",
    "https://github.com/CompVis/taming-transformers",
)
LATENT = Source(
    "MIT (CompVis/latent-diffusion)",
    "Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, CVPR 2022 "
    "(arXiv 2112.10752)",
    "https://github.com/CompVis/latent-diffusion",
)
LLAMAGEN = Source(
    "MIT (FoundationVision/LlamaGen)",
    "Sun et al., Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation, 2024 "
    "(arXiv 2406.06525)",
    "https://github.com/FoundationVision/LlamaGen",
)
HALTON = Source(
    "MIT (valeoai/Halton-MaskGIT)",
    "Besnier et al., Halton Scheduler for Masked Generative Image Transformer, ICLR 2025 "
    "(arXiv 2503.17076)",
    "https://github.com/valeoai/Halton-MaskGIT",
)
CLIP = Source(
    "MIT (openai/CLIP)",
    "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, "
    "ICML 2021 (arXiv 2103.00020)",
    "https://github.com/openai/CLIP",
)


def _official(part: str, size: int) -> File:
    name = f"{part}_imagenet{size}_checkpoint"
    return File(name, f"https://storage.googleapis.com/maskgit-public/checkpoints/{name}", OFFICIAL)


def _hub(repository: str, name: str, source: Source) -> File:
    return File(name, f"https://huggingface.co/{repository}/resolve/main/{name}", source)


def _taming(name: str, share: str, size: int, sha256: str | None = None) -> File:
    url = f"https://heibox.uni-heidelberg.de/d/{share}/files/?p=%2Fckpts%2Flast.ckpt&dl=1"
    return File(f"{name}.ckpt", url, TAMING, size, sha256)


def _latent(name: str) -> File:
    url = f"https://ommer-lab.com/files/latent-diffusion/{name}.zip"
    return File(f"{name}.zip", url, LATENT, member="model.ckpt")


def _clip(name: str, size: int, sha256: str) -> File:
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{name}.pt"
    return File(f"{name}.pt", url, CLIP, size, sha256)


VQ16 = _hub("FoundationVision/LlamaGen", "vq_ds16_c2i.pt", LLAMAGEN)


def _halton(pixels: int, size: str) -> Published:
    transformer = _hub("llvictorll/Halton-MaskGIT", f"ImageNet_{pixels}_{size}.pth", HALTON)
    about = f"Halton-MaskGIT {size}, ImageNet at {pixels} pixels: tokenizer and transformer"
    return Published(about, (VQ16, transformer))


PUBLISHED: dict[str, Published] = {
    **{
        f"maskgit{size}": Published(
            f"official MaskGIT, ImageNet at {size} pixels: tokenizer and transformer",
            (_official("tokenizer", size), _official("maskgit", size)),
        )
        for size in (256, 512)
    },
    "maskgit-vqgan": Published(
        "the tokenizer of maskgit256, ported to torch",
        (_hub("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin", PORT),),
    ),
    "taming-f16-1024": Published(
        "taming-transformers' tokenizer: 16 pixels a token, 1,024 codes",
        (_taming("vqgan_imagenet_f16_1024", "8088892a516d4e3baf92", 957_954_257),),
    ),
    "taming-f16-16384": Published(
        "taming-transformers' tokenizer: 16 pixels a token, 16,384 codes",
        (
            _taming(
                "vqgan_imagenet_f16_16384",
                "a7530b09fed84f80a887",
                980_092_370,
                "845a68805098cb666420d5db93df53f3a3b6dd443e6dd85c05759c5b998cd663",
            ),
        ),
    ),
    "taming-gumbel-f8": Published(
        "taming-transformers' tokenizer: 8 pixels a token, 8,192 codes, Gumbel",
        (
            _taming(
                "vqgan_gumbel_f8",
                "2e5662443a6b4307b470",
                376_581_823,
                "5cd6c74810ab97e00e942c25403f73afc081e8b19987b31ec0d9ff5b68e7ab14",
            ),
        ),
    ),
    "taming-f8": Published(
        "taming-transformers' tokenizer: 8 pixels a token, 16,384 codes", (_latent("vq-f8"),)
    ),
    "taming-f8-256": Published(
        "taming-transformers' tokenizer: 8 pixels a token, 256 codes", (_latent("vq-f8-n256"),)
    ),
    "llamagen-f16": Published("LlamaGen's tokenizer: 16 pixels a token", (VQ16,)),
    "llamagen-f8": Published(
        "LlamaGen's tokenizer: 8 pixels a token",
        (_hub("FoundationVision/LlamaGen", "vq_ds8_c2i.pt", LLAMAGEN),),
    ),
    **{f"halton256-{size}": _halton(256, size) for size in ("tiny", "small", "base")},
    **{f"halton384-{size}": _halton(384, size) for size in ("small", "base", "large")},
    **{
        f"clip-{name.lower()}": Published(f"OpenAI's CLIP {name}", (_clip(name, size, sha256),))
        for name, size, sha256 in (
            (
                "ViT-B-32",
                353_976_522,
                "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
            ),
            (
                "ViT-B-16",
                350_837_078,
                "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
            ),
            (
                "ViT-L-14",
                932_768_134,
                "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
            ),
        )
    },
}

FILES: dict[str, File] = {file.name: file for what in PUBLISHED.values() for file in what.files}
# Whose the weights of a family are, by its beginning, where the file itself is none of these.
FAMILIES = {
    "official MaskGIT": OFFICIAL,
    "MaskGIT, ported": PORT,
    "taming": TAMING,
    "LlamaGen": LLAMAGEN,
    "Halton-MaskGIT": HALTON,
}


def by_hash(sha256: str) -> File | None:
    """The published file that has this SHA-256."""
    return next((file for file in FILES.values() if file.sha256 == sha256), None)


def by_name(path: Path) -> File | None:
    """The published file of this name; of an archive's, that of the folder that it is in."""
    archive = FILES.get(f"{path.parent.name}.zip")
    return archive if archive and archive.member == path.name else FILES.get(path.name)


def licence_of(path: Path, sha256: str, family: str) -> str:
    """The licence of a file: what is known of it by its hash or its name, else of its family."""
    file = by_hash(sha256) or by_name(path)
    if file:
        return file.source.licence
    return next(source.licence for start, source in FAMILIES.items() if family.startswith(start))


def identity(name: str, sha256: str) -> str:
    """Whether a file is what was published, as far as its SHA-256 tells: a phrase."""
    same, named = by_hash(sha256), FILES.get(name)
    if same:
        return f"the published file {same.name}, by its SHA-256"
    if named and named.sha256:
        return f"warning: not the file that was published as {name}, whose SHA-256 is another"
    return "no SHA-256 of a published file is on record to compare with"
