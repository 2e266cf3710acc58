"""Fine-tuning: a transformer for other classes or another grid than it was trained with."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import one_line
from runs import prepare, run
from test_model import ARCHITECTURES, tiny, tokens_for

from maskgit.common import UserError
from maskgit.model import MaskGIT, MaskGITConfig
from maskgit.resize import class_names, interpolated, resized

OLD = ["cat", "dog", "cow"]


def labels_of(model):
    """The rows of the labels, with what else belongs to each: (rows, D or D + 1)."""
    config, net = model.config, model.net
    if config.architecture == "modern":
        return net.label_embedding.weight
    rows = slice(config.codebook_size, -1)
    return torch.cat([net.token_embedding.weight[rows], net.head_bias[rows, None]], 1)


def changed(source, old=(), new=(), **changes):
    return resized(source, replace(source.config, **changes), old, new)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_stays_is_the_model_itself(architecture):
    source = tiny(architecture)
    for old, new in (([], []), (OLD, OLD), (OLD, []), ([], OLD)):
        model, said = changed(source, old, new)
        assert model is source and said == []
    assert changed(source, dropout=0.5)[0] is source


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_classes_are_kept_by_name(architecture):
    source = tiny(architecture)
    rows, before = labels_of(source), [p.clone() for p in source.parameters()]
    model, said = changed(source, OLD, ["fox", "cow", "cat", "ant"], num_classes=4)
    expected = torch.stack([rows[3], rows[2], rows[0], rows[3], rows[3]])  # 3: no class
    assert torch.equal(labels_of(model), expected)
    assert said == ["of its 3 classes 2 kept, 2 added, which start as no class"]
    assert all(torch.equal(p, q) for p, q in zip(source.parameters(), before, strict=True))

    tokens = tokens_for(source)
    ours = model(tokens, torch.tensor([1, 0]))
    theirs = source(tokens, torch.tensor([2, 3]))
    torch.testing.assert_close(ours, theirs)


def test_the_same_names_in_another_order():
    model, said = changed(tiny(), OLD, ["cow", "cat", "dog"])
    assert torch.equal(labels_of(model), labels_of(tiny())[[2, 0, 1, 3]])
    assert said == ["of its 3 classes 3 kept, 0 added"]


def test_without_names_another_number_of_classes_is_new():
    for old, new in ((OLD, []), ([], ["a", "b", "c", "d"]), ([], [])):
        model, _ = changed(tiny(), old, new, num_classes=4)
        assert torch.equal(labels_of(model), labels_of(tiny())[[3] * 5])
    model, _ = changed(tiny(), OLD, [], num_classes=0)
    assert torch.equal(labels_of(model), labels_of(tiny())[[3]])


def test_a_null_label_comes_and_goes():
    source = tiny("official", has_null_label=False)  # as the published one
    rows = labels_of(source)
    model, said = changed(source, OLD, ["cat", "fox"], num_classes=2, has_null_label=True)
    assert model.config.null_label == 2
    torch.testing.assert_close(labels_of(model), torch.stack([rows[0], rows.mean(0), rows.mean(0)]))
    assert said == [
        "of its 3 classes 1 kept, 1 added, which start as the mean of its classes",
        "a label for no class added, which starts as the mean of its classes",
    ]
    model, said = changed(tiny(), OLD, OLD, has_null_label=False)
    assert torch.equal(labels_of(model), labels_of(tiny())[:3])
    assert said == ["its label for no class left out"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_positions_are_interpolated_in_two_dimensions(architecture):
    source = tiny(architecture)  # of 3 x 5
    model, said = changed(source, grid=[6, 10])
    assert said == ["positions interpolated from 3 x 5 to 6 x 10 tokens"]
    front = 1 if architecture == "official" else 0
    old, new = source.net.position_embedding, model.net.position_embedding
    assert new.shape == (front + 60, 64) and torch.equal(new[:front], old[:front])
    assert model(torch.zeros(1, 60, dtype=torch.int64), torch.tensor([0])).shape == (1, 60, 12)
    assert torch.equal(labels_of(model), labels_of(source))


def test_interpolation_keeps_a_slope_in_each_direction():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    found = interpolated(torch.stack([y, x], -1).flatten(0, 1), [8, 12], [16, 24]).view(16, 24, 2)
    middle = found[4:-4, 4:-4]  # the border has no neighbours to go by
    y, x = torch.arange(4, 12) / 2 - 0.25, torch.arange(4, 20) / 2 - 0.25  # in the old cells
    assert (middle[..., 0] - y[:, None]).abs().max() < 0.06  # the cubic waves a little
    assert (middle[..., 1] - x).abs().max() < 0.06


def test_names_of_a_folder(tmp_path):
    MaskGIT(MaskGITConfig(12, 3, [2, 2], width=8, depth=1, heads=1)).save_pretrained(tmp_path)
    assert class_names(str(tmp_path), 3) == []
    (tmp_path / "labels.json").write_text(json.dumps(["0", "1", "2"]))
    assert class_names(str(tmp_path), 3) == []  # numbers are no names
    (tmp_path / "labels.json").write_text(json.dumps(OLD))
    assert class_names(str(tmp_path), 3) == OLD
    for content, told in (
        ([*OLD, "hen"], "has 4 names for 3 classes"),
        (["cat", "cow", "cat"], "gives the name cat to several"),
        ([1, 2, 3], "no list of names"),
        ({"cat": 1}, "no list of names"),
    ):
        (tmp_path / "labels.json").write_text(json.dumps(content))
        with pytest.raises(UserError) as error:
            class_names(str(tmp_path), 3)
        one_line(error, tmp_path / "labels.json", told)


def test_as_many_classes_of_which_none_has_a_name_in_common(tmp_path):
    """As ImageNet's folders, called n01440764 and so on."""
    (tmp_path / "labels.json").write_text(json.dumps(OLD))
    others = ["n01", "n02", "n03"]
    with pytest.raises(UserError) as error:
        class_names(str(tmp_path), 3, others)
    one_line(error, "none of its 3 classes (cat, ...)", "(n01, ...)", "a copy without labels.json")
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError) as error:
        class_names(str(tmp_path), 3, others)
    one_line(error, way := f"init={tmp_path}/transformer")
    assert class_names(way.removeprefix("init="), 3, others) == []  # which keeps rows by number
    for new in (others[:2], ["n01", "n02", "cow"]):
        assert class_names(str(tmp_path), 3, new) == OLD


def test_train_goes_on_with_other_classes_and_another_grid(tmp_path):
    words = prepare(tmp_path, "maskgit", steps=2)
    status, out, err = run(tmp_path, [*words, "run=one"])
    assert status == 0, out + err
    (tmp_path / "photos" / "left").rename(tmp_path / "photos" / "above")
    changes = ["data.size=[32, 16]", "init=one/export", "run=two"]
    status, out, err = run(tmp_path, [*words, *changes])
    assert status == 0, out + err
    h, w = MaskGIT.from_pretrained(tmp_path / "one" / "export").config.grid
    assert f"init=one/export: positions interpolated from {h} x {w} to {2 * h} x {w} tokens" in out
    assert "init=one/export: of its 2 classes 1 kept, 1 added, which start as no class" in out
    assert MaskGIT.from_pretrained(tmp_path / "two" / "export").config.grid == [2 * h, w]
    status, _, err = run(tmp_path, [*words, *changes[:2], "run=three", "model.width=48"])
    assert status == 2 and "init=one/export: its weights do not fit this model (width: 32" in err
