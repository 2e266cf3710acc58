"""Contrastive image-text learning. The names below are imported when first asked for."""

from typing import TYPE_CHECKING

from maskgit.common.lazy import lazy

if TYPE_CHECKING:
    from clip.config import CLIPConfig as CLIPConfig
    from clip.config import ImageConfig as ImageConfig
    from clip.config import TextConfig as TextConfig
    from clip.model import CLIP as CLIP
    from clip.tokenizer import Tokenizer as Tokenizer

__all__ = ["CLIP", "CLIPConfig", "ImageConfig", "TextConfig", "Tokenizer"]

lazy(
    __name__,
    {
        "CLIP": "model",
        "CLIPConfig": "config",
        "ImageConfig": "config",
        "TextConfig": "config",
        "Tokenizer": "tokenizer",
    },
)
