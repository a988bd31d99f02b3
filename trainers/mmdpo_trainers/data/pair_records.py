"""What a preference record (TRL's conversational columns) holds: its name in messages, its texts and its pictures."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from PIL import Image

from mmdpo_trainers.data.content import UnreadContent, check_columns, is_empty
from mmdpo_trainers.data.conversation import (
    TEMPLATE_COLUMNS,
    Conversation,
    Stored,
    Turn,
    extract_prompt,
    read_prompt,
    read_turns,
    with_template_columns,
)
from mmdpo_trainers.data.image_paths import with_paths
from mmdpo_trainers.data.images import ImageError, as_url, embedded_bytes, image_digest, image_size, local_path, open_image
from mmdpo_trainers.data.recipes import is_recipe
from mmdpo_trainers.data.records import IMAGE_TOKEN, check_placeholders
from mmdpo_trainers.errors import DataError

_OTHER_IMAGES = (
    "image",
    "image_path",
    "image_paths",
    "image_url",
    "image_urls",
    "image_bytes",
    "image_base64",
    "picture",
    "pictures",
)
"""Columns that hold pictures elsewhere. Beside `images` all but the first are taken as where its pictures came from."""

_NO_PICTURES = re.compile(r"id|images|prompt|chosen|rejected|rejected_images(_\d+)?")
"""Columns that are not asked whether they hold a picture that is not read."""
_PICTURE_NAME = re.compile(r"data:image/.*|[^\n]*\.(png|jpe?g|webp|gif|bmp|tiff?)", re.IGNORECASE | re.DOTALL)

IMAGES, CORRUPTED = "images", "corrupted"
"""Views that every record has: its images, and these corrupted: by a corruption, or the record's own `rejected_images`. Where there are several
corrupted ones, the others are `corrupted_2`, …, with the columns `rejected_images_2`, …"""


@dataclass(frozen=True)
class Branch:
    """What of a preference record is scored: a response, behind the prompt with some list of images."""

    view: str
    """IMAGES, CORRUPTED or another corrupted view, or a column that holds an image for each of the record's own."""
    response: str
    """A column."""

    def __str__(self) -> str:
        return f"[{self.view}, {self.response}]"


BRANCHES: Mapping[str, Branch] = MappingProxyType(
    {
        "chosen": Branch(IMAGES, "chosen"),
        "rejected": Branch(IMAGES, "rejected"),
        "corrupted": Branch(CORRUPTED, "chosen"),
    }
)
"""The branches that every record has, by name."""
PAIR: Mapping[str, Branch] = MappingProxyType({name: BRANCHES[name] for name in ("chosen", "rejected")})
"""Those that are always scored."""
USUAL_BRANCHES: Mapping[str, Branch] = MappingProxyType(
    {
        "similar_chosen": Branch("similar_images", "similar_chosen"),
        "similar_rejected": Branch("similar_images", "chosen"),
        "exchanged": Branch(IMAGES, "similar_chosen"),
    }
)
"""The columns that losses with further branches are usually given, for messages; a configuration declares them."""


def branch_table(branches: Sequence[str] | Mapping[str, Branch]) -> dict[str, Branch]:
    """Branches by name, of a table that begins with PAIR, or of the names of PAIR or of BRANCHES. ValueError for others."""
    if not isinstance(branches, Mapping):
        if tuple(branches) not in (tuple(PAIR), tuple(BRANCHES)):
            raise ValueError(f"branches: expected {tuple(PAIR)} or {tuple(BRANCHES)}, got {tuple(branches)}")
        return {name: BRANCHES[name] for name in branches}
    if tuple(branches)[: len(PAIR)] != tuple(PAIR) or any(
        branches[name] != BRANCHES.get(name, branches[name]) for name in branches
    ):
        raise ValueError(
            f"branches: expected {', '.join(PAIR)} first, and {', '.join(BRANCHES)} as every record has them, got {dict(branches)}"
        )
    return dict(branches)


def shows_corrupted(branches: Mapping[str, Branch]) -> bool:
    """Whether some branch shows corrupted images."""
    return any(is_corrupted(branch.view) for branch in branches.values())


