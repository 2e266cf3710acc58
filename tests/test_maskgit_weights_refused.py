"""Files that are nearly those of a published transformer, and are refused."""

import numpy as np
import pytest
import torch
from conftest import one_line
from straight_transformer import halton_weights, official_weights
from test_maskgit_weights import KEY, QUERY, TABLE, UP, load

from maskgit.common import UserError
from maskgit.model import SIZES, MaskGIT, MaskGITConfig
from maskgit.weights import published


@pytest.mark.parametrize("kind", [official_weights, halton_weights])
def test_every_tensor_is_used(kind):
    arrays = kind()
    for name in arrays.keys() - {"head.weight", TABLE}:  # tied, and what an official file shows
        kept = {other: array for other, array in arrays.items() if other != name}
        with pytest.raises(UserError) as error:
            load(kept, heads=4)
        one_line(error, f"1 missing ({name.removeprefix('params/')})")
    with pytest.raises(UserError) as error:
        load(arrays | {"ema.decay": np.zeros(1)}, heads=4)
    one_line(error, "1 left over (ema.decay)")
    many = {f"x.{i}": np.zeros(1) for i in range(20)}
    with pytest.raises(UserError) as error:
        load(arrays | many, heads=4)
    one_line(error, "20 left over (x.0, ", "and 12 more")


@pytest.mark.parametrize(
    ("kind", "name", "shape", "told"),
    [
        (
            official_weights,
            "params/Embed_0/position_embeddings/embedding",
            (16, 48),
            "15 positions",
        ),
        (official_weights, TABLE, (1001, 48), "1001 rows"),
        (official_weights, TABLE, (1001,), "2 sides"),
        (
            official_weights,
            "params/MlmLayer_0/mlm_bias/bias",
            (2024,),
            "1 of another shape (MlmLayer_0/mlm_bias/bias)",
        ),
        (official_weights, KEY, (48, 2, 24), "1 of another shape"),  # 48 wide, of other heads
        (official_weights, KEY, (48, 0, 12), "1 of another shape"),
        (official_weights, QUERY, (48, 0, 12), "3 sides are expected, none of 0"),
        (official_weights, "params/TransformerLayer_1/Mlp_0/layer_output/bias", (6, 8), "1 of an"),
        (official_weights, UP, (0, 1 << 40), "2 sides are expected, none of 0"),
        (halton_weights, "reg_tokens.weight", (1 << 40, 0), "none of 0"),
        (halton_weights, "transformer.layers.0.ff.w1.weight", (1 << 60, 0), "none of 0"),
        (halton_weights, "cls_emb.weight", (0, 48), "none of 0"),
        (halton_weights, "transformer.layers.200000.x", (1,), "tensors 1 left over"),
        (halton_weights, f"transformer.layers.{'9' * 5000}.x", (1,), "tensors 1 left over"),
        (halton_weights, "pos_emb.weight", (15, 48), "15 positions"),
        (
            halton_weights,
            "transformer.layers.1.ln2.weight",
            (47,),
            "1 of another shape (transformer.layers.1.ln2.weight)",
        ),
        (halton_weights, "head.bias", (20,), "1 of another shape (head.bias)"),
    ],
)
def test_shapes_that_do_not_fit(kind, name, shape, told):
    with pytest.raises(UserError) as error:
        load(kind() | {name: np.zeros(shape, np.float32)}, heads=4)
    one_line(error, told)


@pytest.mark.parametrize(("kind", "name"), [(official_weights, UP), (halton_weights, "head.bias")])
def test_numbers_are_of_floating_point(kind, name):
    arrays = kind()
    with pytest.raises(UserError) as error:
        load(arrays | {name: arrays[name].astype(np.int32)}, heads=4)
    one_line(error, f"1 not of floating point ({name.removeprefix('params/')})")


def test_a_tensor_with_its_root_and_without():
    arrays = official_weights()
    with pytest.raises(UserError) as error:
        load(arrays | {TABLE.removeprefix("params/"): arrays[TABLE]})
    one_line(error, "official MaskGIT", "with params/ and without")


def test_other_files_are_none_of_these():
    own = MaskGIT(MaskGITConfig(12, 3, [3, 5], **SIZES["tiny"])).state_dict()
    for tensors in ({}, own, {"encoder.conv_in.weight": torch.zeros(1)}):
        assert published(tensors) is None
