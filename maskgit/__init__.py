"""Masked generative image transformers. The names below are imported when first asked for."""

from typing import TYPE_CHECKING

from maskgit.common.lazy import lazy

if TYPE_CHECKING:
    from maskgit.decode import decode as decode
    from maskgit.guidance import guided as guided
    from maskgit.model import MaskGIT as MaskGIT
    from maskgit.model import MaskGITConfig as MaskGITConfig
    from maskgit.pipeline import Pipeline as Pipeline

__version__ = "0.1.0"
__all__ = ["MaskGIT", "MaskGITConfig", "Pipeline", "decode", "guided"]

lazy(
    __name__,
    {
        "MaskGIT": "model",
        "MaskGITConfig": "model",
        "Pipeline": "pipeline",
        "decode": "decode",
        "guided": "guidance",
    },
)
