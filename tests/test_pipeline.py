"""The pipeline on tiny networks with random weights."""

import dataclasses
import json

import pytest
import torch

from maskgit import MaskGIT, MaskGITConfig, Pipeline
from maskgit.common import UserError
from vqgan import VQGAN, VQGANConfig
from vqgan.quantizer import QuantizerConfig

NAMES = ["cat", "dog", "7", "cow"]
SIZE = (16, 24)  # 4 x 6 tokens of 4 x 4 pixels


def tiny_vqgan(codes=32):
    torch.manual_seed(0)
    config = VQGANConfig(
        channels=8,
        mult=[1, 1, 2],
        encoder_blocks=1,
        decoder_blocks=1,
        z_channels=8,
        groups=4,
        quantizer=QuantizerConfig(codebook_size=codes, dim=8),
    )
    vqgan = VQGAN(config)
    torch.nn.init.normal_(vqgan.quantizer.codebook)  # spread out, so that all codes are in use
    return vqgan


def tiny_transformer(codes=32, classes=4, grid=(4, 6), **changes):
    torch.manual_seed(1)
    config = MaskGITConfig(codes, classes, list(grid), width=32, depth=1, heads=2, ffn=32)
    return MaskGIT(dataclasses.replace(config, **changes))


@pytest.fixture(scope="module")
def pipe():
    return Pipeline(tiny_vqgan(), tiny_transformer(), NAMES)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


