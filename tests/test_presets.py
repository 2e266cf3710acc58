"""Presets: what is in them, how they go with other settings, and the option of the commands."""

import json
import shutil

import pytest
from conftest import one_line
from test_pipeline import NAMES, SIZE, tiny_transformer, tiny_vqgan
from test_sample_edit import model, photo, run  # noqa: F401 (fixtures)

from maskgit.common import UserError
from maskgit.pipeline import Pipeline
from maskgit.presets import PRESETS, REACHED, presets_for
from maskgit.request import DEFAULTS

MINE = {
    "quick": {"settings": {"steps": 2, "order": "halton", "schedule": "halton", "guidance": 1.0}},
    "maskgit": {"settings": {"steps": 4}, "reached": "FID 1 (a dream)", "note": "none"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with settings of its own and presets."""
    folder = tmp_path_factory.mktemp("preset")
    own = {"steps": 3, "top_k": 5}
    Pipeline(tiny_vqgan(), tiny_transformer(), NAMES, own, MINE).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- what is in them


@pytest.mark.parametrize(
    ("family", "side", "name", "steps", "guidance", "fid"),
    [
        ("official MaskGIT", 16, "maskgit", 8, 0, "FID 6.18, Inception Score 182.1 (Chang"),
        ("official MaskGIT", 32, "maskgit", 12, 0, "FID 7.32, Inception Score 156 (Chang"),
        ("Halton-MaskGIT small", 16, "halton", 32, 1.0, "FID 6.4, Inception Score 255 (README"),
        ("Halton-MaskGIT base", 16, "halton", 32, 0.7, "FID 4.17, Inception Score 263 (README"),
        ("Halton-MaskGIT large", 24, "halton", 32, 0.5, "FID 2.59, Inception Score 281 (README"),
        ("Halton-MaskGIT", 16, "halton", 32, 1.0, "no numbers"),
        ("Halton-MaskGIT large", 16, "halton", 32, 1.0, "no numbers"),
    ],
)
def test_a_family_has_its_preset(family, side, name, steps, guidance, fid):
    presets = presets_for(family, [side, side])
    assert list(presets) == [name]
    settings = presets[name]["settings"]
    assert (settings["steps"], settings["guidance"]) == (steps, guidance)
    assert presets[name]["reached"].startswith(fid)
    note = "no guidance" if name == "maskgit" else f"w = {guidance:g} in (1 + w) cond - w uncond"
    assert note in presets[name]["note"]


def test_presets_are_settings():
    for settings in (*PRESETS.values(), *(changes for changes, *_ in REACHED.values())):
        assert settings.keys() <= DEFAULTS.keys()
    assert presets_for("taming", [16, 16]) == {}
    first = presets_for("official MaskGIT", [16, 16])
    first["maskgit"]["settings"]["steps"] = 1
    assert PRESETS["maskgit"]["steps"] == 8  # the caller's changes are the caller's


# ---------------------------------------------------------------- in a pipeline


def test_a_folder_carries_its_presets(folder, tmp_path):
    pipe = Pipeline.from_pretrained(folder, "cpu", "fp32")
    assert pipe.presets == MINE == json.loads((folder / "presets.json").read_text())
    pipe.save_pretrained(tmp_path)
    assert Pipeline.from_pretrained(tmp_path, "cpu", "fp32").presets == MINE


def test_a_preset_stands_for_all_settings_and_single_ones_override_it(folder):
    pipe = Pipeline.from_pretrained(folder, "cpu", "fp32")
    assert pipe.settings({"preset": "quick"}) == {**DEFAULTS, **MINE["quick"]["settings"]}
    assert pipe.settings({"preset": "quick", "steps": 7, "top_k": None})["steps"] == 7
    assert pipe.settings({"preset": None, "order": None}) == pipe.settings({})
    assert pipe.settings({})["top_k"] == 5
    steps = []
    options = dict(on_step=lambda step, *_: steps.append(step))
    images = pipe.sample(["cat"], preset="quick", **options)
    assert steps == [0, 1]
    assert (images == pipe.sample(["cat"], **pipe.settings({"preset": "quick"}))).all()


def test_unknown_and_damaged_presets_are_told(folder, tmp_path):
    with pytest.raises(UserError) as error:
        Pipeline.from_pretrained(folder, "cpu").settings({"preset": "maskgt"})
    one_line(error, "unknown preset 'maskgt': did you mean 'maskgit'")
    with pytest.raises(UserError) as error:
        Pipeline(tiny_vqgan(), tiny_transformer(), NAMES).settings({"preset": "maskgit"})
    one_line(error, "this model has none", "presets.json")
    copy = shutil.copytree(folder, tmp_path / "copy")
    for content, told in [
        ('{"a": {"settings": {"stepz": 3}}}', "'steps'"),
        ('{"a": {"settings": {"steps": "x"}}}', "steps: 'x' is not of the kind"),
        ('{"a": {"settings": {"steps": 2.5}}}', "steps: 2.5"),
        ('{"a": {"settings": {"guidance": true}}}', "guidance: True"),
        ('{"a": {"settings": {"temperature": [1, "x"]}}}', "temperature"),
        ('{"a": {"settings": {"order": 3}}}', "order: 3"),
        ('{"a": 3}', "no table of presets"),
        ("[]", "no table of presets"),
        ("{", "presets.json"),
    ]:
        (copy / "presets.json").write_text(content)
        with pytest.raises(UserError) as error:
            Pipeline.from_pretrained(copy, "cpu")
        one_line(error, told)


# ---------------------------------------------------------------- the option


def settings_of(folder):
    return json.loads((folder / "metadata.json").read_text())["images"][0]["settings"]


def test_sample_takes_a_preset(run, folder, tmp_path):  # noqa: F811
    common = ("--model", folder, "--class", "cat", "--num", 1, "--preset")
    status, _, err = run("sample", *common, "quick", "--out", "a")
    assert status == 0, err
    found = settings_of(tmp_path / "a")
    assert {**found, **MINE["quick"]["settings"]} == found and found["top_k"] == 0
    more = ("--steps", 3, "--order", "halton-rolled", "--guidance", 0)
    assert run("sample", *common, "quick", *more, "--out", "b")[0] == 0
    found = settings_of(tmp_path / "b")
    assert (found["steps"], found["order"], found["guidance"]) == (3, "halton-rolled", 0)
    assert found["schedule"] == "halton"
    for arguments, told in [
        ((*common, "quik"), "unknown preset 'quik': did you mean 'quick'"),
        (("--preset", "maskgit"), "this model has none"),
        (("--order", "haltn"), "unknown order 'haltn': did you mean 'halton'"),
    ]:
        status, _, err = run("sample", *arguments, "--out", "c.png")
        assert status == 2 and len(err) == 1 and told in err[0], err


def test_edit_takes_a_preset_and_an_order(run, folder):  # noqa: F811
    photo("photo.png", size=(SIZE[1], SIZE[0]))
    common = ("edit", "photo.png", "--box", "2,2,9,9", "--num", 1, "--model", folder)
    for options in (("--preset", "quick"), ("--order", "halton")):
        status, _, err = run(*common, *options)
        assert status == 0, err
    status, _, err = run(*common, "--preset", "quik")
    assert status == 2 and "did you mean 'quick'" in err[0]
