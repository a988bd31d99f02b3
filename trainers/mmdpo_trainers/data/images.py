"""Pictures from anywhere, safely: every file, and every picture in memory, becomes an upright 8-bit RGB picture, or an error with a reason.

One opener and one set of rules serve all forms a picture comes in, so the same file is the same picture to the model whether it is
given by its path, its bytes, a `data:` URL or as Pillow opened it:

- upright: turned as its EXIF orientation says;
- alpha, and a palette's or colour's transparency, laid over white;
- 16-bit, 32-bit and float grey scaled to 8 bits, not clipped;
- of several frames the first, of a Pillow picture the one it is at;
- other colour spaces converted to RGB by Pillow's fixed formulas. Embedded ICC profiles are not applied: transformers' image
  processors and vLLM do not apply them either, and a trained model is to see what it will be shown when it is used;
- at most `MAX_PIXELS` pixels, unless the caller says otherwise.

A recipe (`data/recipes.py`) is a form of picture too, drawn when it is opened.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mmdpo_trainers.data.outages import is_file, is_outage, outlasting
from mmdpo_trainers.data.recipes import MARK_DIGITS, Recipe, recipe_of
from mmdpo_trainers.errors import MmdpoError
from mmdpo_trainers.files.fingerprint import content_hash

MAX_PIXELS = 64_000_000
"""Default limit: 8000 x 8000, under Pillow's own decompression-bomb limits."""

PathLike = str | os.PathLike[str]

ImageSource = PathLike | bytes | Mapping[str, Any] | Image.Image
"""A file's path, a `data:` URL, a file's bytes, an undecoded `datasets.Image` (`bytes`, or else `path`), a recipe, or a Pillow picture."""

_BASE64_OF_PICTURES = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK")
"""How base64 of JPEG, PNG, GIF, WebP, BMP and TIFF begins."""
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{48,}={0,2}\s*")
_PLAIN_MODES = ("RGB", "L", "1", "P")
_ORIENTATION = ExifTags.Base.Orientation
_ON_ITS_SIDE = (5, 6, 7, 8)
_KEPT_DIGESTS = 200_000


class ImageError(MmdpoError):
    """A picture that cannot be used. `reason`: missing, remote, outside_image_folder, not_a_picture, truncated, enormous or changed."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason.replace('_', ' ')}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Picture:
    """An opened picture."""

    image: Image.Image
    """Upright, 8-bit RGB, alpha laid over white."""
    converted: str | None
    """What was done to it (`CMYK`, `16-bit`, `animated`, `rotated`, `alpha`), or None: the file itself serves any reader."""


@outlasting
def locate_image(path: PathLike, root: PathLike | None) -> Path:
    """The file of a picture path (or `file:` URL) that may be relative to `root`; with a root, nothing outside it is reached.

    Raises ImageError: outside_image_folder (absolute, `..`, or a symbolic link that leads out), missing, or remote.
    """
    path = local_path(path)
    try:
        if root is None:
            file = Path(path).resolve()
        else:
            folder = _resolved(os.fspath(root))
            file = (folder / path).resolve()
            if not file.is_relative_to(folder):
                raise ImageError("outside_image_folder", f"{os.fspath(path)!r} leads to {file}, outside {folder}")
        exists = is_file(file)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ImageError) or is_outage(error):
            raise
        raise ImageError("missing", f"{os.fspath(path)!r} is not a usable path ({error})") from error
    if not exists:
        raise ImageError("missing", f"{file} is not a file")
    return file


@outlasting
def image_exists(path: PathLike) -> bool:
    """Whether the file is there; a file system that fails is waited for."""
    return is_file(path)


@functools.lru_cache(maxsize=16)
def _resolved(folder: str) -> Path:
    """The folder of pictures, which is the same for all of a file."""
    return Path(folder).resolve()


def local_path(path: PathLike) -> PathLike:
    """A path, or the path of a `file:` URL. Raises ImageError (remote) for other addresses: nothing is fetched."""
    if not isinstance(path, str) or not re.match(r"[a-z][a-z0-9+.-]*://", path, re.IGNORECASE):
        return path
    if not path.startswith("file:///"):
        raise ImageError("remote", f"{path[:200]} is an address, and pictures are not fetched; save it, and give the file's path")
    return unquote(urlsplit(path).path)


def embedded_bytes(source: Any) -> bytes | None:
    """The bytes of a picture file that come with the record; None: they are in a file, or it is a Pillow picture.

    Raises ImageError (not_a_picture) for a `data:` URL that holds no base64.
    """
    if isinstance(source, Mapping):
        source = source.get("bytes")
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source) or None
    if not isinstance(source, str) or not source.startswith("data:"):
        return None
    kind, _, data = source.partition(",")
    if not kind.endswith(";base64"):
        raise ImageError("not_a_picture", f"{source[:60]!r} is not a data: URL in base64; write data:image/png;base64,…")
    return base64_bytes(data)


def as_url(source: Any) -> Any:
    """A picture as a `data:` URL where it is base64 alone, a text or the `bytes` of a mapping; any other as it is."""
    text = source.get("bytes") if isinstance(source, Mapping) else source
    if not isinstance(text, str):
        return source
    within = isinstance(source, Mapping) or (text.startswith(_BASE64_OF_PICTURES) and _BASE64.fullmatch(text) is not None)
    return f"data:image;base64,{text}" if within and text else source


def base64_bytes(text: str) -> bytes:
    """The bytes that base64 stands for. Raises ImageError (not_a_picture) where it is something else."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("not_a_picture", f"{text[:60]!r} is not base64 ({error})") from error