def corrupted_view(number: int) -> str:
    """Name of the first corrupted view, the second one, …: of the view, and of the branch that is the chosen response under it."""
    return CORRUPTED if number == 1 else f"{CORRUPTED}_{number}"


def is_corrupted(view: str) -> bool:
    """Whether a view is a corrupted one."""
    return re.fullmatch(rf"{CORRUPTED}(_\d+)?", view) is not None


def own_column(view: str) -> str:
    """The column with a record's own images for a corrupted view."""
    return f"rejected_images{view.removeprefix(CORRUPTED)}"


def record_name(record: Mapping[str, Any]) -> str:
    """What error messages call a record."""
    return str(record["id"]) if record.get("id") is not None else f"without id ({str(record.get('prompt'))[:60]}…)"


def record_image(record: Mapping[str, Any], image: Any) -> Image.Image:
    """A picture of the record (see `ImageSource`) as the model sees it; DataError names the record."""
    with _named(record, image):
        return open_image(image)


def record_image_digest(record: Mapping[str, Any], image: Any, *, opened: dict[str, Image.Image] | None = None) -> str:
    """Content key of what the model sees of a picture, and `opened` for what had to be decoded: see `image_digest`."""
    with _named(record, image):
        return image_digest(image, opened=opened)


def record_image_size(record: Mapping[str, Any], image: Any) -> tuple[int, int]:
    """Width and height of a picture as the model sees it; of a file only the header is read."""
    with _named(record, image):
        return image_size(image)


@contextlib.contextmanager
def _named(record: Mapping[str, Any], image: Any) -> Iterator[None]:
    """A picture that cannot be used as a DataError that names the record."""
    try:
        yield
    except (ImageError, OSError) as error:
        name = image.get("path") if isinstance(image, Mapping) else image
        named = isinstance(name, str | os.PathLike) and not str(name).startswith("data:")
        what = f"picture {name}" if named else "a picture"
        raise DataError(f"record {record_name(record)}: {what}: {error}; restore the file, or remove the record") from error


def record_images(record: Mapping[str, Any], column: str = "images") -> list[Any]:
    """The record's `images` (or `image`), or those that parts of its prompt hold; or another column, of pictures or of one.

    DataError for what is no list.
    """
    images = record.get(column)
    within: list[Any] = []
    if column == "images":
        within = _images_within(record)
        _check_other_columns(record, within or images)
        if is_empty(images) and not is_empty(record.get("image")):
            images = record["image"]
            images = list(images) if isinstance(images, list | tuple) else [images]
    if images is None:
        return within
    if column != "images" and isinstance(images, str | os.PathLike | Mapping | Image.Image):
        images = [images]
    if isinstance(images, str) or not isinstance(images, Sequence):
        raise DataError(
            f"record {record_name(record)}: {column} must be a list of pictures, got {str(images)[:120]!r}; "
            f"write [{str(images)[:60]!r}]"
        )
    if within and len(images):
        raise DataError(
            f"record {record_name(record)}: {len(within)} pictures are in parts of the prompt, and {len(images)} in images; leave "
            "one of them"
        )
    return within or list(images)


def _check_other_columns(record: Mapping[str, Any], images: Any) -> None:
    """DataError for pictures in a column that is not read."""
    other = next((name for name in _OTHER_IMAGES if not is_empty(record.get(name))), None)
    if other is None and is_empty(images):
        other = next((name for name, value in record.items() if not _NO_PICTURES.fullmatch(name) and _is_picture(value)), None)
    if other is None or (other == "image") == is_empty(images):
        return
    beside = "" if is_empty(images) else " beside other pictures; leave one of them"
    raise DataError(
        f"record {record_name(record)}: it has `{other}`{beside or ', but pictures are read from `images`; rename it, and make it a list'}"
    )


