"""Published tokenizers: the tensors of a file, under whatever names, as a VQGAN.

Nothing about a network is copied: its configuration follows from the names and shapes of its
tensors (`vqgan/layouts.py`), and they are renamed, and transposed where flax had written them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from maskgit.common import UserError
from vqgan.layouts import OFFICIAL, measure, official_names, recognise, their_names
from vqgan.model import VQGAN

# What only training needs: loss networks with taming's discriminator, optimizers' states, and how
# often LlamaGen's codes were used.
BALLAST = ("loss.", "optimizer", "opt_state", "quantize.codebook_used")
LISTED = 8  # names of a kind in an error


def published(tensors: Mapping[str, Tensor]) -> tuple[str, VQGAN] | None:
    """The family of a published tokenizer and the tokenizer, in fp32 and eval mode.

    `tensors` are those of a file by its own names, nested ones joined with "/" if flax wrote it and
    else with "."; they are not changed. None where they are no tokenizer's. UserError where some
    are missing, of another shape, or neither used nor known as what only training needs.
    """
    layout = recognise(tensors)
    if layout is None:
        return None
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(BALLAST)}
    spelt: dict[str, str] = {}  # the file's names by the layout's, where they differ
    if layout is OFFICIAL:
        spelt = official_names(kept)
        port = {name: ours for ours, name in spelt.items()}
        kept = {port.get(name, name): _from_flax(name, tensor) for name, tensor in kept.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    config = measure(layout, shapes)
    with torch.device("meta"):  # no memory and no time for first values
        model = VQGAN(config)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = their_names(layout, config, own)
    expected = {theirs: own[ours] for ours, theirs in names.items()}
    _check(layout.family, expected, shapes, spelt)
    model.to_empty(device="cpu")
    model.load_state_dict({ours: kept[theirs] for ours, theirs in names.items()})
    return layout.family, model.eval()


def _from_flax(name: str, tensor: Tensor) -> Tensor:
    """Kernels (height, width, in, out) as (out, in, height, width); anything else as it is."""
    return tensor.permute(3, 2, 0, 1) if name.endswith("/kernel") and tensor.ndim == 4 else tensor


def _check(
    family: str,
    expected: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    spelt: Mapping[str, str],
) -> None:
    """UserError that lists, by the file's names, what the tensors of a file lack or have beside
    what is expected."""
    there = {name: shapes[name] for name in expected if name in shapes}
    wrong = {
        "missing": [name for name in expected if name not in shapes],
        "of another shape": [name for name, shape in there.items() if shape != expected[name]],
        "left over": [name for name in shapes if name not in expected],
    }
    told = []
    for what, names in wrong.items():
        listed = [spelt.get(name, name) for name in names]
        more = [f"and {len(listed) - LISTED} more"] if len(listed) > LISTED else []
        if listed:
            told.append(f"{len(listed)} {what} ({', '.join(listed[:LISTED] + more)})")
    if told:
        raise UserError(
            f"a tokenizer in the layout of {family}, but of its tensors {', '.join(told)}: "
            "fetch the file again, and pass it as it was published"
        )
