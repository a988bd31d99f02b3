"""MVBench (arXiv 2311.17005), with the frames of each video given as pictures.

Its own files (`json/action_sequence.json` of OpenGVLab/MVBench: `video`, `question`, `candidates`, `answer`), or VLMEvalKit's TSV (`task_type`,
`prefix`, and the candidates as text). `video` names a folder of frames, or where a file is named the folder called like it without its suffix;
or the row has `frames`, a list of paths. Of more than 8 frames 8 are shown, the middles of 8 equal parts. Videos are not decoded: who cuts
`start` to `end` out of one gives the frames of that part. Asked as Mantis asks it.
"""

from __future__ import annotations

from pathlib import PurePosixPath

from mmdpo_trainers.suites.choice import ACCURACY, letters, listed, mark_choice
from mmdpo_trainers.suites.reading import text_of
from mmdpo_trainers.suites.suite import BadRow, Layout, Question, Row, Source, Suite

FRAMES = 8
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def _question(row: Row, source: Source) -> Question:
    given = row.get("candidates")
    options = [str(each) for each in given] if isinstance(given, list) else listed(text_of(row, "candidates").strip())
    choices, truth = letters(options), text_of(row, "answer")
    if truth not in options:
        raise BadRow("no_answer", f"expected the answer to be one of {', '.join(options)[:100]}, got {truth[:60]!r}")
    task = str(row.get("task_type", source.file.stem.replace("_", " ")))
    lines = "".join(f"{letter}. {option}\n" for letter, option in choices.items())
    return Question(
        id=f"{source.file.stem}/{source.number}",
        text=f"Question: {text_of(row, 'question')}\n{lines}Answer with the option's letter from the given choices directly.",
        pictures=_frames(row, source),
        answer=list(choices)[options.index(truth)],
        choices=choices,
        groups={"category": [task]},
    )


def _frames(row: Row, source: Source) -> list[bytes | str]:
    if isinstance(given := row.get("frames"), list) and given:
        return [str(frame) for frame in _spread(given)]
    video = PurePosixPath(str(row.get("prefix", "")).strip("/")) / text_of(row, "video")
    folder = source.pictures / video
    if folder.is_file() or not folder.is_dir() and folder.with_suffix("").is_dir():
        video, folder = video.with_suffix(""), folder.with_suffix("")
    if not folder.resolve().is_relative_to(source.pictures.resolve()):
        raise BadRow("outside_image_folder", f"{str(video)!r} leads outside {source.pictures}")
    frames = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _PICTURES) if folder.is_dir() else []
    if not frames:
        raise BadRow(
            "video",
            f"{row['video']!r} is a video, and videos are not decoded: put its frames as pictures into {folder}, in the order of their "
            "names",
        )
    return [str(video / name) for name in _spread(frames)]


def _spread(frames: list[str]) -> list[str]:
    if len(frames) <= FRAMES:
        return frames
    part = len(frames) / FRAMES
    return [frames[int(part / 2 + part * number)] for number in range(FRAMES)]


SUITES = (
    Suite(
        name="mvbench",
        title="MVBench",
        paper="arXiv 2311.17005",
        cited="https://github.com/TIGER-AI-Lab/Mantis/blob/main/mantis/benchmark/mvbench_eval_utils.py",
        layouts=(
            Layout(
                about="MVBench's own files, or VLMEvalKit's TSV",
                columns=frozenset({"question", "candidates", "answer", "video"}),
                question=_question,
            ),
            Layout(
                about="a list of frames", columns=frozenset({"question", "candidates", "answer", "frames"}), question=_question
            ),
        ),
        figures=ACCURACY,
        mark=mark_choice,
        mean_of="category",
    ),
)