def _is_picture(value: Any) -> bool:
    """Whether a column of any name holds a picture, or a list of them: by its bytes, or a file's name as pictures have it."""
    if isinstance(value, list | tuple):
        return any(_is_picture(each) for each in value)
    if isinstance(value, Mapping):
        # As `datasets` hold a picture that is not decoded, or as a recipe.
        return is_recipe(value) or set(value) == {"bytes", "path"} and not is_empty(value)
    return isinstance(value, Image.Image) or (isinstance(value, str) and _PICTURE_NAME.fullmatch(value.strip()) is not None)


def _images_within(record: Mapping[str, Any]) -> list[Any]:
    """Pictures that parts of the prompt hold themselves. DataError where some parts do, and others leave it to `images`."""
    with _read(record):
        _, places = read_prompt(extract_prompt(record).get("prompt"))
    within = [part.picture for part in places if part.picture is not None]
    if within and len(within) != len(places):
        raise DataError(
            f"record {record_name(record)}: {len(within)} of the prompt's {len(places)} image parts hold their picture themselves; "
            "let all of them do so, or none, with the pictures in images"
        )
    return within


def record_rejected_images(record: Mapping[str, Any], view: str = CORRUPTED) -> list[Any] | None:
    """The record's own pictures for a corrupted view, one for each of its pictures; None: it has none. DataError otherwise."""
    column = own_column(view)
    found, count = record_images(record, column), len(record_images(record))
    if not found:
        return None
    if len(found) != count:
        raise DataError(
            f"record {record_name(record)}: {column} must hold one picture for each of images ({count}), got {len(found)}; "
            "repeat in it what is not corrupted"
        )
    return found


def view_images(record: Mapping[str, Any], column: str) -> list[Any]:
    """The images that a column has in the places of the record's own. DataError where it has not one for each."""
    found, count = record_images(record, column), len(record_images(record))
    if count and len(found) != count:
        raise DataError(
            f"record {record_name(record)}: {column} must hold one image for each of images ({count}), as a branch shows them, got "
            f"{len(found)}; add them, or leave the branch out"
        )
    return found if count else []


def record_target(record: Mapping[str, Any]) -> int | None:
    """Index of the asked-about one among several pictures; None: not told. DataError where there is no such picture."""
    target, count = record.get("target"), len(record_images(record))
    if target is None or count < 2:
        return None
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < count:
        raise DataError(
            f"record {record_name(record)}: target must be the 0-based index of the asked-about picture, 0 to {count - 1}, got "
            f"{target!r}; correct it, or leave it out"
        )
    return target


def check_record(record: Mapping[str, Any], *, prompts: bool = False) -> None:
    """DataError naming the record where its texts, placeholders or target cannot be used; its pictures are not opened.

    prompts: it may have neither chosen nor rejected.
    """
    check_content(record, () if prompts and is_prompt(record) else ("chosen", "rejected"))
    prompt_text(record)
    record_target(record)
    record_rejected_images(record)


def is_prompt(record: Mapping[str, Any]) -> bool:
    """Whether a record has no responses of its own."""
    return record.get("chosen") is None and record.get("rejected") is None


def check_content(record: Mapping[str, Any], responses: Sequence[str] = ("chosen", "rejected")) -> None:
    """DataError naming the record, the place and the remedy for content that would not be read. Columns of pictures are not looked at."""
    with _read(record):
        check_columns(record, read=TEMPLATE_COLUMNS)
        with_template_columns(Conversation(read_prompt(extract_prompt(record).get("prompt"))[0]), record)
    for column in responses:
        response_turn(record, column)


def with_images_from(record: Mapping[str, Any], folder: str | os.PathLike[str], *, views: Sequence[str] = ()) -> dict[str, Any]:
    """The record with all its pictures in their columns, none in parts of the prompt or in `image`, the prompt in a column of its own, and
    paths that are relative to `folder` absolute.

    views: columns of pictures beside `images` and `rejected_images`.
    """
    with _read(record):
        explicit = extract_prompt(record)
    found = {**explicit, "images": record_images(record)}
    if _images_within(record):
        with _read(record):
            found["prompt"] = Conversation(read_prompt(explicit["prompt"])[0]).stored()
    if not is_empty(record.get("image")):
        found.pop("image")
    for column in ("images", "rejected_images", *views):
        if not is_empty(found.get(column)):
            found[column] = [_placed(record, image, folder) for image in record_images(found, column)]
    return found


