"""Tokenizer + transformer: images from labels, and edits of images.

pipe = Pipeline.from_pretrained("emoji")
images = pipe.sample(["cat-face", 3], seed=0)  # (2, 3, H, W) in [0, 1]
images = pipe.inpaint(images, masks)  # where masks (2, 1, H, W) are 1
images = pipe.outpaint(images, left=20, bottom=5)  # (2, 3, H + 5, W + 20)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskgit import editing
from maskgit.common import UserError, pick
from maskgit.common.device import pick_device, pick_dtype
from maskgit.common.folder import FORMAT_VERSION, find, read_json, write_json
from maskgit.decode import OnStep, decode
from maskgit.fast import fast, stamp
from maskgit.guidance import guided
from maskgit.int8 import check_int8
from maskgit.model import MaskGIT
from maskgit.orders import ORDERS
from maskgit.presets import pick_preset, read_presets
from maskgit.request import Labels, image_seeds, label_ids, merge
from vqgan import VQGAN

# See `inpaint`. Seams around holes in 80 emoji: 0.072 with dilation 0, 0.082 with 1, 0.11 with 2.
DILATE, FEATHER = 0, 2


class Pipeline:
    """Makes and edits images.

    labels: the names of the classes; none makes their numbers the names.
    sampling: settings of this model that differ from `request.DEFAULTS`, and `showcase`, the names
        of classes that show what it can do.
    presets: by name, "settings" to go by in place of `sampling`, and what was reached with them;
        see `maskgit.presets`.

    Raises UserError when the parts do not belong together.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        transformer: MaskGIT,
        labels: Sequence[str] = (),
        sampling: dict[str, Any] | None = None,
        presets: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        codes, config = vqgan.config.codebook_size, transformer.config
        if codes != config.codebook_size:
            sizes = f"{codes} and {config.codebook_size} codes"
            raise UserError(f"tokenizer and transformer do not belong together: {sizes}")
        if labels and len(labels) != config.num_classes:
            raise UserError(f"{len(labels)} labels for a model of {config.num_classes} classes")
        self.vqgan, self.transformer = vqgan.eval(), transformer.eval()
        self.int8 = False  # whether the fast path's large products are computed in it
        self._fast: tuple[Any, MaskGIT] | None = None
        self.labels = [str(name) for name in labels or range(config.num_classes)]
        self.sampling, self.presets = dict(sampling or {}), dict(presets or {})
        self.showcase = self.label_ids(self.sampling.get("showcase", []))
        for preset in [None, *self.presets]:
            self.settings({"preset": preset})

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "emoji",
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
    ) -> Pipeline:
        """Load from a folder that `save_pretrained` wrote, a bundled name or a hub id.

        dtype: "fp32", "bf16", "fp16", or "auto" for the one that this hardware is made for; "int8"
        for that, and int8 in the large products of the transformer, on a processor.
        Raises UserError for a device that is not there, and for a model missing or damaged.
        """
        device = pick_device(device)
        pick_precision(dtype, device)  # what cannot be is told before anything is read
        folder = find(source, revision)
        index = read_json(folder / "model_index.json")
        version = index.get("format_version") if isinstance(index, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(f"{folder}/model_index.json: no format_version {FORMAT_VERSION}")
        vqgan, transformer = VQGAN.from_pretrained(folder), MaskGIT.from_pretrained(folder)
        labels, sampling = read_json(folder / "labels.json"), index.get("sampling") or {}
        if not isinstance(labels, list) or not isinstance(sampling, dict):
            raise UserError(f"{folder}: labels.json is no list of names, or sampling no settings")
        pipe = cls(vqgan, transformer, labels, sampling, read_presets(folder / "presets.json"))
        size = list(pipe.image_size)
        if index.get("image_size", size) != size:
            sizes = f"grid x factor is {size}, not {index['image_size']}"
            raise UserError(f"{folder}: tokenizer and transformer do not belong together: {sizes}")
        return pipe.to(device, dtype)

    def save_pretrained(self, folder: str | Path, half: bool = False) -> None:
        """Write model_index.json, labels.json, presets.json if there are any, vqgan/ and
        transformer/, in fp16 if `half`."""
        folder = Path(folder)
        self.vqgan.save_pretrained(folder / "vqgan", half=half)
        self.transformer.save_pretrained(folder / "transformer", half=half)
        write_json(folder / "labels.json", self.labels)
        if self.presets:
            write_json(folder / "presets.json", self.presets)
        index = dict(sampling=self.sampling, image_size=list(self.image_size))
        write_json(folder / "model_index.json", {"format_version": FORMAT_VERSION, **index})

    def to(self, device: str | torch.device, dtype: str | torch.dtype | None = None) -> Pipeline:
        """Move to a device; with `dtype`, also compute in it. Returns the pipeline itself.

        The codebook stays in fp32, and with fp16 the whole tokenizer, whose activations overflow.
        With int8 the weights stay as they are, and the fast path has copies in int8.
        """
        device = pick_device(device)
        kept = "int8" if self.int8 else self.dtype
        dtype, self.int8 = pick_precision(kept if dtype is None else dtype, device)
        self.transformer.to(device, dtype)
        for name, part in self.vqgan.named_children():
            exact = name == "quantizer" or dtype == torch.float16
            part.to(device, torch.float32 if exact else dtype)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.transformer.parameters()).dtype

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images that the model makes, and of the windows that it edits in."""
        h, w = self.transformer.config.grid
        return h * self.vqgan.config.factor, w * self.vqgan.config.factor

    @torch.no_grad()
    def sample(
        self,
        labels: Labels,
        *,
        seed: int | Sequence[int] = 0,
        batch_size: int = 64,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Tensor:
        """An image for each label: float (B, 3, H, W) in [0, 1], on the pipeline's device.

        labels: class numbers or names; None for no class (always, if the model has no classes).
        seed: image i has the seed `seed + i`; a list gives each its own. The same seed, label and
            settings give the same image, whatever else is in the batch.
        on_step: see `decode`; called for each batch in turn.
        settings: any of `request.DEFAULTS` (see `decode`, `guided` and `orders`), in place of the
            model's own; `preset`, a name in `presets`, stands for all that are not given. 0 for
            `top_k` or `top_p` means none.

        Raises UserError for an unknown class, and for a setting that is unknown or out of range.
        """
        ids, settings = self.label_ids(labels), self.settings(settings)
        seeds = image_seeds(seed, len(ids))
        if not ids or batch_size < 1:
            raise UserError(f"{len(ids)} labels in batches of {batch_size}: take at least 1 each")
        config = self.transformer.config
        images = []
        for part in (slice(i, i + batch_size) for i in range(0, len(ids), batch_size)):
            tokens = torch.full((len(ids[part]), config.tokens), config.mask_id, device=self.device)
            options = dict(settings, seeds=seeds[part], on_step=on_step)
            images.append(self._decode(tokens, ids[part], **options))
        return torch.cat(images)

    @torch.no_grad()
    def inpaint(
        self,
        images: Tensor,
        masks: Tensor,
        labels: Labels = None,
        *,
        seed: int | Sequence[int] = 0,
        dilate: int = DILATE,
        feather: int = FEATHER,
        resize: bool = False,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Tensor:
        """The images painted anew where their masks are set, and the very same pixels elsewhere.

        images: float (B, 3, H, W) in [0, 1], of any size. Others than the model's own are edited
            in windows of that size, one after the other until the mask is filled.
        masks: (B, 1, H, W) or (1, 1, H, W); above 0.5 means paint anew.
        labels: one for all or one for each; None for no class.
        dilate: tokens around the mask that the model may change too, so that the new part meets
            the old one (the old pixels stay all the same).
        feather: pixels inside the mask over which the new part takes on the colours around it.
        resize: fit the image into one window, instead of taking several at its own size.
        seed, on_step, settings: as for `sample`.

        Raises UserError for shapes or values that do not fit, and as `sample` does.
        """
        masks = editing.check(images, masks, dilate, feather)
        ids = self.label_ids(labels)
        ids = ids * len(images) if len(ids) == 1 else ids
        if len(ids) != len(images):
            raise UserError(f"{len(ids)} labels for {len(images)} images: give one, or one each")
        seeds, settings = image_seeds(seed, len(ids)), self.settings(settings)
        factor, mask_id = self.vqgan.config.factor, self.transformer.config.mask_id

        def paint(view: Tensor, unknown: Tensor, rows: list[int], turn: int) -> Tensor:
            tokens = self.vqgan.encode(editing.fill(view, ~unknown)).flatten(1)  # (b, N)
            hidden = editing.token_mask(unknown, factor, dilate).flatten(1)
            tokens = tokens.masked_fill(hidden, mask_id)
            own = [editing.window_seed(seeds[i], turn) for i in rows]
            options = dict(settings, seeds=own, on_step=on_step)
            return self._decode(tokens, [ids[i] for i in rows], **options)

        image, mask = images.to(self.device).float(), masks.to(self.device)
        paint_all = editing.paint_in_one if resize else editing.paint_in_windows
        painted = paint_all(paint, image, mask, self.image_size, factor, feather)
        return torch.where(masks, painted.to(images), images)

    def outpaint(
        self,
        images: Tensor,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        labels: Labels = None,
        **options: Any,
    ) -> Tensor:
        """The images (B, 3, H, W) with so many pixels more on each side, the old ones untouched:
        (B, 3, top + H + bottom, left + W + right). Options as for `inpaint`."""
        return self.inpaint(*editing.extend(images, left, right, top, bottom), labels, **options)

    @torch.no_grad()
    def render(self, tokens: Tensor) -> Tensor:
        """The images (B, 3, H, W) in [0, 1] of tokens (B, N)."""
        return self.vqgan.decode(tokens.view(-1, *self.transformer.config.grid)).float()

    def settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """How to decode, in full: `given`, else those of the preset that it names or, where it
        names none, this model's own, else the default."""
        own = {name: value for name, value in self.sampling.items() if name != "showcase"}
        preset = given.get("preset")
        if preset is not None:
            own = pick_preset(self.presets, preset)["settings"]
        return merge(own, {name: value for name, value in given.items() if name != "preset"})

    def label_ids(self, labels: Labels) -> list[int | None]:
        """Class numbers of labels given in any form; UserError for one that the model lacks."""
        ids = label_ids(labels, self.labels)
        config = self.transformer.config
        if None in ids and config.num_classes and config.null_label is None:
            raise UserError("this model was trained without label dropout: it needs a class")
        return ids

    def fast(self) -> MaskGIT:
        """The transformer as decoding needs it (see `maskgit.fast`), made anew after changes."""
        compiled = self.transformer._compiled_call_impl is not None
        current = self.int8, compiled, stamp(self.transformer)
        if self._fast is None or self._fast[0] != current:
            self._fast = current, fast(self.transformer, self.int8)
        return self._fast[1]

    def _decode(self, tokens: Tensor, ids: Sequence[int | None], **options: Any) -> Tensor:
        """Fill in the masked ones of `tokens` (B, N), and render the images (B, 3, H, W)."""
        config = self.transformer.config
        numbers = [config.null_label if i is None else i for i in ids]
        classless = all(i is None for i in ids)
        labels = None if classless else torch.tensor(numbers, device=self.device)
        scale, shape = options.pop("guidance"), options.pop("guidance_schedule")
        function = guided(self.fast(), labels, scale, shape)
        options |= {name: options[name] or None for name in ("top_k", "top_p")}
        order = pick(ORDERS, options.pop("order"), "order")(config.grid, options["seeds"])
        return self.render(decode(function, tokens, config.mask_id, order=order, **options))


def pick_precision(name: str | torch.dtype, device: torch.device) -> tuple[torch.dtype, bool]:
    """The type called `name`, and whether large products are to be in int8."""
    if name not in ("int8", torch.int8):
        return pick_dtype(name, device), False
    check_int8(device)
    return pick_dtype("auto", device), True
