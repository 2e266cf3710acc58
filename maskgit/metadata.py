"""What an image was made by, written into its PNG, so that it goes where the image goes."""

import io
import json
from typing import Any

from PIL import Image, PngImagePlugin

KEY = "maskgit"  # the keyword of the text chunk, whose content is JSON


def to_png(picture: Image.Image, record: Any, compress_level: int = 6) -> bytes:
    """The picture as a PNG file with `record` in it."""
    info = PngImagePlugin.PngInfo()
    info.add_text(KEY, json.dumps(record))
    content = io.BytesIO()
    picture.save(content, "PNG", pnginfo=info, compress_level=compress_level)
    return content.getvalue()


def from_png(picture: Image.Image) -> dict[str, Any]:
    """The record of an opened picture; {} of a file that has none, or another's."""
    text = picture.info.get(KEY)
    try:
        record = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        record = None
    return record if isinstance(record, dict) else {}
