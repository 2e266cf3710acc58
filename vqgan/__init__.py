"""The image tokenizer. The names below are imported when first asked for."""

from typing import TYPE_CHECKING

from maskgit.common.lazy import lazy

if TYPE_CHECKING:
    from vqgan.model import VQGAN as VQGAN
    from vqgan.model import VQGANConfig as VQGANConfig

__all__ = ["VQGAN", "VQGANConfig"]

lazy(__name__, {"VQGAN": "model", "VQGANConfig": "model"})
