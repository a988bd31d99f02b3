"""Wrong answers made of true ones: what is kept of the truth, what is tried again, and the stage's files, whatever kills it."""

from __future__ import annotations

import base64
import json
import math
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import Kill, command
from launches import launch
from prompt_records import make_prompts
from tiny_models import make_tiny_llava, make_tiny_mllama
from transformers import BertConfig, BertModel

from mmdpo_kernels import patch_model
from mmdpo_trainers.answers import hallucination
from mmdpo_trainers.answers.hallucination import HallucinationSampler, first_sentence
from mmdpo_trainers.answers.similarity import EmbeddingSimilarity, word_similarity
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig, merge
from mmdpo_trainers.config.sections.hallucination import HallucinateConfig
from mmdpo_trainers.data.sentences import plain_words
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.report.sections.hallucinated import marked
from mmdpo_trainers.run.pipeline import run_pipeline, run_stage
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

KINDS = [("sequence", 3), ("single", 1), ("sequence", 2), ("single", 1), ("single", 1)]
ANSWERS = [
    "the image shows a red circle. it is on the left. there are two cats.",
    "no, there is no dog.",
    "red",
    "yes",
    "Yes. the object is big! what is it?",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> LoadedModel:
    loaded = load_model(model, device="cpu")
    patch_model(loaded.model)
    return loaded


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    records = make_prompts(folder, KINDS)
    lines = [json.dumps({**record, "answer": answer}) + "\n" for record, answer in zip(records, ANSWERS, strict=True)]
    (folder / "prompts.jsonl").write_text("".join(lines))
    return folder / "prompts.jsonl"


@pytest.fixture(scope="module")
def records(prompts: Path) -> list[dict[str, Any]]:
    return [{**record, "images": [str(prompts.parent / image) for image in record["images"]]} for record in read_jsonl(prompts)]


def sampler(loaded: LoadedModel, *, seed: int = 0, similarity: Any = word_similarity, **options: Any) -> HallucinationSampler:
    values = {"batch_size": 3, "max_new_tokens": 6, **options}
    return HallucinationSampler(loaded, HallucinateConfig(**values), similarity, seed)


class Scripted:
    """In place of the model: continuations by opening, and what was asked for."""

    def __init__(self, loaded: LoadedModel, texts: dict[str, str]) -> None:
        self.loaded, self.texts = loaded, texts
        self.openings: list[str] = []
        self.hidden: list[list[bool]] = []

    def __call__(self, loaded: LoadedModel, records: Any, *, openings: Any, hidden: Any, finished: Any, **_: Any) -> Any:
        self.openings += openings
        self.hidden += [hidden(row, 8).tolist() for row in range(len(records))]
        answers = []
        for row, opening in enumerate(openings):
            ids = loaded.texts.answer("r", "text", self.texts.get(opening, "a cat"))
            stop = next((end for end in range(1, len(ids) + 1) if finished(row, ids[:end])), len(ids))
            answers.append({"response_ids": ids[:stop]})
        return answers


def test_each_sentence_goes_on_from_the_truth_in_front_of_it(
    loaded: LoadedModel, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from what the model made of the sentences before; of its text all is taken up to the end of the sentence."""
    truth = "It is a cat.  The dog is big.\n\nYes"
    texts = {"It is": "not red. The", "It is a cat.  The dog": "and a cat! it", "It is a cat.  The dog is big.": "no"}
    scripted = Scripted(loaded, texts)
    monkeypatch.setattr(hallucination, "generate_responses", scripted)
    places = iter([2, 2, 0])
    drawn = SimpleNamespace(random=lambda: 0.9, randrange=lambda low, high: next(places))
    monkeypatch.setattr(hallucination.random, "Random", lambda seed: drawn)
    [found] = sampler(loaded, max_tries=1).sample(0, records[1:2], [truth])
    assert scripted.openings == ["It is", "It is a cat.  The dog", "It is a cat.  The dog is big."]
    assert found.response == "It is not red .  The dog and a cat !\n\nno"
    assert (
        found.guided
        and found.tries == 1
        and found.swapped == 0
        and found.similarity == word_similarity([truth], [found.response])[0]
    )


def test_splits_leave_something_and_swapped_words_stay(loaded: LoadedModel) -> None:
    drafts = [sampler(loaded, seed=seed)._drafts("a", "Yes, it is a cat. It is big.", 1) for seed in range(60)]
    firsts, seconds = ({each[place].kept for each in drafts} for place in (0, 1))
    assert seconds == {"", "It", "It is"}
    assert firsts == {"", "Yes,", "Yes, it", "Yes, it is", "Yes, it is a"} | {"No,", "No, it", "No, it is", "No, it is a"}
    assert 15 < sum(each[0].swapped for each in drafts) < 45 and not any(each[1].swapped for each in drafts)
    assert all(each[1].before == "Yes, it is a cat. " for each in drafts), "the truth, swapped or not"
    never = [sampler(loaded, seed=seed, swap_yes_no=0.0)._drafts("a", "yes", 1)[0] for seed in range(9)]
    always = [sampler(loaded, seed=seed, swap_yes_no=1.0)._drafts("a", "yes", 1)[0] for seed in range(9)]
    assert {each.kept for each in never} == {""} and {each.kept for each in always} == {"no"}


def test_tokens_are_hidden_by_chance_and_for_a_whole_try(
    loaded: LoadedModel, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    several = sampler(loaded, hide=0.75)
    masks = [several.hidden(f"r{number}", tried, 100) for number in range(20) for tried in (1, 2)]
    assert len({mask.tobytes() for mask in masks}) == 40 and 0.70 < np.mean(masks) < 0.80
    assert several.hidden("a", 1, 9).tolist() == several.hidden("a", 1, 9).tolist() != several.hidden("a", 2, 9).tolist()
    assert sampler(loaded, hide=1.0).hidden("a", 1, 9).all() and not sampler(loaded, hide=0.0).hidden("a", 1, 9).any()
    scripted = Scripted(loaded, {})
    monkeypatch.setattr(hallucination, "generate_responses", scripted)
    sampler(loaded, hide=0.5, max_tries=1).sample(0, records[:2], ANSWERS[:2])
    assert len(scripted.hidden) == 4
    assert scripted.hidden[0] == scripted.hidden[1] == scripted.hidden[2] != scripted.hidden[3]


def test_what_is_similar_is_tried_again_and_at_last_without_the_truth(
    loaded: LoadedModel, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first record is taken in its third try, the second never differs: its last answer follows nothing, and is as long as it is."""
    scripted = Scripted(loaded, {"": "it is a cat. it is big."})
    monkeypatch.setattr(hallucination, "generate_responses", scripted)
    tried: list[int] = []

    def similarity(truths: Any, answers: Any) -> list[float]:
        tried.append(len(truths))
        return [1.0 if truth == "red" or len(tried) < 3 else 0.5 for truth in truths]

    first, second = sampler(loaded, similarity=similarity).sample(0, records[1:3], ["no, there is no dog.", "red"])
    assert tried == [2, 2, 2, 1, 1]
    assert (first.tries, first.guided, first.similarity) == (3, True, 0.5)
    assert (second.tries, second.guided, second.similarity) == (5, False, 1.0) and second.response == "it is a cat . it is big ."
    # With one try there is no last one beside it.
    [only] = sampler(loaded, similarity=lambda t, a: [1.0], max_tries=1).sample(0, records[2:3], ["red"])
    assert only.tries == 1 and only.guided


def test_it_follows_from_the_seed(loaded: LoadedModel, records: list[dict[str, Any]]) -> None:
    """And is what the model says: greedy, each sentence is the model's own continuation behind the truth, with these tokens hidden."""
    one, same, other = (sampler(loaded, seed=seed).sample(0, records, ANSWERS) for seed in (0, 0, 1))
    assert one == same != other
    greedy = sampler(loaded, do_sample=False, max_tries=1, swap_yes_no=0.0, hide=0.5)
    [found] = greedy.sample(0, records[:1], ANSWERS[:1])
    drafts = greedy._drafts(records[0]["id"], ANSWERS[0], 1)
    parts = []
    for draft in drafts:
        [answer] = hallucination.generate_responses(
            loaded,
            records[:1],
            max_new_tokens=6,
            openings=[draft.opening],
            hidden=lambda row, n: greedy.hidden(records[0]["id"], 1, n),
        )
        begun = loaded.texts.answer("r", "text", draft.opening)
        whole = loaded.tokenizer.decode([*begun, *answer["response_ids"]], skip_special_tokens=True)
        text = whole[len(loaded.tokenizer.decode(begun, skip_special_tokens=True)) :]
        parts.append(first_sentence(draft.kept + text if draft.kept else text.strip(), draft.kept) + draft.space)
    assert found.response == "".join(parts).rstrip()


def test_the_sentence_that_was_begun() -> None:
    assert first_sentence("It is. It was.", "It") == "It is."
    assert first_sentence("It is. It was. No.", "It is. It") == "It is. It was."
    assert (
        first_sentence("No.\n\nNext", "No.") == "No."
        and first_sentence("no end ", "") == "no end"
        and first_sentence("", "") == ""
    )


def test_similarity_of_words() -> None:
    same, other, longer = word_similarity(["A red cat.", "yes", "a b c d"], ["a RED cat !", "no", "a b x d"])
    assert (same, other, longer) == (1.0, 0.0, 0.75)


def make_sentence_model(folder: Path, loaded: LoadedModel) -> Path:
    torch.manual_seed(0)
    shape: Any = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(loaded.tokenizer), max_position_embeddings=12, **shape)
    BertModel(config).save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def test_similarity_by_an_embedding_model(tmp_path: Path, loaded: LoadedModel) -> None:
    """Means over a text's own tokens; padding is none of them, and what is too long is cut off."""
    found = EmbeddingSimilarity(make_sentence_model(tmp_path / "sentences", loaded), "cpu")
    texts = ["a red cat", "it is", "red " * 40]
    alone = torch.cat([found.embed([text]) for text in texts])
    assert torch.allclose(found.embed(texts), alone, atol=1e-6)
    ids = loaded.tokenizer("a red cat", return_tensors="pt").input_ids
    states = found.model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).last_hidden_state[0]
    assert torch.allclose(found.embed(["a red cat"])[0], states.mean(0), atol=1e-6)
    same, other = found(["a red cat", "a red cat"], ["a red cat", "two dogs"])
    assert same == pytest.approx(1, abs=1e-6) and other < 0.999
    assert other == pytest.approx(torch.cosine_similarity(*found.embed(["a red cat", "two dogs"])[:, None])[0].item(), abs=1e-6)
    with pytest.raises(StageError, match="hallucinate.embedding: .* is no model of sentences"):
        EmbeddingSimilarity(tmp_path, "cpu")


