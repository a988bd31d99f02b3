"""The report page of a run folder of invented numbers (report_run.py)."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_run import heat_of, message, prompt, write_run

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.methods import METHODS
from mmdpo_trainers.report import heatmaps
from mmdpo_trainers.report.comparison import PageInputs
from mmdpo_trainers.report.contents import RunContents
from mmdpo_trainers.report.examples import question_of
from mmdpo_trainers.report.examples import text_of as text_of_content
from mmdpo_trainers.report.images import outlined, overlaid, sized
from mmdpo_trainers.report.intervals import Proportion, mean_change, paired_change, paired_difference
from mmdpo_trainers.report.numbers import number
from mmdpo_trainers.report.page import render
from mmdpo_trainers.stages import report
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

LABELS = {"sequence": "Sequence", "grid": "Grid collage", "pip": "Picture in picture", "single": "Single image"}
EVIL = "<script>alert('x')</script>"


def page_of(folder: Path, **options: Any) -> str:
    contents = RunContents.read(folder)
    settings: dict[str, Any] = {"title": "A run", "config": RunConfig(name="a").to_dict(), "heat": heat_of(contents)}
    return render(PageInputs(run=contents, method=METHODS["mia_dpo"], **{**settings, **options}))


def text_of(page: str) -> str:
    body = re.sub(r"<(style|svg|pre)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body))


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "shapes")


@pytest.fixture(scope="module")
def full_page(run_path: Path) -> str:
    return page_of(run_path)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe 1998, Statist. Med. 17:857, table I, method 3 (Wilson).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_published_values(correct: int, total: int, low: float, high: float) -> None:
    interval = Proportion(correct, total)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_interval_contains_its_value_at_both_ends() -> None:
    for total in (1, 7, 60, 400):
        for p in (Proportion(0, total), Proportion(total, total)):
            assert 0 <= p.low <= p.value <= p.high <= 1


def test_no_answers_are_no_proportion() -> None:
    with pytest.raises(ValueError, match="correct/total"):
        Proportion(0, 0)


def test_paired_change_is_of_the_shared_questions_only() -> None:
    before = {"a": True, "b": False, "c": False, "d": True, "x": True}
    after = {"a": True, "b": True, "c": True, "d": False, "y": False}
    change = paired_change(before, after)
    assert change is not None
    assert change.value == pytest.approx(0.25)
    # Two gained and one lost of four, each one more of six: 3/6 and 2/6.
    half = 1.959964 * math.sqrt((3 / 6 + 2 / 6 - (1 / 6) ** 2) / 6)
    assert (change.low, change.high) == pytest.approx((1 / 6 - half, 1 / 6 + half))
    assert paired_change({"a": True}, {"a": True}) is None
    # Twice the same groups: the same mean, by twice the questions.
    twice = mean_change([(before, after)] * 2)
    assert twice is not None and twice.value == pytest.approx(0.25)
    assert twice.high - twice.low == pytest.approx((change.high - change.low) / math.sqrt(2))


@pytest.mark.parametrize(("n", "gain", "loss"), [(20, 0.1, 0.05), (20, 0.3, 0.1), (8, 0.02, 0.02), (40, 0.5, 0.05)])
def test_paired_change_holds_the_truth_as_often_as_it_says(n: int, gain: float, loss: float) -> None:
    """Coverage summed over all outcomes of n questions; models that answer alike are among them, whose interval has a width too."""
    covered = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            same = n - gained - lost
            ways = math.factorial(n) // (math.factorial(gained) * math.factorial(lost) * math.factorial(same))
            first = {str(place): place >= gained for place in range(n)}
            second = {str(place): place < gained or place >= gained + lost for place in range(n)}
            change = paired_change(first, second)
            assert change is not None and change.low <= change.value <= change.high and change.low < change.high
            if change.low <= gain - loss <= change.high:
                covered += ways * gain**gained * loss**lost * (1 - gain - loss) ** same
    assert covered > 0.94


def test_differences_of_numbers_are_paired() -> None:
    """What records differ in among themselves is not in the interval."""
    first = {str(place): 10.0 * place for place in range(6)}
    second = {name: value + 1 + 0.1 * (-1) ** int(name) for name, value in first.items()}
    difference = paired_difference(first, {**second, "other": 1e6})
    half = 1.959964 * 0.1 * math.sqrt(6 / 5) / math.sqrt(6)
    assert difference is not None
    assert (difference.value, difference.low, difference.high) == pytest.approx((1, 1 - half, 1 + half), rel=1e-6)
    assert paired_difference({"a": 1.0}, {"a": 2.0}) is None


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (-1.25, ".1f", "−1.2"),
        (-0.001, "+.2f", "0.00"),
        (0.0, "+.1f", "0.0"),
        (2.5e-8, ".3g", "2.5e−08"),
        (-1234.0, ",.0f", "−1,234"),
    ],
)
def test_numbers_have_one_minus_sign_and_zero_none(value: float, spec: str, text: str) -> None:
    assert number(value, spec) == text


def test_numbers_on_the_page_are_those_of_the_files(run_path: Path, full_page: str) -> None:
    text = text_of(full_page).replace("\N{NO-BREAK SPACE}", " ")
    read = [json.loads(line) for line in (run_path / "evaluate" / "before" / "answers.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in (run_path / "evaluate" / "after" / "answers.jsonl").read_text().splitlines()]
    for format, label in LABELS.items():
        old, new = ([a for a in answers if a["format"] == format] for answers in (read, again))
        shares = [Proportion(sum(a["correct"] for a in group), len(group)) for group in (old, new)]
        cells = [f"{100 * p.value:.1f} % {100 * p.low:.1f}–{100 * p.high:.1f}" for p in shares]
        row = f"{label} {len(old)} {' '.join(cells)}"
        row += f" {100 * (shares[1].value - shares[0].value):+.1f}".replace("-", "−")
        assert row in text
    pairs = (run_path / "select" / "pairs.jsonl").read_text().splitlines()
    dropped = [json.loads(line) for line in (run_path / "select" / "dropped.jsonl").read_text().splitlines()]
    assert f"{len(pairs)} pairs selected from {len(pairs) + len(dropped)} answers" in text
    by_format = [sum(d["rule"] == "ratio" and d["format"] == f for d in dropped) for f in ("sequence", "grid", "pip")]
    failing = sum("ratio" in d["rules"] for d in dropped)
    assert f"ratio: enough attention on the target {' '.join(map(str, by_format))} {sum(by_format)} {failing}" in text
    ratios = [a["ratio"] for a in again if a["format"] == "grid"]
    assert f"{sum(ratios) / len(ratios):.3f}" in text
    assert "train 85.0" in text and "All 116.8" in text


def test_layers_are_drawn_and_said_in_words(run_path: Path, tmp_path: Path, full_page: str) -> None:
    curves = json.loads((run_path / "score" / "layers.json").read_text())
    section = full_page.split('<section id="layers">')[1].split("</section>")[0]
    best = curves["best"]["all"]
    figures = f"layer {best['layer']}, AUC {best['auc']['value']:.2f}, {best['auc']['low']:.2f} to {best['auc']['high']:.2f}"
    assert figures in text_of(section) and "7 unclear whether right" in text_of(section)
    labels = re.findall(r'aria-label="([^"]+)"', section)
    values = [each["value"] for each in curves["auc"]["grid"]]
    assert f"Grid collage: largest {max(values):.2f} at layer {values.index(max(values))}" in labels[0]
    heads = [(value, layer, head) for layer, row in enumerate(curves["heads"]["all"]) for head, value in enumerate(row)]
    assert "largest {:.2f} at layer {}, head {}".format(*max(heads)) in labels[1]
    each = curves["thresholds"]["grid"]["2"]
    assert f"Grid collage, 2 pictures {each['threshold']:.2f} {100 * each['wrong_under']:.1f}" in text_of(section)
    folder = write_run(tmp_path / "run")
    (folder / "score" / "layers.json").unlink()
    assert "One layer was recorded. With score.layer: all" in text_of(page_of(folder)).replace("`", "")


def test_page_needs_nothing_but_itself(full_page: str) -> None:
    assert not re.search(r"https?:|//\w+\.", re.sub(r"data:[^\"]*", "", full_page))
    sources = re.findall(r"\b(?:src|href)=\"([^\"]*)\"", full_page)
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    style = full_page.split("<style>")[1].split("</style>")[0]
    assert "sans-serif" in style and "&" not in style
    assert "<script" not in full_page and "@import" not in full_page and "url(http" not in full_page


def test_pictures_and_plots_are_described(full_page: str) -> None:
    pictures = re.findall(r"<img\b[^>]*>", full_page)
    assert pictures and all(re.search(r'alt="[^"]+"', tag) for tag in pictures)
    plots = re.findall(r"<svg\b[^>]*>", full_page)
    assert len(plots) == 1 + 2 + 3 + 5
    assert all('role="img"' in tag and re.search(r'aria-label="[^"]+"', tag) for tag in plots)
    ids = re.findall(r'\bid="([^"]+)"', full_page)
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'(?:href="|url\()#([^")]+)', full_page))
    assert targets <= set(ids)


def test_both_themes_colour_the_plots(full_page: str) -> None:
    svg = "".join(re.findall(r"<svg\b.*?</svg>", full_page, flags=re.DOTALL))
    used = set(re.findall(r"var\(--(\w+)\)", svg))
    dark = full_page.split("prefers-color-scheme: dark", 1)[1].split("}", 1)[0]
    assert {"ink", "before", "after", "right", "wrong"} <= used and all(f"--{name}:" in dark for name in used)
    assert set(re.findall(r"(?:fill|stroke): (#\w{6})", svg)) == set()


def test_text_of_the_data_is_escaped(run_path: Path) -> None:
    contents = RunContents.read(run_path)
    for record in contents.after + contents.before:
        record["response"] = record["answer"] = record["prompt"] = EVIL
    for record in contents.pairs or []:
        record["prompt"], record["chosen"], record["rejected"] = message("user", EVIL), EVIL, message("assistant", EVIL)
        record["format"] = EVIL
    contents.dropped.append({"id": "x", "format": EVIL, "rule": EVIL})
    contents.scores[0]["format"] = EVIL
    contents.log.append({"step": 300, f"attn/ratio_{EVIL}": 0.5})
    contents.arms[EVIL] = (contents.after, 1)
    config = {"name": EVIL, "model": EVIL}
    page = render(PageInputs(run=contents, method=METHODS["mia_dpo"], title=EVIL, config=config, heat=heat_of(contents), pairs=4))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10


@pytest.mark.parametrize(
    ("missing", "note"),
    [
        ("evaluate", "Run `mmdpo evaluate`"),
        ("score", "Run `mmdpo score`"),
        ("select", "Run `mmdpo select`"),
        ("train", "Run `mmdpo train`"),
        ("arms", "This run has no control arms."),
    ],
)
def test_a_missing_stage_is_a_note(tmp_path: Path, missing: str, note: str, full_page: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / missing).rename(tmp_path / "elsewhere")
    page = page_of(folder)
    assert note in text_of(page)
    assert note not in text_of(full_page)


def test_an_empty_run_folder_is_a_page(tmp_path: Path) -> None:
    assert text_of(page_of(tmp_path)).count("Run `mmdpo") >= 5


def test_only_before_training(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", arms=False)
    (folder / "evaluate" / "after" / "answers.jsonl").unlink()
    text = text_of(page_of(folder))
    assert "before training." in text and "No heat maps" in text


@pytest.mark.parametrize("format", ["sequence", "grid", "single"])
def test_question_is_shown_without_its_picture_placeholders(tmp_path: Path, format: str) -> None:
    text = prompt(tmp_path, format, 3)["prompt"]
    question = text.rsplit("\n", 1)[1]
    assert question_of(text) == question_of(message("user", text)) == question
    assert text_of_content([{"role": "assistant", "content": "red"}]) == text_of_content("red") == "red"


def test_a_missing_picture_is_named_and_survived(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", arms=False)
    for file in (folder / "augment" / "images").glob("red*.png"):
        file.unlink()
    assert "(the file is missing)" in page_of(folder)


def test_shown_questions_are_mended_and_unchanged_ones(run_path: Path) -> None:
    chosen = heatmaps.choose(RunContents.read(run_path), 6)
    assert [before["format"] for before, _ in chosen] == ["sequence"] * 2 + ["grid"] * 2 + ["pip"] * 2
    verdicts = [(before["correct"], after["correct"]) for before, after in chosen]
    assert verdicts[::2] == [(False, True)] * 3
    assert all(before == after for before, after in verdicts[1::2])


def test_overlay_puts_each_patch_where_it_is() -> None:
    heat = np.zeros((4, 4), dtype=np.float32)
    heat[0, 3] = 1
    plain = Image.new("RGB", (48, 48), "grey")
    bright = np.asarray(overlaid(plain, heat), dtype=int).sum(-1)
    assert np.argwhere(bright == bright.max()).min(0).tolist() == [0, 36]
    assert np.argwhere(bright == bright.max()).max(0).tolist() == [11, 47]
    wide = np.asarray(overlaid(Image.new("RGB", (80, 40), "grey"), heat, centre_crop=True), dtype=int)
    assert (wide[:, :20] == 128).all() and (wide[:, 60:] == 128).all()
    hot = np.argwhere(wide.sum(-1) == wide.sum(-1).max())
    assert hot.min(0).tolist() == [0, 50] and hot.max(0).tolist() == [9, 59]


def test_outline_is_the_box() -> None:
    marked = np.asarray(outlined(Image.new("RGB", (100, 50), "white"), [0.5, 0, 1, 1]))
    touched = np.argwhere((marked != 255).any(-1))
    assert touched.min(0).tolist() == [0, 50] and touched.max(0).tolist() == [49, 99]


def test_small_pictures_grow_by_whole_factors() -> None:
    assert sized(Image.new("RGB", (48, 24))).size == (192, 96)
    assert sized(Image.new("RGB", (2000, 1000))).size == (224, 112)


def test_heat_maps_equal_eager_attention_and_are_kept(tmp_path: Path) -> None:
    from tiny_models import make_tiny_llava

    folder = write_run(tmp_path / "run", arms=False)
    models = {"before": make_tiny_llava(tmp_path / "base", seed=0), "after": make_tiny_llava(tmp_path / "final", seed=1)}
    contents = RunContents.read(folder)
    options: dict[str, Any] = {"count": 6, "batch_size": 4, "score": RunConfig().score, "cache": tmp_path / "maps.json"}
    heat = heatmaps.heat_maps(contents, load=lambda moment: patched(models[moment]), **options)
    assert heat is not None and heat.layer == 1 and heat.centre_crop and len(heat.examples) == 6
    for example in heat.examples:
        for moment, path in models.items():
            expected = eager_maps(path, example.answers[moment], folder / "evaluate" / moment, layer=1)
            np.testing.assert_allclose(np.stack(example.maps[moment]), expected, atol=2e-6)
            share = expected[0][:, :2].sum() if example.record["region"] else expected[example.record["target"]].sum()
            assert example.ratios[moment] == pytest.approx(share, abs=2e-6)
    kept = heatmaps.heat_maps(contents, load=None, **options)  # type: ignore[arg-type]
    assert kept is not None and kept.examples[0].ratios == heat.examples[0].ratios


def patched(path: Path) -> Any:
    from mmdpo_kernels import patch_model
    from mmdpo_trainers.models.loading import load_model

    loaded = load_model(path, dtype="float32", device="cpu")
    patch_model(loaded.model)
    return loaded


def eager_maps(path: Path, record: dict[str, Any], folder: Path, *, layer: int) -> np.ndarray:
    """(pictures, 4, 4): the same shares from transformers' own attention maps, unpatched, one record at a time."""
    import torch

    from mmdpo_trainers.models.encode import encode_prompts
    from mmdpo_trainers.models.loading import load_model

    loaded = load_model(path, dtype="float32", device="cpu")
    loaded.model.set_attn_implementation("eager")
    located = {**record, "images": [str(folder / image) for image in record["images"]]}
    encoded = encode_prompts(loaded, [located], padding_side="right", answers=[record["response"]])
    with torch.no_grad():
        attention = loaded.model(**encoded.inputs, output_attentions=True).attentions[layer][0].mean(0)
    start, stop = encoded.response_spans[0]
    is_image = encoded.inputs["input_ids"][0] == loaded.image_token_id
    mass = attention[start - 1 : stop].mean(0)[is_image]
    return (mass / mass.sum()).reshape(-1, 4, 4).numpy()