def pictures(*size, batch=1, seed=0):
    """8-bit images as floats, (B, 3, H, W)."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (batch, 3, *size), generator=random) / 255


def hole(*size, top=3, left=2, height=5, width=7):
    mask = torch.zeros(1, 1, *size)
    mask[..., top : top + height, left : left + width] = 1
    return mask


# ---------------------------------------------------------------- sampling


def test_samples_are_images_that_their_seeds_name(pipe):
    labels, seeds = ["cat", 3, None, "dog", 1], [5, 6, 7, 8, 9]
    images = pipe.sample(labels, seed=5)
    assert images.shape == (5, 3, *SIZE) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert len({image.sum().item() for image in images}) == 5
    in_batches = pipe.sample(labels, seed=seeds, batch_size=2)
    assert torch.allclose(images, in_batches, atol=1e-4)
    backwards = pipe.sample(labels[::-1], seed=seeds[::-1])
    assert torch.allclose(images, backwards.flip(0), atol=1e-4)
    assert not torch.allclose(images, pipe.sample(labels, seed=6), atol=0.01)


def test_labels_have_names_and_numbers(pipe):
    assert pipe.label_ids("cow") == pipe.label_ids(3) == pipe.label_ids(["3"]) == [3]
    assert pipe.label_ids("7") == [2]  # the class of that name
    assert pipe.label_ids(torch.tensor([1, 0])) == [1, 0]
    assert pipe.label_ids([None, "dog"]) == [None, 1]
    with pytest.raises(UserError, match="'cat'"):
        pipe.sample("catt")
    for wrong in (4, -1, "4", [0, 99]):
        with pytest.raises(UserError, match="0 to 3"):
            pipe.sample(wrong)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(stepz=8), "'steps'"),
        (dict(schedule="cosin"), "'cosine'"),
        (dict(steps=0), "steps"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=1.5), "top-p"),
        (dict(guidance=1.0, guidance_schedule="lin"), "'linear'"),
        (dict(seed=[1, 2]), "2 seeds"),
        (dict(batch_size=0), "batches"),
    ],
)
def test_settings_that_make_no_sense_are_refused(pipe, setting, message):
    with pytest.raises(UserError, match=message):
        pipe.sample("cat", **setting)


def test_settings_come_from_the_call_then_the_model_then_the_default():
    pipe = Pipeline(tiny_vqgan(), tiny_transformer(), NAMES, {"steps": 3, "top_k": 5})
    assert pipe.settings({})["steps"] == 3 and pipe.settings({})["schedule"] == "cosine"
    assert pipe.settings({"steps": 2})["steps"] == 2
    assert pipe.settings({"steps": None})["steps"] == 3
    assert pipe.settings({})["top_k"] == 5 and pipe.settings({"top_k": 0})["top_k"] == 0
    without = pipe.settings({"top_k": 0})
    assert pipe.settings(without) == without  # said once or twice
    seen = []
    pipe.sample(["cat"] * 3, batch_size=2, on_step=lambda step, *_: seen.append(step))
    assert seen == [0, 1, 2, 0, 1, 2]
    with pytest.raises(UserError, match="'steps'"):
        Pipeline(tiny_vqgan(), tiny_transformer(), NAMES, {"step": 3})


def test_a_model_without_classes_or_without_null_label():
    pipe = Pipeline(tiny_vqgan(), tiny_transformer(classes=0))
    assert pipe.sample([None] * 2).shape[0] == 2
    assert pipe.inpaint(pictures(*SIZE), hole(*SIZE)).shape == (1, 3, *SIZE)
    with pytest.raises(UserError, match="no classes"):
        pipe.sample([0])
    pipe = Pipeline(tiny_vqgan(), tiny_transformer(has_null_label=False), NAMES)
    assert pipe.sample("cat").shape[0] == 1
    with pytest.raises(UserError, match="dropout"):
        pipe.inpaint(pictures(*SIZE), hole(*SIZE))
    with pytest.raises(UserError, match="dropout"):
        pipe.sample("cat", guidance=1.0)


# ---------------------------------------------------------------- editing


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("size", [SIZE, (15, 21), (9, 40), (61, 50)])
def test_pixels_outside_the_mask_stay_as_they_are(pipe, size, resize):
    images, mask = pictures(*size, batch=2), hole(*size)
    before = images.clone()
    out = pipe.inpaint(images, mask, ["cat", None], feather=2, resize=resize, steps=2)
    assert torch.equal(images, before)
    inside = (mask > 0).expand_as(out)
    assert torch.equal(out[~inside], images[~inside])
    bytes_out, bytes_in = ((x * 255).round().byte() for x in (out, images))
    assert torch.equal(bytes_out[~inside], bytes_in[~inside])
    assert (bytes_out[inside] != bytes_in[inside]).float().mean() > 0.9
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("resize", [False, True])
def test_what_the_mask_hides_plays_no_part(pipe, resize):
    size = (31, 33)
    mask = hole(*size, top=20, left=25, height=11, width=8)  # up to the corner
    image = pictures(*size)
    other = torch.where(mask > 0, 1 - image, image)
    options = dict(labels="cow", seed=3, resize=resize, steps=2)
    assert torch.equal(pipe.inpaint(image, mask, **options), pipe.inpaint(other, mask, **options))


def test_edits_are_named_by_their_seeds_too(pipe):
    size = (33, 40)
    images = pictures(*size, batch=3)
    masks = torch.cat([hole(*size), hole(*size, height=30, width=35), hole(*size, height=0)])
    options = dict(steps=2, guidance=1.0)
    together = pipe.inpaint(images, masks, ["cat", None, 1], seed=4, **options)
    assert torch.equal(together[2], images[2])  # nothing to paint
    for i, label in enumerate(["cat", None, 1]):
        one = slice(i, i + 1)
        alone = pipe.inpaint(images[one], masks[one], label, seed=4 + i, **options)
        assert torch.allclose(alone[0], together[i], atol=1e-4)
    again = pipe.inpaint(images, masks, ["cat", None, 1], seed=14, **options)
    assert not torch.allclose(again, together, atol=0.01)


def test_known_tokens_are_given_to_the_model(pipe):
    image, mask = pictures(*SIZE), hole(*SIZE, top=4, left=8, height=4, width=4)  # one token
    seen = []
    pipe.inpaint(image, mask, dilate=0, steps=1, on_step=lambda *step: seen.append(step))
    [(_, tokens, _, confidence)] = seen
    drawn = confidence[0].isfinite()
    assert drawn.nonzero().flatten().tolist() == [1 * 6 + 2]
    seen.clear()
    pipe.inpaint(image, mask, dilate=1, steps=1, on_step=lambda *step: seen.append(step))
    assert seen[0][3][0].isfinite().sum() == 9
    kept = ~seen[0][3][0].isfinite()
    assert torch.equal(seen[0][1][0, kept], tokens[0, kept])


@pytest.mark.parametrize("margins", [(1, 0, 0, 0), (5, 30, 0, 9), (0, 0, 40, 1), (3, 3, 3, 3)])
def test_outpainting_adds_any_amount_on_any_side(pipe, margins):
    left, right, top, bottom = margins
    images = pictures(17, 30, batch=2)
    out = pipe.outpaint(images, left, right, top, bottom, labels="dog", steps=2)
    assert out.shape == (2, 3, 17 + top + bottom, 30 + left + right)
    assert torch.equal(out[..., top : top + 17, left : left + 30], images)
    painted = torch.ones_like(out, dtype=torch.bool)
    painted[..., top : top + 17, left : left + 30] = False
    assert out[painted].std() > 0 and not torch.equal(out[0], out[1])
    with pytest.raises(UserError, match="adds"):
        pipe.outpaint(images, left=-1)


def test_edits_refuse_what_does_not_fit(pipe):
    image, mask = pictures(*SIZE), hole(*SIZE)
    with pytest.raises(UserError, match="masks"):
        pipe.inpaint(image, mask[..., 1:])
    with pytest.raises(UserError, match="255"):
        pipe.inpaint(image * 255, mask)
    with pytest.raises(UserError, match="2 labels"):
        pipe.inpaint(image, mask, [0, 1])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_computes_and_keeps_pixels(folder, dtype):
    pipe = Pipeline.from_pretrained(folder, "cpu", dtype)
    assert pipe.dtype.itemsize == 2
    assert pipe.vqgan.quantizer.codebook.dtype == torch.float32
    assert pipe.vqgan.encoder.conv_in.weight.dtype == (
        torch.bfloat16 if dtype == "bf16" else torch.float32
    )
    assert pipe.sample(["cat", 1], guidance=1.0).dtype == torch.float32
    images, mask = pictures(20, 40).to(torch.float16), hole(20, 40)
    out = pipe.inpaint(images, mask)
    assert out.dtype == torch.float16
    assert torch.equal(out[:, :, mask[0, 0] == 0], images[:, :, mask[0, 0] == 0])


# ---------------------------------------------------------------- folders


def test_a_saved_pipeline_is_the_same_pipeline(pipe, folder, tmp_path):
    loaded = Pipeline.from_pretrained(folder, "cpu", "fp32")
    assert loaded.labels == NAMES and loaded.image_size == SIZE
    assert torch.equal(loaded.sample(["cat", 3], seed=1), pipe.sample(["cat", 3], seed=1))
    pipe.save_pretrained(tmp_path, half=True)
    halved = Pipeline.from_pretrained(tmp_path, "cpu", "fp32")
    assert halved.dtype == torch.float32
    for part in "vqgan", "transformer":
        sizes = [(f / part / "model.safetensors").stat().st_size for f in (folder, tmp_path)]
        assert sizes[1] < 0.7 * sizes[0]
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "model_index.json",
        "labels.json",
        "config.json",
        "model.safetensors",
    }


def test_parts_that_do_not_belong_together_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="belong together"):
        Pipeline(tiny_vqgan(codes=16), tiny_transformer(), NAMES)
    with pytest.raises(UserError, match="3 labels"):
        Pipeline(tiny_vqgan(), tiny_transformer(), NAMES[:3])
    Pipeline(tiny_vqgan(), tiny_transformer(grid=(6, 6)), NAMES).save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
    with pytest.raises(UserError, match="belong together"):
        Pipeline.from_pretrained(tmp_path)


def test_damaged_folders_are_told(folder, tmp_path):
    def damaged(name, content):
        Pipeline.from_pretrained(folder).save_pretrained(tmp_path)
        if content is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            Pipeline.from_pretrained(tmp_path, "cpu")
        assert "\n" not in str(error.value) and name.rpartition("/")[2] in str(error.value)

    weights = "transformer/model.safetensors"
    whole = (folder / weights).read_bytes()
    foreign = (folder / "vqgan/model.safetensors").read_bytes()
    for content in (None, b"", whole[: len(whole) // 2], b"no weights at all" * 99):
        damaged(weights, content)
    damaged("vqgan/config.json", json.dumps({"format_version": 1, "chanels": 8}).encode())
    damaged("model_index.json", b"{}")
    damaged("labels.json", b"[")
    Pipeline.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / weights).write_bytes(foreign)
    with pytest.raises(UserError, match="do not fit"):
        Pipeline.from_pretrained(tmp_path, "cpu")
    with pytest.raises(UserError, match="no model at"):
        Pipeline.from_pretrained("./nowhere")


def test_a_missing_gpu_is_told(folder):
    with pytest.raises(UserError, match="GPU"):
        Pipeline.from_pretrained(folder, "cuda:99")
