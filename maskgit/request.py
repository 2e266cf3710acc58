"""What a caller may ask of a pipeline: labels, seeds, settings, each in several forms."""

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from maskgit.common import UserError, nearest, pick

Label = int | str | None  # a class's number, its name, or no class
Labels = Label | Sequence[Label] | Any  # the Any: a tensor or an array of numbers

# How images are decoded, unless the model's own settings or the call say otherwise.
DEFAULTS: dict[str, Any] = dict(
    steps=8,
    guidance=0.0,
    guidance_schedule="constant",
    schedule="cosine",
    order="confidence",
    temperature=1.0,
    choice_temperature=4.5,
    top_k=0,  # none
    top_p=0,
    start_step=0,
)


def merge(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """DEFAULTS, over them the model's `own`, over these those `given`, where None leaves them be.

    Raises UserError for an unknown name, and for a value of another kind.
    """
    for name, value in (*own.items(), *given.items()):
        pick(DEFAULTS, name, "sampling setting")
        if not of_kind(name, value):
            raise UserError(f"sampling setting {name}: {value!r} is not of the kind that it takes")
    return DEFAULTS | {k: v for some in (own, given) for k, v in some.items() if v is not None}


def of_kind(name: str, value: Any) -> bool:
    """Whether a value is such as a setting takes: a name or a number, or two for a temperature that
    moves; None leaves it be."""
    if value is None or isinstance(DEFAULTS[name], str):
        return isinstance(value, str | None)
    if name == "temperature" and isinstance(value, Sequence):
        return len(value) == 2 and all(isinstance(one, Real) for one in value)
    kind = Integral if name in ("steps", "top_k", "start_step") else Real
    return isinstance(value, kind) and not isinstance(value, bool)


def image_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """The seed of each of `count` images: seed, seed + 1, ..., or those given. Wraps at 64 bits."""
    seeds = [seed + i for i in range(count)] if isinstance(seed, int) else list(seed)
    if len(seeds) != count:
        raise UserError(f"{len(seeds)} seeds for {count} images: give one number, or one each")
    return [(int(s) + 2**63) % 2**64 - 2**63 for s in seeds]


def label_ids(labels: Labels, names: Sequence[str]) -> list[int | None]:
    """The number of each label, one or several in any form, in a model with classes `names`.

    A name wins over a number: where classes are called "0", "1", ..., "1" is the one called so.
    Raises UserError for a label that the model lacks.
    """
    as_list = getattr(labels, "tolist", None)  # of a tensor or an array
    labels = as_list() if as_list else labels
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        labels = [labels]
    return [label_id(label, names) for label in labels]


def label_id(label: Label, names: Sequence[str]) -> int | None:
    """The number of one label; UserError, with the nearest names, for one that the model lacks."""
    if label is None:
        return None
    if not names:
        raise UserError(f"class {label!r}: this model has no classes; leave it out")
    if label in names:
        return names.index(str(label))
    try:
        number = int(label)
    except ValueError:
        raise UserError(f"unknown class {label!r}: {nearest(str(label), names)}") from None
    if not 0 <= number < len(names):
        raise UserError(f"class {number} is out of range: there are 0 to {len(names) - 1}")
    return number