def settings(model: Path, prompts: Path, **options: Any) -> dict[str, Any]:
    values = {"input": str(prompts), "batch_size": 2, "max_new_tokens": 4, **options}
    return {"method": "bdhs", "model": str(model), "device": "cpu", "hallucinate": values}


def context_of(folder: Path, values: dict[str, Any], arm: str | None = None) -> StageContext:
    config = RunConfig.from_dict(values)
    return StageContext(run=RunFolder(folder), config=config.for_arm(arm), stage="hallucinate", arm=arm)


def files(folder: Path) -> list[bytes]:
    return [(folder / "hallucinate" / name).read_bytes() for name in ("answers.jsonl", "pairs.jsonl")]


def run_it(folder: Path, model: Path, prompts: Path, rank: int = 0) -> None:
    torch.set_num_threads(1)
    run_stage(context_of(folder, settings(model, prompts)))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: Path) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_it(folder, model, prompts)
    return folder


def test_records_with_answers_become_pairs(alone: Path, records: list[dict[str, Any]]) -> None:
    pairs = {pair["id"]: pair for pair in read_jsonl(alone / "hallucinate" / "pairs.jsonl")}
    summary = json.loads((alone / "hallucinate" / "summary.json").read_text())
    for record in records:
        pair = pairs[record["id"]]
        assert pair["prompt"] == [{"role": "user", "content": record["prompt"]}]
        assert pair["chosen"] == [{"role": "assistant", "content": record["answer"]}] and pair["images"] == record["images"]
        assert pair["rejected"] == pair["hallucinated"] and "given_rejected" not in pair
        assert plain_words(pair["rejected"][0]["content"]) != plain_words(record["answer"])
    assert summary["pairs"] == 5 and summary["similarity"] == "words in common (rapidfuzz)" and summary["hide"] == 0.99
    assert sum(summary["tries"].values()) == 5 and "lost" not in summary


