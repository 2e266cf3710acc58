"""Texts that images are compared with: prompts of classes, and the features of any texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit.common import UserError

if TYPE_CHECKING:
    from clip.model import CLIP

AT_ONCE = 256  # texts encoded at a time

Texts = str | Sequence[str]  # one text, or several that mean the same


def several(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def spoken(name: str) -> str:
    """The name of a class as words: "cat-face" is "cat face"."""
    return name.replace("-", " ").replace("_", " ")


def class_prompts(names: Iterable[Texts], templates: Sequence[str] = ("{}",)) -> list[list[str]]:
    """The prompts of each class: each of its names in each template. Raises UserError for a
    template that is none."""
    check_templates(templates)
    return [[t.replace("{}", n) for n in several(name) for t in templates] for name in names]


def check_templates(templates: Sequence[str], where: str = "templates") -> None:
    """Raise UserError unless there are some, each with one place {} for the name."""
    if not templates:
        raise UserError(f"{where}: no template; give one a line, such as 'a photo of a {{}}.'")
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(
                f"{where}: template {template!r} needs {{}} once, where the class name goes"
            )


@torch.no_grad()
def encode_texts(model: CLIP, texts: Sequence[Texts]) -> Tensor:
    """Unit-length features (N, E) on the CPU. Of several texts for one, the mean of their
    unit-length features, brought to unit length again (Radford et al. 2021, section 3.1.4). A text
    that occurs often is encoded once. Raises UserError where there is none."""
    each = [several(own) for own in texts]
    unique = list(dict.fromkeys(text for own in each for text in own))
    if not unique or not all(each):
        raise UserError("there are no texts to compare images with")
    parts = [unique[i : i + AT_ONCE] for i in range(0, len(unique), AT_ONCE)]
    found = torch.cat([model.encode_text(model.tokenize(part)).cpu() for part in parts])
    row = {text: i for i, text in enumerate(unique)}
    rows = torch.tensor([row[text] for own in each for text in own])
    owner = torch.arange(len(each)).repeat_interleave(torch.tensor([len(own) for own in each]))
    total = found.new_zeros(len(each), found.shape[1]).index_add_(0, owner, found[rows])
    return F.normalize(total, dim=1)


def count_cut(model: CLIP, texts: Iterable[Texts]) -> int:
    """How many of the texts are longer than the model's context, so that their ends are cut off."""
    counts = Counter(text for own in texts for text in several(own))
    cut = model.tokenizer.too_long(list(counts))
    return sum(count for count, long in zip(counts.values(), cut, strict=True) if long)
