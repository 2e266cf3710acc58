"""A CLIP that scores, reranks or gives features, and what has to be said of it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clip import CLIP
from clip.recipes import recipes
from clip.weights import HUGGINGFACE, OPENCLIP
from maskgit.common.folder import file_hash, find


@dataclass(frozen=True, eq=False)
class ClipModel:
    """A CLIP in fp32 on a device, where it came from, and the SHA-256 of its weights."""

    model: CLIP
    source: str
    sha256: str

    @property
    def published(self) -> str:
        """What published weights are called ("ViT-B-32/openai"), where the hash of the file is
        theirs; "" for others, whatever recipe they carry."""
        recipe = recipes().get(self.model.config.recipe)
        known = recipe and recipe.sha256 and self.sha256.startswith(recipe.sha256)
        return self.model.config.recipe if known else ""

    @property
    def name(self) -> str:
        """What published weights are called, else where they came from."""
        return self.published or self.source

    def describe(self) -> dict[str, Any]:
        """As it stands in metrics.json."""
        recipe = asdict(self.model.config)
        return {"source": self.source, "sha256": self.sha256, "recipe": recipe}


def open_clip_model(source: str, device: torch.device) -> ClipModel:
    """The CLIP that `CLIP.from_pretrained(source)` gives; of bare weights, "FILE@RECIPE". Raises
    UserError as that does."""
    file, _, recipe = source.rpartition("@")
    if not Path(file).expanduser().is_file():
        file, recipe = source, ""
    model = CLIP.from_pretrained(file, recipe=recipe or None).to(device).eval()
    return ClipModel(model, source, file_hash(weights_file(file)))


def weights_file(source: str) -> Path:
    """The file that `CLIP.from_pretrained(source)` takes the weights from, once it has done so."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    named = None if path.is_dir() else recipes().get(source)
    folder = find(named.hub if named else source)
    folder = folder / "clip" if (folder / "clip").is_dir() else folder
    for config, names in (OPENCLIP, HUGGINGFACE):  # ours has the latter's names
        found = [folder / name for name in names if (folder / name).is_file()]
        if found and (folder / config).is_file():
            return found[0]
    raise AssertionError(folder)  # it could not have been loaded
