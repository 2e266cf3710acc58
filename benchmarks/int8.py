"""Products in int8, and bf16: what they gain, and what they change, in logits, tokens and score.

Against fp32, each from the same weights and seeds. `fp32, other seeds` shows what chance changes.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.machine import measure
from benchmarks.sampling import OFFICIAL, afresh, sampled, some_labels
from benchmarks.table import TIMES, Row, number
from maskgit import MaskGIT, Pipeline
from maskgit.common.precision import widen
from maskgit.evaluation.extractors import open_extractor
from maskgit.evaluation.metrics import accuracy
from maskgit.evaluation.sets import open_pixels
from maskgit.evaluation.statistics import Gaussian, frechet
from maskgit.fast import fast

COLUMNS = {**TIMES, "times": number("times", form=".3f"), "value": number("value")}
PRECISIONS = "fp32", "int8", "bf16"
IMAGES = 256  # whose logits are compared
FEW, MANY = 99, 990  # drawings: one of each class, and ten


@torch.no_grad()
def run(full: bool = False) -> Iterator[Row]:
    """The rows of the table."""
    for name, model, batches in (
        ("emoji", MaskGIT.from_pretrained("emoji"), (1, 16)),
        ("official", MaskGIT(OFFICIAL), (1, 4)),
    ):
        yield from times(name, model.eval(), batches)
    pipes = {name: Pipeline.from_pretrained("emoji", "cpu", name) for name in PRECISIONS}
    yield from logits(pipes)
    yield from tokens_and_scores(pipes)


def times(name: str, model: MaskGIT, batches: tuple[int, ...]) -> Iterator[Row]:
    quick, rough = fast(model), fast(model, int8=True)
    for batch in batches:
        labels = some_labels(model, batch).cpu()
        usual, other = (afresh(m, sampled(m, labels)) for m in (quick, rough))
        what = f"{name}, batch {batch}, 8 steps, int8 by fp32"
        yield measure(what, other, limit=None, against=usual)


def logits(pipes: dict[str, Pipeline]) -> Iterator[Row]:
    """Root mean square of the logits' error, by that of the logits about their mean; half-way."""
    images = torch.cat(list(open_pixels("emoji").batches(FEW)))[:IMAGES].float() / 255
    exact = pipes["fp32"]
    tokens = exact.vqgan.encode(images).flatten(1)
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(tokens.shape, generator=generator) < 0.5
    tokens = tokens.masked_fill(masked, exact.transformer.config.mask_id)
    labels = some_labels(exact.transformer, len(tokens)).cpu()
    answers = {name: widen(pipe.fast()(tokens, labels))[masked] for name, pipe in pipes.items()}
    right = answers.pop("fp32")
    size = (right - right.mean(-1, keepdim=True)).square().mean().sqrt()
    for name, given in answers.items():
        error = (given - right).square().mean().sqrt() / size
        yield {"what": f"emoji, error of logits, {name}", "value": error.item()}
        same = (given.argmax(-1) == right.argmax(-1)).float().mean()
        yield {"what": f"emoji, share of equal likeliest tokens, {name}", "value": same.item()}


def tokens_and_scores(pipes: dict[str, Pipeline]) -> Iterator[Row]:
    """Whole drawings: tokens that stay the same, distance to the training drawings, top-1."""
    exact, rough, half = (pipes[name] for name in ("fp32", "int8", "bf16"))
    few = some_labels(exact.transformer, FEW).cpu()
    labels = some_labels(exact.transformer, MANY).cpu()
    drawn = {"fp32": drawings(exact, labels, 0), "int8": drawings(rough, labels, 0)}
    for name, tokens in ("int8", drawn["int8"][0]), ("bf16", drawings(half, few, 0)[0]):
        same = (tokens[:FEW] == drawn["fp32"][0][:FEW]).float().mean()
        yield {
            "what": f"emoji, share of equal tokens, {FEW} drawings, {name}",
            "value": same.item(),
        }
    drawn["fp32, other seeds"] = drawings(exact, labels, MANY)
    extractor = open_extractor("emoji", "cpu")
    real = Gaussian(extractor.dim)
    for batch in open_pixels("emoji").batches(FEW):
        real.update(extractor(batch)[0])
    for name, (_, images) in drawn.items():
        features, answers = extractor((255 * images).round().byte())
        assert answers is not None  # it is a classifier
        fake = Gaussian(extractor.dim).update(features)
        distance = frechet(fake.mean, fake.covariance, real.mean, real.covariance)
        yield {"what": f"emoji, FD-emoji, {MANY} drawings, {name}", "value": distance}
        top = accuracy(answers, labels)
        yield {"what": f"emoji, seen as their class, {MANY} drawings, {name}", "value": top}


def drawings(pipe: Pipeline, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (n, N) and images of these labels, in the model's own settings."""
    last, tokens = pipe.settings({})["steps"] - 1, []

    def keep(step: int, now: Tensor, *state: Tensor) -> None:
        if step == last:
            tokens.append(now)

    images = pipe.sample(labels.tolist(), seed=seed, batch_size=FEW, on_step=keep)
    return torch.cat(tokens), images
