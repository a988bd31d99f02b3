"""Pictures from anywhere, safely: every file becomes an upright 8-bit RGB picture, or an error with a reason."""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmdpo_trainers.errors import MmdpoError

MAX_PIXELS = 64_000_000
"""Default limit: 8000 x 8000, under Pillow's own decompression-bomb limits."""

PathLike = str | os.PathLike[str]

_PLAIN_MODES = ("RGB", "L", "1", "P")
_EXIF_ORIENTATION = 0x0112


class PictureError(MmdpoError):
    """A picture that cannot be used. `reason`: missing, outside_image_folder, not_a_picture, truncated or enormous."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Picture:
    """An opened picture."""

    image: Image.Image
    """Upright, 8-bit RGB, alpha laid over white."""
    converted: str | None
    """What was done to it (`CMYK`, `16-bit`, `animated`, `rotated`, `alpha`), or None: the file itself serves any reader."""


def locate_picture(path: PathLike, root: PathLike | None) -> Path:
    """The file of a picture path that may be relative to `root`; with a root, nothing outside it is reached.

    Raises PictureError: outside_image_folder (absolute, `..`, or a symbolic link that leads out) or missing.
    """
    try:
        if root is None:
            file = Path(path).resolve()
        else:
            folder = Path(root).resolve()
            file = (folder / path).resolve()
            if not file.is_relative_to(folder):
                raise PictureError("outside_image_folder", f"{os.fspath(path)!r} leads to {file}, outside {folder}")
        exists = file.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError("missing", f"{os.fspath(path)!r} is not a usable path ({error})") from error
    if not exists:
        raise PictureError("missing", f"{file} is not a file")
    return file


def read_picture(path: PathLike, *, root: PathLike | None = None, max_pixels: int = MAX_PIXELS) -> Picture:
    """Open a picture file; the size is checked before a pixel is decoded. Raises PictureError with a reason.

    `root`: the folder that the path is relative to and may not leave. Pillow refuses pictures above twice
    `PIL.Image.MAX_IMAGE_PIXELS`, whatever `max_pixels` says.
    """
    file = locate_picture(path, root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                if image.width * image.height > max_pixels:
                    size = f"{image.width} x {image.height}"
                    raise PictureError("enormous", f"{file} has {size} pixels, above the limit of {max_pixels}")
                return _upright_rgb(image)
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError("enormous", f"{file}: {error}") from error
    except UnidentifiedImageError as error:
        raise PictureError("not_a_picture", f"{file} is not a picture file that Pillow reads") from error
    # Pillow's decoders raise many kinds for damaged files; each is a damaged file here.
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise PictureError("truncated", f"{file} is damaged or incomplete ({error})") from error


def open_picture(path: PathLike, *, root: PathLike | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`read_picture(...).image`: the upright 8-bit RGB picture."""
    return read_picture(path, root=root, max_pixels=max_pixels).image


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file's bytes, equal for equal pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def is_made(path: PathLike) -> bool:
    """Whether a path is one of a picture that a run made, which is named by its content."""
    file = Path(path)
    return file.parent.name == "images" and re.fullmatch(r"[0-9a-f]{16}", file.stem) is not None


def content_key(data: bytes) -> str:
    """Name of a picture by its content: 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def _upright_rgb(image: Image.Image) -> Picture:
    done = []
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
        done.append("animated")
    image.load()
    mode = image.mode
    rotated = image.getexif().get(_EXIF_ORIENTATION, 1) not in (0, 1)
    if mode in ("I", "F") or mode.startswith("I;16"):
        rgb = _from_deep(image)
        done.append("16-bit")
    elif "transparency" in image.info or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", rgba.size, (255, 255, 255))
        rgb.paste(rgba, mask=rgba.getchannel("A"))
        done.append("alpha")
    else:
        rgb = image.convert("RGB")
        if mode not in _PLAIN_MODES:
            done.append(mode)
    if rotated:
        rgb.getexif()[_EXIF_ORIENTATION] = image.getexif()[_EXIF_ORIENTATION]
        rgb = ImageOps.exif_transpose(rgb)
        done.append("rotated")
    rgb.info.clear()
    return Picture(rgb, "+".join(done) or None)


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey values scaled, not clipped, to 8 bits."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = float(values.max(initial=0.0))
    usual = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    full = next((value for value in usual if top <= value), top)
    grey = np.rint(np.clip(values / full, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
