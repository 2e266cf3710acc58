"""A trained transformer for other classes, or another grid of tokens, than it was trained with.

What a new row or position starts from is taken from the old ones; all else stays as it is.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit.common import UserError
from maskgit.common.folder import find, read_json
from maskgit.model import MaskGIT, MaskGITConfig


def class_names(source: str, count: int, new: Sequence[str] = ()) -> list[str]:
    """The names of a model's `count` classes; none where its folder does not tell, or has but
    numbers.

    new: those of the classes to come. Raises UserError where they are as many and share no name,
    since either could be meant then: other classes, or the same ones by names of another kind, as
    ImageNet's folders have. And for a labels.json that is not of these classes.
    """
    folder = find(source)
    path = folder / "labels.json"
    names = read_json(path) if path.is_file() else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is no list of names: import or export the model again")
    if names and len(names) != count:
        raise UserError(f"{path} has {len(names):,} names for {count:,} classes: it is another's")
    if names == [str(i) for i in range(count)]:
        return []
    if twice := [name for name in set(names) if names.count(name) > 1]:
        raise UserError(f"{path} gives the name {min(twice)} to several classes: make them differ")
    if names and len(new) == count and not set(names) & set(new):
        unnamed = folder / "transformer"
        instead = f"init={unnamed}" if unnamed.is_dir() else f"a copy without {path.name}"
        raise UserError(
            f"init={source}: none of its {count:,} classes ({names[0]}, ...) is called as one of "
            f"the data's ({new[0]}, ...): name the folders as {path} does; or, to start the first "
            f"class from its first one and so on, give {instead}"
        )
    return names


def resized(
    source: MaskGIT, config: MaskGITConfig, old: Sequence[str], new: Sequence[str]
) -> tuple[MaskGIT, list[str]]:
    """`source` with the classes and the grid of `config`, and what that changed, a line for each.

    old, new: the names of the classes before and after, empty where they have none. Where both have
    names, a class keeps the row of its name; where not, and they are as many, of its number.
    Another one starts as "no class" or, from a model that has no such label, as the mean of all.
    Positions are interpolated in two dimensions (bicubic). Nothing changed gives `source` itself.
    """
    own = source.config
    after = replace(
        own,
        num_classes=config.num_classes,
        has_null_label=config.has_null_label,
        grid=config.grid,
    )
    rows = label_rows(own, after, old, new)
    if after == own and rows == list(range(own.label_rows)):
        return source, []
    state = dict(source.state_dict())
    extra = {"modern": 0, "official": 1}[own.architecture]  # positions in front: the class token's
    positions = state["net.position_embedding"]
    if after.grid != own.grid:
        image = interpolated(positions[extra:], own.grid, after.grid)
        state["net.position_embedding"] = torch.cat([positions[:extra], image])
    if own.architecture == "modern":
        name = "net.label_embedding.weight"
        state[name] = chosen_rows(state[name], own, rows)
    else:  # in one table: the codes, the labels, the mask
        for name in ("net.token_embedding.weight", "net.head_bias"):
            codes, labels, mask = state[name].split([own.codebook_size, own.label_rows, 1])
            state[name] = torch.cat([codes, chosen_rows(labels, own, rows), mask])
    model = MaskGIT(after)
    model.load_state_dict(state)
    return model.eval(), changes(own, after, rows)


def label_rows(
    own: MaskGITConfig, after: MaskGITConfig, old: Sequence[str], new: Sequence[str]
) -> list[int | None]:
    """For each row of labels to come, the old row that it is; None: one that is new."""
    if old and new:
        number = {name: i for i, name in enumerate(old)}
        rows = [number.get(name) for name in new]
    elif own.num_classes == after.num_classes:
        rows = list(range(own.num_classes))
    else:
        rows = [None] * after.num_classes
    if after.label_rows > after.num_classes:  # the last one is of no class
        rows.append(own.num_classes if own.label_rows > own.num_classes else None)
    return rows


def chosen_rows(labels: Tensor, own: MaskGITConfig, rows: Sequence[int | None]) -> Tensor:
    """The rows of `labels`, (R, ...) or (R,), by number; None is what a new one starts from."""
    has_none = own.label_rows > own.num_classes
    start = labels[-1] if has_none else labels.mean(0)
    return torch.stack([start if row is None else labels[row] for row in rows])


def interpolated(positions: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Embeddings of the positions of a grid, (h * w, D), for those of another: (h' * w', D)."""
    image = positions.T.reshape(1, -1, *old)  # (1, D, h, w)
    image = F.interpolate(image, tuple(new), mode="bicubic", align_corners=False)
    return image[0].flatten(1).T.contiguous()


def changes(own: MaskGITConfig, after: MaskGITConfig, rows: Sequence[int | None]) -> list[str]:
    """What `resized` did, to be told."""
    said = []
    if after.grid != own.grid:
        (h, w), (new_h, new_w) = own.grid, after.grid
        said.append(f"positions interpolated from {h} x {w} to {new_h} x {new_w} tokens")
    kept = sum(row is not None for row in rows[: after.num_classes])
    if rows[: after.num_classes] != list(range(own.num_classes)):
        added = after.num_classes - kept
        begin = "no class" if own.label_rows > own.num_classes else "the mean of its classes"
        start = f", which start as {begin}" if added else ""
        said.append(f"of its {own.num_classes} classes {kept} kept, {added} added{start}")
    if after.null_label is not None and own.null_label is None and own.num_classes:
        said.append("a label for no class added, which starts as the mean of its classes")
    if after.null_label is None and own.null_label is not None:
        said.append("its label for no class left out")
    return said
