"""Images and statistics in `.npz` files, as the ADM evaluator and pytorch-fid know them."""

import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as form
from torch import Tensor

from maskgit.common import UserError
from maskgit.engine.images import fit

Size = tuple[int, int]  # height, width


def read_array(path: Path, batch_size: int, size: Size) -> Iterator[Tensor]:
    """`arr_0` of an npz file as uint8 (B, 3, H, W), never all of it in memory."""
    with opened(path) as archive, archive.open("arr_0.npy") as stream:
        count, *shape = read_header(stream, path)
        for start in range(0, count, batch_size):
            each = (min(batch_size, count - start), *shape)
            pixels = np.frombuffer(stream.read(int(np.prod(each))), np.uint8).reshape(each)
            if start + batch_size >= count:
                stream.read()  # to the end, where the checksum is compared
            if each[1:3] != size:
                pixels = np.stack([fit(image, size) for image in pixels])
            yield to_tensor(pixels)


def read_header(stream: IO[bytes], path: Path) -> tuple[int, ...]:
    """The shape N, H, W, 3 of `arr_0`; the stream then stands at the first pixel."""
    readers = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    shape, fortran, dtype = readers[form.read_magic(stream)](stream)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise UserError(
            f"{path}: arr_0 is {dtype} {shape}{', transposed' if fortran else ''}; images are "
            "uint8 (N, height, width, 3): convert it"
        )
    if 0 in shape:
        raise UserError(f"{path}: arr_0 has no images, its shape is {shape}: write it again")
    return shape


def read_labels(path: Path, count: int) -> list[int]:
    with opened(path), np.load(path) as arrays:
        labels = arrays["arr_1"]
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError(
            f"{path}: arr_1 is {labels.dtype} {labels.shape}; classes are whole numbers from 0 on, "
            f"one for each of the {count} images: leave it out or mend it"
        )
    return labels.tolist()


def read_statistics(path: Path) -> tuple[Tensor, Tensor]:
    with opened(path), np.load(path) as arrays:
        mean, covariance = arrays["mu"], arrays["sigma"]
    kinds = mean.dtype.kind + covariance.dtype.kind
    if kinds != "ff" or mean.ndim != 1 or covariance.shape != 2 * mean.shape or not len(mean):
        raise UserError(
            f"{path}: mu is {mean.dtype} {mean.shape} and sigma {covariance.dtype} "
            f"{covariance.shape}; statistics are floats (D) and (D, D): compute them again"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: mu or sigma is not finite: compute them again")
    return torch.from_numpy(mean.astype(float)), torch.from_numpy(covariance.astype(float))


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The file as an archive; whatever is wrong with it is a UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise UserError(f"{path} is not there: check the path") from None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is no complete .npz file of plain arrays ({reason}): fetch or write it again"
        ) from None


def write_npz(path: Path, batches: Iterable[Tensor], count: int, size: Size) -> None:
    """Write `count` images, batches of uint8 (B, 3, H, W), as the ADM evaluator reads them: `arr_0`
    uint8 (N, H, W, 3). As a whole or not at all, with one batch in memory at a time. Raises
    UserError for other images than `count` of `size`, and when the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    shape, written = (count, *size, 3), 0
    try:
        with (
            zipfile.ZipFile(partial, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as stream,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            form.write_array_header_1_0(stream, header)
            for images in batches:
                if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, *size):
                    raise UserError(
                        f"{path}: images of {images.dtype} {tuple(images.shape[1:])} among those "
                        f"of uint8 {(3, *size)}: draw them again"
                    )
                stream.write(images.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
                written += len(images)
        if written != count:
            raise UserError(f"{path}: {written} images instead of {count}: draw them again")
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path} ({reason}): choose another place") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W)."""
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
