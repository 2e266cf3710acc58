"""What a number may be called, from how many images, and what it compares with."""

from copy import deepcopy

import pytest

from maskgit.common import UserError
from maskgit.evaluation.protocol import (
    METRICS,
    apart,
    apportion,
    choose,
    class_counts,
    clip_name,
    is_clip,
    judge,
    least_images,
    title,
    verdict,
)

SIDES = {"count": 50_000, "size": [256, 256], "resized": 0, "jpeg": 0}
ADM = {
    "command": "generator",
    "images": {**SIDES, "name": "run-0", "kind": "folder"},
    "reference": {**SIDES, "count": 10_000, "name": "VIRTUAL.npz", "kind": "adm", "hash": "a"},
    "extractor": {"name": "inception", "sha256": "6726825d" + "0" * 56, "tf32": False},
    "class_counts": {str(i): 50 for i in range(1000)},
    "labels": "balanced",
}


def changed(path, value):
    result = deepcopy(ADM)
    *parents, last = path
    inner = result
    for key in parents:
        inner = inner[key]
    inner[last] = value
    return result


def test_all_conditions_give_the_protocol_its_name():
    assert judge(ADM) == ("adm-50k@256", [])
    assert judge(changed(["labels"], "random"))[0] == "adm-50k@256"  # recorded, not refused


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (["images", "count"], 5000, "n=5,000"),
        (["extractor", "name"], "emoji", "extractor emoji"),
        (["extractor", "sha256"], "f" * 64, "another hash"),
        (["extractor", "tf32"], True, "TF32"),
        (["reference", "kind"], "folder", "not the ADM evaluator's"),
        (["reference", "count"], 189, "not the ADM evaluator's"),
        (["labels"], "labels.txt", "labels labels.txt"),
        (["command"], "images", "became bytes"),
        (["reference", "resized"], 7, "resized reference"),
        (["images", "resized"], 7, "resized images"),
        (["images", "jpeg"], 1, "JPEG files in the images"),
        (["reference", "jpeg"], 1, "JPEG files in the reference"),
        (["class_counts"], {"0": 50_000}, "1 classes"),
        (["class_counts"], None, "classes unknown"),
    ],
)
def test_each_condition_that_does_not_hold_is_named(path, value, reason):
    protocol, reasons = judge(changed(path, value))
    assert protocol is None and len(reasons) == 1 and reason in reasons[0]
    line = verdict({"protocol": protocol, "not_comparable": reasons})
    assert line.startswith("NOT COMPARABLE: ") and reason in line


def test_a_tokenizer_has_a_protocol_of_its_own():
    result = changed(["command"], "tokenizer")
    del result["class_counts"]
    assert judge(result) == ("rfid-50k@256", [])
    result["images"]["count"] = 189
    assert judge(result) == (None, ["n=189"])


CLIPSCORE = {
    "command": "clip-score",
    "extractor": {"name": "ViT-B-32/openai"},
    "clip_score": {
        "convention": "hessel",
        "truncated": 0,
        "not_independent": None,
        "texts": {"kind": "captions"},
    },
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"convention": "percent"}, "convention percent, which fixes no model"),
        ({"texts": {"kind": "class prompts"}}, "class prompts, no captions"),
        ({"truncated": 3}, "3 texts cut"),
        ({"not_independent": "reranked"}, "reranked"),
    ],
)
def test_a_clip_score_has_a_protocol_of_its_own(change, reason):
    assert judge(CLIPSCORE) == ("clipscore-hessel", [])
    protocol, reasons = judge({**CLIPSCORE, "clip_score": CLIPSCORE["clip_score"] | change})
    assert protocol is None and len(reasons) == 1 and reason in reasons[0]
    other = judge({**CLIPSCORE, "extractor": {"name": "emoji"}})
    assert other == (None, ["model emoji is not ViT-B-32/openai"])


def test_names_that_numbers_deserve():
    assert title("fid", "inception", 50_000) == "FID-50K"
    assert "50K" not in title("fid", "inception", 49_999)
    for metric in METRICS:
        for count in (1000, 50_000):
            name = title(metric, "emoji", count)
            assert name.endswith("-emoji")
            assert "FID" not in name and "Inception" not in name and "KID" not in name
    for name in ("clip", "clip-ViT-L-14-336-openai", "clip-ViT-B-32-openai"):
        assert title("kid", name, 50_000) == f"KD-{name}" and is_clip(name)
    assert title("fid", clip_name(""), 500) == "FD-clip"
    assert title("fid", clip_name("ViT-B-32/openai"), 500) == "CLIP-FID (500 images)"
    assert title("fid", clip_name("ViT-L-14-336/openai"), 500) == "FD-clip-ViT-L-14-336-openai"
    assert title("cmmd", clip_name(""), 500) == "CMMD-clip"
    assert title("cmmd", clip_name("ViT-L-14-336/openai"), 500) == "CMMD (500 images)"
    assert title("cmmd", clip_name("ViT-B-32/openai"), 500) == "CMMD-clip-ViT-B-32-openai"
    assert not is_clip("inception") and not is_clip("emoji")
    assert title("is", "emoji", 1) == "IS-emoji" and title("fid", "emoji", 1) == "FD-emoji"


def test_metrics_follow_from_the_number_of_images():
    every, left = choose(None, 50_000, 50_000, 2048, 1008, {})
    assert every == list(METRICS) and left == {}
    some, left = choose(None, 500, 50_000, 2048, 1008, {})
    assert some == ["cmmd", "pr", "dc", "accuracy", "nearest"]
    assert left["fid"] == "needs 2,049 images, and there are 500"
    _, left = choose(None, 50_000, 50_000, 2048, None, {"is": "no classes"})
    assert left == {"is": "no classes"}
    assert least_images("is", 2048, 1008) == 10_080


def test_what_was_asked_for_is_given_or_an_error():
    assert choose(["kid", "pr"], 1000, 1000, 2048, 1008, {}) == (["kid", "pr"], {})
    with pytest.raises(UserError, match="--metrics kid: needs 1,000 images, and there are 999"):
        choose(["kid"], 1000, 999, 2048, 1008, {})
    with pytest.raises(UserError, match="did you mean 'fid'"):
        choose(["fidd"], 1000, 1000, 2048, 1008, {})
    with pytest.raises(UserError, match="no images; leave it out"):
        choose(["kid"], 1000, 1000, 2048, 1008, {"kid": "no images"})


def test_what_makes_results_incomparable_is_listed():
    assert apart([ADM, deepcopy(ADM)]) == []
    assert apart([ADM, changed(["extractor", "sha256"], "f" * 64)])[0].startswith("extractor: ")
    assert apart([ADM, changed(["images", "count"], 5000)]) == ["images: 50000, 5000"]
    assert apart([ADM, changed(["reference", "hash"], "b")]) == ["reference: a, b"]


def test_apportioned_counts_add_up_and_follow_the_weights():
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(7, [0, 5, 2]) == [0, 5, 2]
    assert sum(apportion(1000, [3, 1, 9, 2.5])) == 1000
    assert class_counts([1, 0, 1, None]) == {"0": 1, "1": 2}
    assert class_counts([None, None]) is None
