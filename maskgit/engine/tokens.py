"""Images as tokens, encoded once: a data set for the transformer that fits in memory."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskgit.common import UserError
from maskgit.common.folder import write_tensors
from maskgit.common.progress import meter
from maskgit.engine.data import ImageSet, in_order
from maskgit.engine.order import Order

Encode = Callable[[Tensor], Tensor]  # images (B, 3, H, W) in [0, 1] -> tokens (B, h, w)


class TokenSet:
    """Tokens (M, 2, N) of M images, as they are and mirrored, with their labels and numbers.

    An image that may not be mirrored has the same tokens twice.
    """

    def __init__(self, tokens: Tensor, labels: Tensor, indices: Tensor) -> None:
        self.tokens, self.label_of, self.index_of = tokens, labels, indices
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: list[int], mirrored: list[int]) -> dict[str, Tensor]:
        """A batch: tokens int64 (B, N), label and index int64 (B,)."""
        tokens = self.tokens[rows, mirrored].long()
        return {"tokens": tokens, "label": self.label_of[rows], "index": self.index_of[rows]}


def tokenize(
    images: ImageSet, encode: Encode, device: torch.device, batch_size: int = 64
) -> TokenSet:
    """Encode each usable image of a set once, and once more mirrored where that is allowed."""
    tokens, labels, indices = [], [], []
    with meter(len(images), "tokenizing", "images") as advance:
        for batch in in_order(images, batch_size, images.config.workers):
            picture = batch["image"].to(device).float() / 255  # (B, 3, H, W)
            plain = encode(picture).flatten(1).cpu()  # (B, N)
            both = torch.stack([plain, plain], 1)
            may = [i for i, image in enumerate(batch["index"].tolist()) if images.may_mirror(image)]
            if may:
                both[may, 1] = encode(picture[may].flip(3)).flatten(1).cpu()
            tokens.append(both.int())
            labels.append(batch["label"])
            indices.append(batch["index"])
            advance(len(plain))
    return TokenSet(torch.cat(tokens), torch.cat(labels), torch.cat(indices))


def cached(path: Path, stamp: dict[str, str], make: Callable[[], TokenSet]) -> TokenSet:
    """The tokens in the file `path`, or, without such a file, those that `make` makes, kept there.

    `stamp` says what they depend on: tokenizer, data, size, mirroring. A file with another stamp is
    a UserError: a run that went on with other tokens would quietly learn something else.
    """
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                if file.metadata() == stamp:
                    return TokenSet(*(file.get_tensor(k) for k in ("tokens", "labels", "indices")))
        except SafetensorError:  # cut off while it was written
            path.unlink()
        else:
            raise UserError(
                f"{path} holds tokens of another tokenizer or of other data than this run names: "
                f"give run=ANOTHER_FOLDER, or delete the file if the run may go on with new ones"
            )
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"tokens": made.tokens, "labels": made.label_of, "indices": made.index_of}
    write_tensors(path, content, stamp)
    return made


def token_batches(
    images: TokenSet, batch_size: int, *, seed: int = 0, start_step: int = 0, balanced: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Endless training batches; the batch of a step is a function of (seed, step)."""
    order = Order(images.labels, seed, balanced)
    for step in count(start_step):
        draws = range(step * batch_size, (step + 1) * batch_size)
        mirrored = np.random.default_rng([seed, 0, step]).integers(2, size=batch_size)
        yield images.take([order(draw) for draw in draws], mirrored.tolist())


def fixed_batches(images: TokenSet, batch_size: int, most: int) -> Iterator[dict[str, Tensor]]:
    """`most` images spread evenly over the set, as they are, in the same order at each call."""
    chosen = [i * len(images) // min(most, len(images)) for i in range(min(most, len(images)))]
    for start in range(0, len(chosen), batch_size):
        rows = chosen[start : start + batch_size]
        yield images.take(rows, [0] * len(rows))
