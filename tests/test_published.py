"""The recipes of the papers: what their headers say, their sizes, and a dry run of each, small."""

import re
import shlex

import pytest
import torch
from conftest import ROOT, pictures
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vgg import cfgs, make_layers

from maskgit import MaskGIT
from maskgit.commands import tokenize, train
from maskgit.commands.main import Parser, main
from maskgit.engine.config import parse_overrides, read_yaml
from maskgit.runs import resolve
from vqgan import VQGAN, VQGANConfig
from vqgan.quantizer import QuantizerConfig

FOLDER = ROOT / "configs" / "published"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TOKENIZERS = ["vqgan_maskgit_f16", "vqgan_taming_f16"]
TRANSFORMERS = ["halton_base", "maskgit_imagenet256", "maskgit_imagenet512"]
CLIPS = [name for name in NAMES if name.startswith(("clip", "siglip"))]


def header(name):
    """The comments that a config begins with, without their marks."""
    text = (FOLDER / f"{name}.yaml").read_text()
    lines = text[: text.index("\ntask:")].splitlines()
    assert all(line.startswith("#") for line in lines)
    return "\n".join(line[1:].removeprefix(" ") for line in lines)


def described(name, *settings):
    return resolve(read_yaml(FOLDER / f"{name}.yaml", []), parse_overrides(settings), False)[0]


def commands(name):
    """The command lines in a header, each whole and as words."""
    joined = re.sub(r"\\\n\s+", "", header(name))
    lines = [line.strip() for line in joined.splitlines() if line.startswith("  ")]
    return [shlex.split(line) for line in lines if line.startswith(("maskgit ", "torchrun "))]


def test_every_recipe_is_looked_at():
    assert sorted([*TOKENIZERS, *TRANSFORMERS, *CLIPS]) == NAMES and len(CLIPS) == 11


@pytest.mark.parametrize("name", NAMES)
def test_headers_name_source_result_hardware_and_deviations(name):
    text = header(name)
    for what in ("Source: ", "Reached: ", "Hardware: ", "Never run here."):
        assert re.search(f"^{re.escape(what)}", text, re.M), what
    same = (
        name == "clip_laion400m_vit_b32"
    )  # trained with the code that our losses are tested against
    assert ("Apart from the paper:" in text) != same
    assert max(map(len, text.splitlines())) <= 104
    assert described(name).run == f"runs/{name}"


@pytest.mark.parametrize("name", [*TOKENIZERS, *TRANSFORMERS])
def test_headers_have_commands_for_one_gpu_and_for_several_nodes(name):
    text, found = header(name), commands(name)
    assert re.search(r"^One GPU", text, re.M) and re.search(r"^Several nodes", text, re.M)
    kinds = [(words[0], "tokenize" in words) for words in found]
    expected = [("maskgit", False), ("torchrun", False)]
    if name in TRANSFORMERS:  # tokens first
        expected = [(program, first) for program, _ in expected for first in (True, False)]
    assert kinds == expected
    for words in found:
        if words[0] == "torchrun":
            launcher, words = words[: words.index("-m")], words[words.index("-m") + 1 :]
            assert int(launcher[launcher.index("--nnodes") + 1]) > 1
            processes = 2 * int(launcher[launcher.index("--nproc_per_node") + 1])
            assert described(name).train.batch_size % processes == 0
        command, *rest = words[1:]
        if rest == ["(as", "above)"]:
            continue
        parser = Parser(command, "", "")
        {"tokenize": tokenize, "train": train}[command].add_arguments(parser)
        parser.check_options(rest)
        args = parser.parse_intermixed_args(rest)
        if command == "tokenize":
            run = described(name)
            assert str(args.out) == run.data.path and list(args.size) == run.data.size
            assert (args.no_mirror != []) == run.data.mirror
            assert args.heldout == run.data.heldout
        else:
            assert args.config == f"published/{name}"
            config = described(name, *args.settings).train
            assert config.batch_size % (config.micro_batch or config.batch_size) == 0