def _placed(record: Mapping[str, Any], image: Any, folder: str | os.PathLike[str]) -> Any:
    with _named(record, image):
        image = as_url(image)
        if isinstance(image, Image.Image) or embedded_bytes(image) is not None:
            return image
        path = image.get("path") if isinstance(image, Mapping) and not is_recipe(image) else image
        if not is_recipe(path) and not (isinstance(path, str) and path):
            return image
        return with_paths(path, lambda each: os.path.normpath(os.path.join(folder, local_path(each))))


def record_conversation(record: Mapping[str, Any]) -> Conversation:
    """The prompt with one `<image>` for each picture. DataError where they do not match."""
    with _read(record):
        given = extract_prompt(record).get("prompt")
        found = with_template_columns(Conversation(read_prompt(given)[0]), record)
    pictures = len(record_images(record))
    if not found.pictures:
        # TRL's prompts name no place: pictures come first. In messages they are parts; a text has them on lines of their own.
        return found.with_pictures_in_front(pictures, f"{IMAGE_TOKEN}\n" if isinstance(given, str) else IMAGE_TOKEN)
    check_placeholders(record_name(record), found.pictures, pictures)
    return found


def stored_prompt(record: Mapping[str, Any]) -> Stored:
    """`record_conversation` as records hold it: a text, or a list of messages with texts."""
    return record_conversation(record).stored()


def prompt_text(record: Mapping[str, Any]) -> str:
    """`record_conversation` as one text for readers: that of the one user turn, or all turns under their roles."""
    return record_conversation(record).text


def response_turn(record: Mapping[str, Any], column: str) -> Turn:
    """The one assistant's turn in a column of responses. DataError where there is nothing to learn: `chosen` is empty."""
    with _read(record):
        messages = extract_prompt(record, (column,)).get(column)
        turn = Turn("assistant", messages) if isinstance(messages, str) else _one_turn(messages, column)
    if column == "chosen" and not turn.text.strip() and not turn.fields:
        # A rejected response may be empty: models do end at once.
        raise DataError(f"record {record_name(record)}: chosen is empty; give it a text, or remove the record")
    if IMAGE_TOKEN in turn.text:
        raise DataError(
            f"record {record_name(record)}: {column} has {IMAGE_TOKEN}, which stands for a picture; only prompts have pictures, take it out, or "
            "remove the record"
        )
    return turn


def _one_turn(messages: Any, column: str) -> Turn:
    one = isinstance(messages, Sequence) and len(messages) == 1 and isinstance(messages[0], Mapping)
    if not one or messages[0].get("role") != "assistant":
        raise UnreadContent(
            f"{column} must be text or a list of one assistant message, got {str(messages)[:120]}; give it one, or remove the record"
        )
    turns, places = read_turns(messages, column)
    if places:
        content = messages[0]["content"]
        number = next(at for at, part in enumerate(content) if isinstance(part, Mapping) and "text" not in _held(part))
        raise UnreadContent(f"{column}[0]['content'][{number}] is a picture; only prompts have pictures, remove the record")
    return turns[0]


def _held(part: Mapping[str, Any]) -> list[str]:
    return [name for name, value in part.items() if not is_empty(value) and name != "type"]


def response_text(record: Mapping[str, Any], column: str) -> str:
    """The text of `response_turn`, for those who read texts alone: DataError where it has thinking or tool calls beside."""
    turn = response_turn(record, column)
    if turn.fields:
        raise DataError(
            f"record {record_name(record)}: {column} has {', '.join(turn.extras)} beside its content, and texts alone are read here; write it "
            "into the content, or leave the record out"
        )
    return turn.text


@contextlib.contextmanager
def _read(record: Mapping[str, Any]) -> Iterator[None]:
    """Content that is not read as a DataError that names the record."""
    try:
        yield
    except UnreadContent as error:
        raise DataError(f"record {record_name(record)}: {error}") from error