def test_several_processes_make_the_same_files(alone: Path, tmp_path: Path, model: Path, prompts: Path) -> None:
    assert launch(2, partial(run_it, tmp_path / "run", model, prompts)) == [0, 0]
    assert files(tmp_path / "run") == files(alone)


def test_killed_and_continued_it_makes_the_same_files(alone: Path, tmp_path: Path, model: Path, prompts: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings(model, prompts)))
    arguments = ["hallucinate", "--run", tmp_path / "run", "--config", config]
    assert command(*arguments, kill=Kill(tmp_path, "run/hallucinate/answers.jsonl", 2)) == -signal.SIGKILL
    path = tmp_path / "run" / "hallucinate" / "answers.jsonl"
    assert 2 <= path.read_bytes().count(b"\n") < 5 and not path.with_name("pairs.jsonl").exists()
    assert command(*arguments) == 0
    assert files(tmp_path / "run") == files(alone)


def test_what_says_the_same_makes_no_pair(tmp_path: Path, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the truth's own words never; too similar it is kept, as in the paper, or dropped."""
    texts = iter([("red", 1.0), ("yes!", 1.0), ("the big cat", 0.98), ("no", 0.2), ("a dog", 0.1)] * 2)

    def sample(self: Any, number: int, batch: Any, truths: Any) -> Any:
        found = [next(texts) for _ in truths]
        return [
            hallucination.Hallucination(truth if value == 1.0 else text, value, 5, False, 0)
            for truth, (text, value) in zip(truths, found, strict=True)
        ]

    monkeypatch.setattr(HallucinationSampler, "sample", sample)
    kept = run_stage(context_of(tmp_path / "keep", settings(model, prompts)))
    assert kept["pairs"] == 3 and kept["lost"] == {"records": 2, "of": 5, "reasons": {"same_words": 2}}
    dropped = run_stage(context_of(tmp_path / "drop", settings(model, prompts, unresolved="drop")))
    assert dropped["lost"] == {"records": 3, "of": 5, "reasons": {"same_words": 2, "too_similar": 1}}
    assert dropped["similar"] == 3 and dropped["unguided"] == 5 and dropped["tries"] == {"5": 5}
    monkeypatch.setattr(
        HallucinationSampler, "sample", lambda *a: [hallucination.Hallucination(t, 1.0, 5, False, 0) for t in a[3]]
    )
    with pytest.raises(StageError, match="all 5 answers say what the truth says; raise hallucinate.hide"):
        run_stage(context_of(tmp_path / "none", settings(model, prompts)))


def preference_file(folder: Path, records: list[dict[str, Any]], **more: Any) -> Path:
    lines = []
    for record in records:
        pair = {
            "id": record["id"],
            "images": record["images"],
            "prompt": [{"role": "user", "content": record["prompt"]}],
            "chosen": [{"role": "assistant", "content": record["answer"]}],
            "rejected": [{"role": "assistant", "content": "a given one"}],
            **more,
        }
        lines.append(json.dumps(pair) + "\n")
    path = folder / "given.jsonl"
    path.write_text("".join(lines))
    return path


def test_arms_beside_the_main_one(
    tmp_path: Path, model: Path, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data's own rejected answers of the records that were kept; the main one's where nothing else is asked for, without a model."""
    data = preference_file(tmp_path, records)
    arms = {
        "given": {"hallucinate": {"rejected": "given"}},
        "ipo": {"train": {"args": {"loss_type": ["ipo"]}}},
        "seen": {"hallucinate": {"hide": 0.0}},
    }
    values = {**settings(model, data), "arms": arms}
    main = run_stage(context_of(tmp_path / "run", values))
    pairs = list(read_jsonl(tmp_path / "run/hallucinate/pairs.jsonl"))
    assert all(pair["given_rejected"] == [{"role": "assistant", "content": "a given one"}] for pair in pairs)

    run_stage(context_of(tmp_path / "run", values, "seen"))
    assert files(tmp_path / "run/arms/seen") != files(tmp_path / "run")
    monkeypatch.setattr("mmdpo_trainers.stages.hallucinate.load_base", None)
    assert {**run_stage(context_of(tmp_path / "run", values, "ipo")), "seconds": 0} == {**main, "seconds": 0}
    assert run_stage(context_of(tmp_path / "run", values, "given"))["pairs"] == len(pairs)
    ipo, given = (list(read_jsonl(tmp_path / f"run/arms/{arm}/hallucinate/pairs.jsonl")) for arm in ("ipo", "given"))
    assert ipo == pairs
    assert given == [{**pair, "rejected": pair["given_rejected"]} for pair in pairs]
    with pytest.raises(ConfigError, match="given is for an arm beside the main one"):
        run_stage(context_of(tmp_path / "other", settings(model, data, rejected="given")))


def test_what_cannot_be_used(tmp_path: Path, model: Path, prompts: Path, records: list[dict[str, Any]]) -> None:
    def of(lines: list[dict[str, Any]], name: str) -> StageContext:
        path = prompts.with_name(f"{name}.jsonl")
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return context_of(tmp_path / name, settings(model, path))

    mixed = of([*records[:2], {**records[2], "answer": None}, {**records[3], "answer": " "}], "mixed")
    assert run_stage(mixed)["lost"] == {"records": 2, "of": 4, "reasons": {"no_truth": 2}}
    for lines, name, error, message in (
        ([], "empty", StageError, "holds no records"),
        ([{**records[0], "answer": None}], "answerless", StageError, "none of its 1 record has a picture and a true answer"),
        ([{**records[0], "images": ["gone.png"] * 3}], "gone", DataError, "gone.png does not exist"),
        (
            [{**records[1], "answer": "a <image>"}],
            "marked",
            DataError,
            "record r1/single: chosen has <image>, which stands for a picture",
        ),
    ):
        with pytest.raises(error, match=message):
            run_stage(of(lines, name))
    picture = base64.b64encode(Path(records[1]["images"][0]).read_bytes()).decode()
    embedded = preference_file(tmp_path, records[1:2], images=[f"data:image/png;base64,{picture}"])
    with pytest.raises(DataError, match="record r1/single: expected pictures as files; give this data as pairs.source"):
        run_stage(context_of(tmp_path / "embedded", settings(model, embedded)))


SMALL: dict[str, Any] = {
    "method": "bdhs",
    "model": "shapes_prior",
    "threads": 1,
    "pairs": {"pictures": 12, "held_out": 0.5, "questions": {"disagree": 2, "agree": 2}},
    "hallucinate": {"batch_size": 8, "max_new_tokens": 40, "hide": 0.5, "temperature": 0.5},
    "train": {
        "args": {"per_device_train_batch_size": 4, "logging_steps": 1, "lora_r": 4, "lora_alpha": 8, "num_train_epochs": 1}
    },
    "evaluate": {"batch_size": 4, "max_new_tokens": 40, "match": "choice"},
    "arms": {
        "both": {"hallucinate": {"rejected": "given"}, "train": {"preset": "bdhs_both"}},
        "slic": {"train": {"preset": "bdhs_slic"}},
    },
}


def test_a_whole_run_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    run = tmp_path / "run"
    assert cli.main(["run", str(tmp_path / "small.yaml"), "--run-dir", str(run)]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("hallucinate: 12/12") == 1, "arms generate nothing that the main one has"
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["arms"]) == list(summary["hallucinate"]) == ["bdhs", "both", "slic"]
    main = summary["hallucinate"]["bdhs"]
    assert (
        sum(main["tries"].values()) == 12 and main["pairs"] + summary["lost"].get("hallucinate", {"records": 0})["records"] == 12
    )
    assert summary["hallucinate"]["slic"] == main and summary["hallucinate"]["both"] == {"pairs": main["pairs"]}

    starts = {
        arm: next(read_jsonl(run / folder / "train/log.jsonl"))["loss"]
        for arm, folder in (("both", "arms/both"), ("slic", "arms/slic"))
    }
    assert starts["both"] == pytest.approx(math.log(2), rel=1e-4) and starts["slic"] == pytest.approx(1, rel=1e-4)
    page = (run / "report.html").read_text()
    assert 'id="hallucinated"' in page and "Similarity of each answer to its truth, by words in common (rapidfuzz)" in page
    assert (
        "<mark>" in page
        and "does not see 50.0" in page
        and "both rejected answers" in page
        and 'aria-label="Histogram of similarity' in page
    )
    answers = {record["id"]: record for record in read_jsonl(run / "hallucinate/answers.jsonl")}
    for pair in read_jsonl(run / "arms/both/hallucinate/pairs.jsonl"):
        record = answers[pair["id"]]
        assert pair["rejected"] == record["rejected"] and pair["hallucinated"][0]["content"] == record["sampled"]["response"]


def test_words_that_differ_are_marked() -> None:
    truth, answer = marked("A red cat is here. It sits.", "a blue cat was here. it sits.")
    assert [word for word, differs in truth if differs] == ["red", "is"]
    assert [word for word, differs in answer if differs] == ["blue", "was"]
    assert " ".join(word for word, _ in answer) == "a blue cat was here. it sits."
    truth, answer = marked("It is red. It sits.", "it is blue . it sits .")
    assert [word for word, differs in truth if differs] == ["red."] and [word for word, differs in answer if differs] == ["blue"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hallucinate": {"rejected": "given"}}, "hallucinate.rejected: given is for an arm"),
        ({"hallucinate": {"embedding": "nowhere"}}, "hallucinate.embedding: .*nowhere is not a folder"),
        ({"hallucinate": {"input": "mine.jsonl"}}, "hallucinate.input: pairs given to hallucinate leave none for evaluation"),
        ({"hallucinate": {"input": "none.jsonl"}}, "hallucinate.input: .*none.jsonl does not exist"),
        ({"model": "mllama"}, "family mllama: image tokens cannot be hidden"),
        ({"arms": {"a": {"hallucinate": {"input": "mine.jsonl"}}}}, "hallucinate.input: pairs given to hallucinate leave none"),
    ],
)
def test_what_is_refused_before_a_run(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_bytes(prompts.read_bytes())
    if values.get("model"):
        make_tiny_mllama(tmp_path / "mllama")
    config = RunConfig.from_dict(merge({**SMALL, "arms": {}, "run_dir": "run"}, values))
    with pytest.raises((ConfigError, StageError), match=message):
        run_pipeline(config)
    assert not (tmp_path / "run" / "hallucinate").exists()
