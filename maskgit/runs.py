"""Training runs: what their configs hold."""

from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig

from clip.config import CLIPConfig
from clip.task import CLIPLossConfig
from maskgit.common import UserError, pick
from maskgit.engine.config import build, merge
from maskgit.engine.data import DataConfig
from maskgit.engine.task import TrainConfig
from maskgit.evaluation.classifier import ClassifierConfig
from maskgit.evaluation.classifier_task import ClassifierLossConfig
from maskgit.model import SIZES, MaskGITConfig
from maskgit.task import MaskGITLossConfig
from vqgan import VQGANConfig
from vqgan.discriminator import DiscriminatorConfig
from vqgan.task import VQGANLossConfig


@dataclass
class Run:
    """What any run's config holds."""

    task: str = "vqgan"
    run: str = "runs/new"  # the run's folder
    init: str | None = None  # a model to start from: folder, bundled name or hub id
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class VQGANRun(Run):
    model: VQGANConfig = field(default_factory=VQGANConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    loss: VQGANLossConfig = field(default_factory=VQGANLossConfig)


@dataclass
class MaskGITRun(Run):
    task: str = "maskgit"
    tokenizer: str = "emoji"  # a folder with a VQGAN, such as RUN/export, or a bundled name
    size: str | None = None  # one of maskgit.model.SIZES
    model: MaskGITConfig = field(default_factory=lambda: MaskGITConfig(**FOLLOWS))
    loss: MaskGITLossConfig = field(default_factory=MaskGITLossConfig)
    sampling: dict[str, Any] = field(default_factory=dict)  # the model's own sampler settings


@dataclass
class ClassifierRun(Run):
    task: str = "classifier"
    model: ClassifierConfig = field(default_factory=ClassifierConfig)
    loss: ClassifierLossConfig = field(default_factory=ClassifierLossConfig)


@dataclass
class CLIPRun(Run):
    task: str = "clip"
    captions: str | None = None  # a table of them; None: they lie beside the images
    model: CLIPConfig = field(default_factory=CLIPConfig)
    loss: CLIPLossConfig = field(default_factory=CLIPLossConfig)


# What of the models' configs is no setting.
FOLLOWS: dict[str, Any] = dict(codebook_size=0, num_classes=0, grid=[0, 0], has_null_label=True)
SCHEMAS = {"vqgan": VQGANRun, "maskgit": MaskGITRun, "classifier": ClassifierRun, "clip": CLIPRun}


def resolve(content: dict[str, Any], overrides: DictConfig, smoke: bool) -> tuple[Any, str]:
    """The run that a YAML file's content and overrides describe, and what its smoke run expects.

    With `smoke`, the file's own `smoke` section of tiny settings comes between the two.
    """
    tiny = dict(content.pop("smoke", None) or {})
    expect = str(tiny.pop("expect", ""))
    if smoke and not tiny:
        raise UserError("this config has no smoke section: it has no tiny settings to try")
    schema = pick(SCHEMAS, str(overrides.get("task", content.get("task"))), "task")
    layers: list[Any] = [content]
    if smoke:
        layers += [tiny, {"run": f"{content.get('run', 'runs/new')}_smoke"}]
    layers.append(overrides)
    sized = []
    for layer in layers:  # a size stands for settings of the model, which its own layer may change
        if size := layer.get("size"):
            sized.append({"model": pick(SIZES, str(size), "size")})
        sized.append(layer)
    run = build(merge(schema, *sized))
    follows = {name: value for name, value in FOLLOWS.items() if hasattr(run.model, name)}
    if schema is not VQGANRun and run.model != replace(run.model, **follows):
        listed = ", ".join(f"model.{name}" for name in follows)
        raise UserError(f"what must follow from tokenizer, data and loss cannot be set: {listed}")
    return run, expect
