"""Published tokenizers: the tensors of a file, under whatever names, as a VQGAN.

Nothing about a network is copied: its configuration follows from the names and shapes of its
tensors (`vqgan/layouts.py`), and they are renamed, and transposed where flax had written them.
"""

from collections.abc import Mapping

from torch import Tensor

from maskgit.common import UserError
from maskgit.common.published import fill, skeleton
from vqgan.layouts import OFFICIAL, measure, official_names, recognise, their_names
from vqgan.model import VQGAN

# What only training needs: loss networks with taming's discriminator, optimizers' states, and how
# often LlamaGen's codes were used.
BALLAST = (
    *("loss.perceptual_loss.", "loss.discriminator.", "quantize.codebook_used"),
    *("optimizer.", "optimizer_states.", "optimizer/", "opt_state/"),
)


def published(tensors: Mapping[str, Tensor]) -> tuple[str, VQGAN] | None:
    """The family of a published tokenizer and the tokenizer, in fp32 and eval mode.

    `tensors` are those of a file by its own names, nested ones joined with "/" if flax wrote it and
    else with "."; they are not changed. None where they are no tokenizer's. UserError where some
    are missing, of another shape, not of floating point, or neither used nor known as what only
    training needs.
    """
    layout = recognise(tensors)
    if layout is None:
        return None
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(BALLAST)}
    spelt: dict[str, str] = {}  # the file's names by the layout's, where they differ
    if layout is OFFICIAL:
        spelt = official_names(kept)
        port = {name: ours for ours, name in spelt.items()}
        both = spelt.keys() & kept.keys()
        if both:
            raise UserError(f"{layout.family}: {min(both)} stands there under two names")
        kept = {port.get(name, name): _from_flax(name, tensor) for name, tensor in kept.items()}
    what = f"a tokenizer in the layout of {layout.family}"
    config = measure(layout, {name: tuple(tensor.shape) for name, tensor in kept.items()})
    model = skeleton(what, lambda: VQGAN(config))
    names = their_names(layout, config, model.state_dict())
    return layout.family, fill(what, model, names, kept, spelt)


def _from_flax(name: str, tensor: Tensor) -> Tensor:
    """Kernels (height, width, in, out) as (out, in, height, width); anything else as it is."""
    return tensor.permute(3, 2, 0, 1) if name.endswith("/kernel") and tensor.ndim == 4 else tensor
