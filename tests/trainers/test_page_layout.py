"""How the page is laid out and written: on a phone, in one minus sign, with captions, alternatives and words for what is empty."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from compared_run import write_compared_run
from report_run import heat_of, write_json, write_lines, write_run

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.methods import METHODS
from mmdpo_trainers.report.comparison import PageInputs
from mmdpo_trainers.report.contents import RunContents
from mmdpo_trainers.report.numbers import number
from mmdpo_trainers.report.page import render
from mmdpo_trainers.report.tables import lost_fact

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def page_of(folder: Path, method: str = "mia_dpo", *, heat: bool = False) -> str:
    contents = RunContents.read(folder)
    config = RunConfig.from_dict({"name": "a", "method": method}).to_dict()
    maps = heat_of(contents) if heat else None
    return render(PageInputs(run=contents, method=METHODS[method], title="A run", config=config, heat=maps))


def text_of(page: str) -> str:
    body = re.sub(r"<(style|svg|pre)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body.replace("<wbr>", "")))).replace(
        "\N{NO-BREAK SPACE}", " "
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    single = write_run(folder / "a_run_with_a_rather_long_name_for_a_phone")
    lost = {"records": 275, "of": 300, "reasons": {"missing": 270, "not_a_picture": 5}}
    write_json(single / "augment" / "summary.json", {"seconds": 1.0, "lost": lost})
    return {"mia_dpo": page_of(single, heat=True), "mdpo": page_of(write_compared_run(folder / "compared"), "mdpo")}


@pytest.fixture(params=["mia_dpo", "mdpo"])
def page(request: pytest.FixtureRequest, pages: dict[str, str]) -> str:
    return pages[request.param]


def test_every_table_scrolls_by_itself_under_a_caption_that_does_not(page: str) -> None:
    tables = len(re.findall(r"<table\b", page))
    framed = re.findall(
        r'<figure class="table"><figcaption>[^<]+</figcaption>\s*<div class="scroll" role="region" tabindex="0" aria-label="[^"]+"><table',
        page,
    )
    assert tables == len(framed) >= 4
    heads = re.findall(r'<th scope="(?:col|row)"[^>]*>(.*?)</th>', page)
    assert heads and all(heads)


def test_every_figure_has_a_caption_and_every_picture_an_alternative(page: str) -> None:
    figures = re.findall(r"<figure\b.*?</figure>", page, flags=re.DOTALL)
    assert figures and all(re.search(r"<figcaption>\s*[^<\s]", figure) for figure in figures)
    pictures = re.findall(r"<img\b[^>]*>", page)
    assert pictures and all(re.search(r'alt="[^"]+"', tag) for tag in pictures)
    plots = re.findall(r"<svg\b[^>]*>", page)
    assert len(plots) >= 5 and all(re.search(r'role="img" aria-label="[^"]{20,}"', tag) for tag in plots)


def test_there_is_one_minus_sign(page: str) -> None:
    """In tables, sentences, ticks of plots and their descriptions; settings are shown as they are written."""
    seen = re.sub(r"<(style|pre)\b.*?</\1>", " ", page, flags=re.DOTALL)
    words = [html.unescape(text) for text in (*re.findall(r">([^<]*)<", seen), *re.findall(r'aria-label="([^"]*)"', seen))]
    assert [text for text in words if re.search(r"(?<![\w.])-[\d.]|\de-\d", text)] == []
    assert sum("\N{MINUS SIGN}" in text for text in words) >= 5
    assert not any(re.search(r"[-\N{MINUS SIGN}]0(\.0+)?(?![\d.])", text) for text in words), "zero has no sign"


def test_legends_lie_below_the_axes(page: str) -> None:
    legends = 0
    for plot in re.findall(r"<svg\b.*?</svg>", page, flags=re.DOTALL):
        if 'legend_1"' not in plot:
            continue
        legends += 1
        axes = re.search(r'id="[^"]*axes_1".*?id="[^"]*patch_2".*?d="M [\d.]+ ([\d.]+)', plot, flags=re.DOTALL)
        legend = plot.split('legend_1"', 1)[1]
        tops = [float(y) for y in re.findall(r"(?:translate\(|M |L )[\d.]+ ([\d.]+)", legend)]
        assert axes is not None and tops and min(tops) > float(axes[1]), "the axes' lower edge is above all of the legend"
    assert legends >= 2


def test_gaps_and_differences_between_arms_have_paired_intervals(pages: dict[str, str], tmp_path: Path) -> None:
    folder = write_compared_run(tmp_path / "run")
    logps = {
        name: {r["id"]: r["logps"] for r in map(json.loads, (folder / place / "held_out.jsonl").read_text().splitlines())}
        for name, place in (("mdpo", "evaluate/after"), ("dpo", "arms/dpo/evaluate/after"))
    }
    gaps = {name: [each["chosen"] - each["crop"] for each in found.values()] for name, found in logps.items()}
    text = text_of(pages["mdpo"])
    differences = [mine - other for mine, other in zip(gaps["mdpo"], gaps["dpo"], strict=True)]
    shown = number(sum(differences) / len(differences), "+.2f")
    low, high = re.search(rf"\(difference {re.escape(shown)}, (\S+) to (\S+)\)", text).groups()  # type: ignore[union-attr]
    width = float(high.replace("−", "-")) - float(low.replace("−", "-"))
    mean = sum(gaps["mdpo"]) / len(gaps["mdpo"])
    spread = re.search(rf"mDPO {number(mean, '.2f')} (\S+) to (\S+) ", text).groups()  # type: ignore[union-attr]
    alone = float(spread[1].replace("−", "-")) - float(spread[0].replace("−", "-"))
    assert 0 < width < alone, "pairs differ more among themselves than arms on the same pair"
    assert "mDPO minus each other arm on the same questions and pairs" in text
    assert "This run minus" in text_of(pages["mia_dpo"]) and "Several pictures, mean" in text_of(pages["mia_dpo"])


def test_captions_say_when_nothing_was_mended_selected_or_left_out(tmp_path: Path, pages: dict[str, str]) -> None:
    full = text_of(pages["mia_dpo"])
    assert re.search(r"Of the 6 answers shown, 3 went from wrong to right with training, and 3 stayed .* of 180\.", full)
    assert "Records left out 275" in full and 'href="#lost"' in pages["mia_dpo"]
    folder = write_run(tmp_path / "run", arms=False)
    (folder / "evaluate" / "after" / "answers.jsonl").write_text((folder / "evaluate" / "before" / "answers.jsonl").read_text())
    write_lines(folder / "select" / "pairs.jsonl", [])
    page = text_of(page_of(folder, heat=True))
    assert "Training mended no answer to several pictures: all 6 answers shown stayed as before." in page
    assert re.search(r"No pairs to show: selection kept none of \d+ answers", page) and "0 pairs selected from" in page
    assert "Records left out none" in page and "This run has no control arms." in page
    alike = text_of(page_of(write_compared_run(tmp_path / "alike", alike=True), "mdpo"))
    assert "No examples to show: to none of the 80 questions does an arm's answer turn" in alike
    assert "Questions on which some arm" in text_of(pages["mdpo"])


MEASURE = """<!DOCTYPE html><body><script>
const frame = document.createElement("iframe");
frame.style = "width: 390px; height: 800px; border: 0";
frame.srcdoc = %s;
frame.onload = () => {
  const page = frame.contentDocument, wide = [], width = page.documentElement.clientWidth;
  for (const each of page.querySelectorAll("body *")) {
    const {left, right} = each.getBoundingClientRect();
    if (!each.closest(".scroll table, pre, svg *") && (left < -0.5 || right > width + 0.5)) wide.push(each.outerHTML.slice(0, 80));
  }
  const inside = [...page.querySelectorAll(".tile, .card, figcaption")].filter(each => each.scrollWidth > each.clientWidth + 1).length;
  const small = [...page.querySelectorAll("svg")].map(each => 9 * each.getBoundingClientRect().width / each.viewBox.baseVal.width);
  document.title = JSON.stringify({width, all: page.documentElement.scrollWidth, wide, inside, smallest: Math.min(...small)});
};
document.body.append(frame);
</script>"""


@pytest.mark.nightly
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_nothing_is_wider_than_a_phone(page: str, tmp_path: Path) -> None:
    """At 390 pixels everything but what scrolls by itself is within the page, and the small print of plots is 9 pixels at least."""
    wrapper = tmp_path / "phone.html"
    wrapper.write_text(MEASURE % json.dumps(page).replace("</", "<\\/"))
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'browser'}",
    ]
    command += ["--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", shown, re.DOTALL)[1]))  # type: ignore[index]
    assert found["width"] == found["all"] == 390 and found["wide"] == [] and found["inside"] == 0
    assert found["smallest"] >= 9


def test_a_record_that_two_stages_left_out_is_not_added_up() -> None:
    lost = {"lost": {"records": 1, "of": 308, "reasons": {"missing": 1}}}
    other = {"lost": {"records": 1, "of": 90, "reasons": {"missing": 1}}}
    both = RunContents(folder=Path("run"), summaries={"augment": lost}, evaluation_data=other)
    assert lost_fact(both) == "augment 1, evaluate 1"
    assert lost_fact(RunContents(folder=Path("run"), summaries={"augment": lost})) == "1"
