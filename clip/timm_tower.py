"""Any network of timm as an image tower, with the parameter names of OpenCLIP's `visual`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from clip.config import ImageConfig
from maskgit.common import UserError, nearest, pick


class TimmTower(nn.Module):
    """Pixels (B, 3, H, W), normalised -> (B, E): the network's pooled features, projected."""

    def __init__(self, config: ImageConfig, embed: int) -> None:
        super().__init__()
        self.config = config
        try:
            import timm
        except ImportError:
            raise UserError(
                f"the image tower {config.name} needs timm: pip install 'maskgit[timm]'"
            ) from None
        if not timm.is_model(config.name):
            raise UserError(
                f"timm has no {config.name}: {nearest(config.name, timm.list_models())}"
            )
        pools: dict[str, dict[str, Any]] = {
            "mean": {"global_pool": "avg"},
            "attention": {"global_pool": "map"},
        }
        classes = embed if config.projection == "classifier" else 0
        self.trunk = timm.create_model(
            config.name, num_classes=classes, **pools.get(config.pool, {})
        )
        width: int = classes or self.trunk.num_features  # type: ignore[assignment]
        heads: dict[str, Callable[[], dict[str, nn.Module]]] = {
            "linear": lambda: {"proj": nn.Linear(width, embed, bias=False)},
            "mlp": lambda: {"mlp": Projector(width, embed)},
            "none": lambda: {},
            "classifier": lambda: {},
        }
        self.head = nn.ModuleDict(pick(heads, config.projection, "image.projection")())
        if not self.head and width != embed:
            raise UserError(
                f"{config.name} gives {width} features: embed={embed} needs a projection"
            )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.trunk(pixels)
        for layer in self.head.values():
            x = layer(x)
        return x


class Projector(nn.Module):
    def __init__(self, width: int, embed: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * embed)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(2 * embed, embed, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
