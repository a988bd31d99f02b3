"""What is known of picture files without keeping their pixels: each is decoded once, by several threads where many are asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mmdpo_trainers.data.compose import Size
from mmdpo_trainers.data.images import ImageError, file_mark, image_digest, read_image


class Look(NamedTuple):
    """A file that was decoded. `error`: it cannot be used, and the rest says nothing."""

    size: Size = (0, 0)
    """Of the upright picture, in pixels."""
    mark: str = ""
    """The beginning of the file's SHA-256, see `data/recipes.py`."""
    converted: str | None = None
    """As of a `Picture`."""
    error: tuple[str, str] | None = None
    """Reason and detail of an `ImageError`."""


class Looks:
    """What was seen of files. Pillow decodes and hashing reads without Python's lock, so that threads are enough to use all cores."""

    def __init__(self, *, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self._seen: dict[str, Look] = {}
        self._pool = threads()

    def __contains__(self, path: str) -> bool:
        return path in self._seen

    def __call__(self, path: str) -> Look:
        if path not in self._seen:
            self._seen[path] = self._look(path)
        return self._seen[path]

    def prepare(self, paths: Iterable[str]) -> None:
        """Look at files side by side."""
        new = list(dict.fromkeys(path for path in paths if path not in self._seen))
        self._seen.update(zip(new, self._pool.map(self._look, new), strict=True))

    def _look(self, path: str) -> Look:
        try:
            picture = read_image(path, max_pixels=self.max_pixels)
            return Look(picture.image.size, file_mark(Path(path)), picture.converted)
        except ImageError as error:
            return Look(error=(error.reason, error.detail))

    def close(self) -> None:
        self._pool.shutdown()


def threads() -> ThreadPoolExecutor:
    """One for each core that this process may use."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="looks")


def learn_digests(pictures: Iterable[Any]) -> None:
    """Decode files side by side, after which `image_digest` knows them. What cannot be used says so when it is asked for."""

    def learn(picture: Any) -> None:
        with contextlib.suppress(ImageError, OSError):
            image_digest(picture)

    paths = dict.fromkeys(picture for picture in pictures if isinstance(picture, str | os.PathLike))
    if len(paths) > 1:
        with threads() as pool:
            list(pool.map(learn, paths))