@outlasting
def read_image(source: ImageSource, *, root: PathLike | None = None, max_pixels: int = MAX_PIXELS) -> Picture:
    """Open a picture; the size is checked before a pixel is decoded. Raises ImageError with a reason.

    `root`: the folder that a path is relative to and may not leave. Pillow refuses pictures above twice
    `PIL.Image.MAX_IMAGE_PIXELS`, whatever `max_pixels` says.
    """
    if (recipe := recipe_in(source)) is not None:
        return Picture(_drawn(recipe, root, max_pixels), None)
    return _read(_origin(source, root), max_pixels)


def _read(origin: Path | bytes | Image.Image, max_pixels: int) -> Picture:
    with _opened(origin, max_pixels) as image:
        return _upright_rgb(image)


def open_image(source: ImageSource, *, root: PathLike | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`read_image(...).image`: the upright 8-bit RGB picture."""
    return read_image(source, root=root, max_pixels=max_pixels).image


@outlasting
def image_size(source: ImageSource) -> tuple[int, int]:
    """Width and height of the picture that `open_image` gives; what files say of themselves is read, not their pixels."""
    if (recipe := recipe_in(source)) is not None:
        return recipe.size(image_size)
    with _opened(_origin(source, None), MAX_PIXELS) as image:
        # Pillow's TIFF pictures have the size of the upright picture by themselves.
        turned = image.format != "TIFF" and image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
        return (image.height, image.width) if turned else image.size


@outlasting
def image_digest(source: ImageSource, *, opened: dict[str, Image.Image] | None = None) -> str:
    """SHA-256 of what a model sees: size and pixels of the picture that `open_image` gives, in whatever form it comes.

    Files are decoded once as long as they are not written to, and bytes once. `opened`: gets the picture under its digest where
    it had to be decoded, so that a caller who needs its pixels too has them. Of a recipe it is the recipe's own key, which no other picture
    has: it is not drawn, and with `sha256` no file is read.
    """
    if (recipe := recipe_in(source)) is not None:
        return recipe.key(recipe.marks or [image_digest(path) for path in recipe.images])
    origin = _origin(source, None)
    key: tuple[Any, ...] | None = None
    if isinstance(origin, Path):
        key = _state(origin)
    elif isinstance(origin, bytes):
        key = (hashlib.sha256(origin).digest(),)
    if key is not None and key in _digests:
        return _digests[key]
    with _opened(origin, MAX_PIXELS) as image:
        rgb = _upright_rgb(image).image
    digest = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).hexdigest()
    if opened is not None:
        opened[digest] = rgb
    if key is not None:
        _keep(_digests, key, digest)
    return digest


def file_mark(file: Path) -> str:
    """What a recipe says of a file's content; read once as long as the file is not written to."""
    key = _state(file)
    if key not in _marks:
        _keep(_marks, key, content_hash(file)[:MARK_DIGITS])
    return _marks[key]


def recipe_in(source: Any) -> Recipe | None:
    """The recipe that a picture is; None: it is none. Raises ImageError (not_a_picture) for one that is wrong."""
    try:
        return recipe_of(source)
    except ValueError as error:
        raise ImageError("not_a_picture", str(error)) from error


def _drawn(recipe: Recipe, root: PathLike | None, max_pixels: int) -> Image.Image:
    files = {path: locate_image(path, root) for path in recipe.images}
    for path, mark in zip(recipe.images, recipe.marks or (), strict=False):
        if file_mark(files[path]) != mark:
            raise ImageError(
                "changed",
                f"{files[path]} is not the picture that a {recipe.kind} was to be made of (its SHA-256 begins with {file_mark(files[path])}, "
                f"not {mark}); put that one back, or make the prompts anew: --restart augment",
            )
    width, height = recipe.size(lambda path: image_size(files[path]))
    if width * height > max_pixels:
        raise ImageError("enormous", f"a {recipe.kind} of {width} x {height} pixels is above the limit of {max_pixels}")
    # They have been located, and for small pictures that is much of the work.
    pictures = {path: _read(file, max_pixels).image for path, file in files.items()}
    return recipe.draw([pictures[path] for path in recipe.images])


def _state(file: Path) -> tuple[Any, ...]:
    """What changes when a file is written to."""
    state = file.stat()
    return str(file), state.st_mtime_ns, state.st_size


def _keep(kept: dict[tuple[Any, ...], str], key: tuple[Any, ...], value: str) -> None:
    if len(kept) >= _KEPT_DIGESTS:
        kept.pop(next(iter(kept)), None)
    kept[key] = value


_digests: dict[tuple[Any, ...], str] = {}
"""By path, time of the last change and length of a file, or by the hash of bytes."""
_marks: dict[tuple[Any, ...], str] = {}
_WARNINGS = threading.Lock()
"""Warnings are silenced for all threads at once."""


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file's bytes, equal for equal pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def is_made(picture: Any) -> bool:
    """Whether a picture is the path of one that a run made, which is named by its content."""
    if not isinstance(picture, str | os.PathLike):
        return False
    file = Path(picture)
    return file.parent.name == "images" and re.fullmatch(r"[0-9a-f]{16}", file.stem) is not None


def content_key(data: bytes) -> str:
    """Name of a picture by its content: 16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def _origin(source: Any, root: PathLike | None) -> Path | bytes | Image.Image:
    """Where the picture is. Raises ImageError for what is no form of a picture, or a file that is not there."""
    if isinstance(source, Image.Image):
        return source
    data = embedded_bytes(source)
    if data is not None:
        return data
    path = source.get("path") if isinstance(source, Mapping) else source
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ImageError(
            "not_a_picture",
            f"expected a path, a file's bytes or a Pillow picture, got {type(source).__name__} {str(source)[:60]!r}",
        )
    return locate_image(path, root)


@contextlib.contextmanager
def _opened(origin: Path | bytes | Image.Image, max_pixels: int) -> Iterator[Image.Image]:
    """The picture before a pixel of it is decoded; what Pillow raises then and while it is worked with becomes an ImageError."""
    name = _name(origin)
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(origin, Image.Image):
                image = origin
            else:
                # Pillow warns of large pictures as it opens them; which are too large is said below.
                with _WARNINGS, warnings.catch_warnings():
                    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                    image = stack.enter_context(Image.open(io.BytesIO(origin) if isinstance(origin, bytes) else origin))
            size = f"{image.width} x {image.height}"
            if not image.width or not image.height:
                raise ImageError("not_a_picture", f"{name} has {size} pixels")
            if image.width * image.height > max_pixels:
                raise ImageError("enormous", f"{name} has {size} pixels, above the limit of {max_pixels}")
            yield image
    except (ImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("enormous", f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("not_a_picture", f"{name} is not a picture file that Pillow reads") from error
    except Exception as error:
        if is_outage(error):
            raise
        # Pillow's decoders raise many kinds for damaged files; each is a damaged file here.
        raise ImageError("truncated", f"{name} is damaged or incomplete ({error})") from error


def _name(origin: Path | bytes | Image.Image) -> str:
    """What errors call a picture."""
    if isinstance(origin, bytes):
        return f"the picture stored in the record ({len(origin)} bytes)"
    if isinstance(origin, Image.Image):
        return str(getattr(origin, "filename", "")) or f"the Pillow picture ({origin.mode}, {origin.width} x {origin.height})"
    return str(origin)


def _upright_rgb(image: Image.Image) -> Picture:
    done = []
    if getattr(image, "n_frames", 1) > 1:
        done.append("animated")
    image.load()
    mode = image.mode
    orientation = image.getexif().get(_ORIENTATION, 1)
    if mode in ("I", "F") or mode.startswith("I;16"):
        rgb = _from_deep(image)
        done.append("16-bit")
    elif "transparency" in image.info or mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("LA").convert("RGBA") if mode == "La" else image.convert("RGBA")
        rgb = Image.new("RGB", rgba.size, (255, 255, 255))
        rgb.paste(rgba, mask=rgba.getchannel("A"))
        done.append("alpha")
    else:
        rgb = image.convert("RGB")
        if mode not in _PLAIN_MODES:
            done.append(mode)
    rgb.info.clear()
    if orientation not in (0, 1):
        rgb.getexif()[_ORIENTATION] = orientation
        rgb = ImageOps.exif_transpose(rgb)
        rgb.info.clear()
        done.append("rotated")
    return Picture(rgb, "+".join(done) or None)


def _from_deep(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey values scaled, not clipped, to 8 bits; a transparent value is white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    top = float(values.max(initial=0.0))
    usual = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    full = next((value for value in usual if top <= value), top)
    grey = np.rint(np.clip(values / full, 0, 1) * 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