def stage_context(folder: Path, **config: Any) -> StageContext:
    return StageContext(run=RunFolder(folder), config=RunConfig.from_dict({"name": "demo", "seed": 3, **config}), stage="report")


def test_stage_writes_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    context = stage_context(folder, model=str(tmp_path), report={"title": "My run", "heat_maps": 0})
    assert folder / "train" / "log.jsonl" in report.inputs(context)
    summary = report.run(context)
    page = (folder / "report.html").read_text()
    assert summary == {"page": "report.html", "bytes": len(page.encode()), "heat_maps": 0}
    assert "<h1>My run</h1>" in page and "Seed <b>3</b>" in page


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(StageError, match=r"pip install 'mmdpo-kernels\[train\]'"):
        report.run(stage_context(tmp_path, model=str(tmp_path)))


def test_what_was_left_out_and_how_answers_were_compared(tmp_path: Path) -> None:
    """Counts by reason, a format without questions or prompts as an empty row, and the comparison of both stages."""
    folder = write_run(tmp_path / "run", arms=False)

    def add(stage: str, **values: Any) -> None:
        path = folder / stage / "summary.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**found, **values}))

    add("augment", seconds=1.0, lost={"records": 275, "of": 300, "reasons": {"missing": 270, "not_a_picture": 5}})
    add("evaluate", seconds=0.0, lost={"records": 3, "of": 40, "reasons": {"truncated": 3}})
    add("select", match="contains", pairs={"sequence": 5, "grid": 4, "pip": 3, "single": 0})
    add("evaluate/before", match="choice", counts={"sequence": 60, "grid": 60, "pip": 60, "single": 60, "other": 0})
    page = text_of(page_of(folder, heat=None))
    assert "augment missing 270 augment not a picture 5" in page and "275 of 300" in page and "evaluate truncated 3" in page
    assert "Answers were compared with the truth by: contains." in page and "compared with the truth by: choice." in page
    assert "other 0 – – –" in page, "a row of the accuracy table"
    assert "Pairs selected" in page and "Single image All Failing" in page, "a column of the selection table"