def macs(network, *inputs):
    """Multiplications of a pass, without computing any."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "weights", "multiplications"),
    [("vqgan_taming_f16", 72.1e6, 196e9), ("vqgan_maskgit_f16", 54.5e6, 158e9)],
)
def test_tokenizers_have_their_published_size(name, weights, multiplications):
    run = described(name)
    assert run.model.factor == 16 and run.model.codebook_size == 1024
    with torch.device("meta"):
        model, image = VQGAN(run.model), torch.rand(1, 3, *run.data.size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(weights, abs=5e4)
    count = macs(lambda x: model.render(model.latents(x)), image)
    assert count == pytest.approx(multiplications, rel=3e-3)


@pytest.mark.parametrize(
    ("name", "codes", "weights"),
    [
        ("maskgit_imagenet256", 1024, 172.5e6),
        ("maskgit_imagenet512", 1024, 173.0e6),
        ("halton_base", 16384, 142e6),
    ],
)
def test_transformers_have_their_published_size(name, codes, weights):
    run = described(name)
    run.model.codebook_size, run.model.num_classes = codes, 1000
    run.model.grid = [side // 16 for side in run.data.size]
    run.model.has_null_label = run.loss.label_dropout > 0
    with torch.device("meta"):
        model = MaskGIT(run.model)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(weights, rel=5e-3 if name == "halton_base" else 3e-4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of captioned pictures in two classes, VGG's weights in a file, and tokenizers of
    factor 16, whose codes are as many and as wide as the recipes'."""
    folder = tmp_path_factory.mktemp("published")
    for i, (name, content) in enumerate(pictures(24)):
        path = folder / "photos" / "ab"[i % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_text(f"drawing number {i}")
    torch.manual_seed(0)
    trunk = make_layers(cfgs["D"], batch_norm=False)
    state = {f"features.{name}": tensor for name, tensor in trunk.state_dict().items()}
    torch.save(state, folder / "vgg16.pth")
    shape = dict(channels=4, mult=[1, 1, 2, 2, 4], encoder_blocks=1, decoder_blocks=1, groups=4)
    codes = {"maskgit": QuantizerConfig(1024, 16), "halton": QuantizerConfig(16384, 8, True)}
    for kind, quantizer in codes.items():
        config = VQGANConfig(**shape, z_channels=quantizer.dim, quantizer=quantizer)
        VQGAN(config).save_pretrained(folder / kind)
    return folder


def quarter(name, place):
    """What makes a recipe small: a quarter of its width, one image, data and weights of ours."""
    run = described(name)
    common = [
        f"data.path={place / 'photos'}",
        f"run={place / 'runs' / name}",
        "data.workers=0",
        "data.heldout=0.1",
        "train.device=cpu",
    ]
    if name in TOKENIZERS:
        model = run.model
        return [
            *common,
            "train.batch_size=1",
            f"loss.vgg={place / 'vgg16.pth'}",
            f"model.channels={model.channels // 4}",
            f"model.z_channels={model.z_channels // 4}",
            f"model.quantizer.dim={model.quantizer.dim // 4}",
            f"discriminator.channels={run.discriminator.channels // 4}",
            "data.size=[64, 64]",  # at 256 pixels VGG alone takes half a minute
        ]
    if name in TRANSFORMERS:
        return [
            *common,
            "train.batch_size=1",
            f"tokenizer={place / name.split('_')[0]}",
            f"model.width={run.model.width // 4}",
            f"model.heads={run.model.heads // 4}",
            # 1,024 tokens would take half a minute.
            f"data.size={[min(256, side) for side in run.data.size]}",
        ]
    image, text = run.model.image, run.model.text
    return [
        *common,
        "train.batch_size=2",  # one has nothing to be told apart from
        f"model.embed={run.model.embed // 4}",
        f"model.image.width={image.width // 4}",
        f"model.image.heads={image.heads // 4}",
        f"model.text.width={text.width // 4}",
        f"model.text.heads={text.heads // 4}",
    ]


SOON = [*TOKENIZERS, *TRANSFORMERS, "clip_vit_b32", "siglip_vit_b16"]
LATER = [pytest.param(name, marks=pytest.mark.slow) for name in CLIPS if name not in SOON]


@pytest.mark.parametrize("name", [*SOON, *LATER])
def test_a_dry_run_of_each_at_a_quarter_of_its_width(name, place, capsys):
    status = main(["train", f"published/{name}", "--dry-run", *quarter(name, place)])
    text = "".join(capsys.readouterr())
    assert status == 0, text
    steps = described(name).train.steps
    assert re.search(
        r"^FLOPs a step +\d+(\.\d+)? [GT], forward and backward, [12] images$", text, re.M
    )
    assert re.search(rf"^time to the end .* for {steps:,} steps", text, re.M)
    told = ("peak memory", "images/s", "disk needed", "disk free")
    assert all(re.search(rf"^{what} +\d", text, re.M) for what in told), text
    parts = {"generator", "discriminator"} if name in TOKENIZERS else {"transformer"}
    parts = {"clip"} if name in CLIPS else parts
    assert parts <= set(re.findall(r"^parameters of (\w+) +\d", text, re.M)), text
    assert ("maskgit tokenize does that apart" in text) == (name in TRANSFORMERS)
    assert "warning" not in text
    assert not (place / "runs").exists()
