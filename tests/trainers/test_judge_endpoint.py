"""A judge behind an HTTP endpoint on loopback: whatever goes wrong there, no rating is lost, nothing is asked twice, no key gets out."""

from __future__ import annotations

import base64
import io
import json
import logging
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
from judge_server import Asked, JudgeServer, Said, completion, ratings
from PIL import Image
from prompt_records import make_prompts

from mmdpo_trainers.answers import chat_client
from mmdpo_trainers.answers.chat_client import Pace, _retry_after, data_url
from mmdpo_trainers.answers.raters import Judge, Rater, Rating, Surroundings, rater_of
from mmdpo_trainers.answers.raters.replies import costs
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.rating import EndpointConfig, RateConfig
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl

KEY = "sk-4f1c9e2ab7d0-never-to-be-seen"


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    return make_prompts(tmp_path / "data", [("sequence", 2)])[0]


def judge(folder: Path, url: str, *, allow_missing: bool = False, tries: int = 3, **endpoint: Any) -> Rater:
    settings = EndpointConfig(**{"url": url, "model": "m", "backoff": 0.0, "retries": 3, "concurrency": 4, **endpoint})
    options = RateConfig(source="endpoint", endpoint=settings, tries=tries)
    return rater_of(options, Surroundings(folder=folder, allow_missing=allow_missing))


def by_length(asked: Asked) -> str:
    """Rates an answer by its number of letters."""
    return ratings(len(asked.answer) % 5)


def test_what_is_sent_and_what_is_made_of_it(tmp_path: Path, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with JudgeServer(by_length) as server:
        rater = judge(
            tmp_path / "run", server.url, key_env="JUDGE_KEY", max_image_side=16, parameters={"seed": 3}, json_schema=True
        )
        found = rater.rate([record, record], [["red", "blue", "red"], ["green"]])
        rater.close()
    assert [[rating.value() for rating in each] for each in found] == [[3, 4, 3], [0]]
    # Equal answers to a record are one question.
    assert len(server.asked) == 3 and costs(tmp_path / "run") == {
        "replies": 3,
        "requests": 3,
        "repeated": 0,
        "prompt_tokens": 21,
        "completion_tokens": 9,
    }
    asked = server.asked[0]
    assert asked.headers["authorization"] == f"Bearer {KEY}" and asked.body["model"] == "m" and asked.body["seed"] == 3
    assert (
        asked.body["max_tokens"] == 256 and asked.body["response_format"]["json_schema"]["schema"]["required"][0] == "helpfulness"
    )
    assert asked.text.count("<image>") == 2 and "Image1:<image>\nImage2:<image>\nIn Image1" in asked.text
    picture = Image.open(io.BytesIO(base64.b64decode(asked.images[0].partition(",")[2])))
    assert max(picture.size) == 16 and asked.images[0].startswith("data:image/png;base64,")


def test_large_pictures_are_reduced() -> None:
    url = data_url(Image.new("RGB", (3000, 1000), "red"), 600)
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert picture.size == (600, 200) and url.startswith("data:image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(data_url(Image.new("RGB", (900, 1)), 16).partition(",")[2]))).size == (16, 1)


FAILURES = {
    "429": Said(429, b'{"error": "slow down"}', {"Retry-After": "0.01"}),
    "500": Said(500, b"oops"),
    "503": Said(503, b"", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "cut off": Said(dropped=True),
    "rubbish": Said(200, b"<html>gateway</html>"),
    "broken JSON": Said(200, completion("x")[:40]),
    "no choices": Said(200, b'{"choices": []}'),
    "another shape": Said(200, b'[{"choices": 1}]'),
    "not UTF-8": Said(200, b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_asked_again(tmp_path: Path, record: dict[str, Any], failure: str) -> None:
    """Each request fails twice, and nothing is lost."""

    def plays(asked: Asked) -> str | Said:
        return FAILURES[failure] if asked.seen < 2 else by_length(asked)

    with JudgeServer(plays) as server:
        rater = judge(tmp_path / "run", server.url)
        [found] = rater.rate([record], [["red", "blue"]])
        rater.close()
    assert [rating.value() for rating in found] == [3, 4] and len(server.asked) == 6
    assert costs(tmp_path / "run") | {"prompt_tokens": 0} == {
        "replies": 2, "requests": 6, "repeated": 4, "prompt_tokens": 0, "completion_tokens": 6,
    }  # fmt: skip


@pytest.mark.parametrize("said", [Said(held=True), Said(drip=True)], ids=["held", "bit by bit"])
def test_a_slow_reply_is_given_up(tmp_path: Path, record: dict[str, Any], said: Said) -> None:
    with JudgeServer(lambda asked: said if asked.seen == 0 else by_length(asked)) as server:
        rater = judge(tmp_path / "run", server.url, timeout=1.0, retries=30)
        [[rating]] = rater.rate([record], [["red"]])
        rater.close()
    assert rating.value() == 3 and len(server.asked) >= 2 and costs(tmp_path / "run")["repeated"] == len(server.asked) - 1


MALFORMED = {
    "no JSON": "Five stars!",
    "wrong attributes": '{"helpfulness": 3, "beauty": 4}',
    "out of range": ratings(9),
    "empty": "",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_rating_is_asked_for_again_with_the_complaint(tmp_path: Path, record: dict[str, Any], text: str) -> None:
    with JudgeServer(lambda asked: by_length(asked) if "cannot be used" in asked.text else text) as server:
        rater = judge(tmp_path / "run", server.url)
        [[rating]] = rater.rate([record], [["red"]])
        rater.close()
    assert rating.value() == 3 and len(server.asked) == 2
    assert f"Your last reply was:\n{text}\n\nIt cannot be used: " in server.asked[1].text and "expected" in server.asked[1].text


def test_rubbish_to_the_end_is_reported_by_record(tmp_path: Path, record: dict[str, Any]) -> None:
    """One answer's ratings stay malformed; those of the others are there."""

    def plays(asked: Asked) -> str | Said:
        if asked.answer == "refuse":
            return Said(400, b'{"error": "content filter"}')
        return Said(200, completion('{"helpfulness": 1', finish_reason="length")) if asked.answer == "blue" else by_length(asked)

    with JudgeServer(plays) as server:
        rater = judge(tmp_path / "run", server.url, tries=4)
        [found] = rater.rate([record], [["red", "blue", "refuse"]])
        rater.close()
    assert found[0].value() == 3 and [rating.reason for rating in found[1:]] == ["malformed", "refused"]
    assert "asked 4 times; it was cut at 256 tokens" in str(found[1].problem) and "content filter" in str(found[2].problem)
    assert len(server.asked) == 1 + 4 + 1
    # Not even a reply that is none is asked for again by a continued run.
    rater = judge(tmp_path / "run", "http://127.0.0.1:9/v1", tries=4)
    assert rater.rate([record], [["red", "blue", "refuse"]]) == [found]
    rater.close()


@pytest.mark.parametrize(
    ("said", "why"), [(Said(502), "status 502"), (Said(dropped=True), "[A-Z]\\w+Error: .*")], ids=["away", "killed"]
)
def test_an_outage_ends_the_stage_and_loses_nothing(tmp_path: Path, record: dict[str, Any], said: Said, why: str) -> None:
    up, lock = [True], threading.Lock()
    answers = [[f"{'x' * n}" for n in range(1, 13)]]

    def plays(asked: Asked) -> str | Said:
        with lock:
            up[0] = up[0] and asked.number < 5
            return by_length(asked) if up[0] else said

    with JudgeServer(plays) as server:
        rater = judge(tmp_path / "run", server.url, concurrency=2)
        with pytest.raises(
            StageError, match=rf"did not answer after 4 requests \({why}\); all replies so far are kept"
        ) as caught:
            rater.rate([record], answers)
        rater.close()
        kept = {line["key"] for line in read_jsonl(tmp_path / "run" / "replies.jsonl")}
        assert len(kept) == 5 and f"record {record['id']}" in str(caught.value) and "--allow-missing" in str(caught.value)
    with JudgeServer(by_length) as server:
        rater = judge(tmp_path / "run", server.url)
        [found] = rater.rate([record], answers)
        rater.close()
    assert [rating.value() for rating in found] == [n % 5 for n in range(1, 13)] and len(server.asked) == 7


def test_an_outage_that_is_allowed(tmp_path: Path, record: dict[str, Any]) -> None:
    """The answer has no rating, and a run that is continued asks for it again."""
    with JudgeServer(lambda asked: Said(500)) as server:
        rater = judge(tmp_path / "run", server.url, allow_missing=True)
        [[rating]] = rater.rate([record], [["red"]])
        rater.close()
    assert rating.reason == "no_reply" and len(server.asked) == 4
    with JudgeServer(by_length) as server:
        rater = judge(tmp_path / "run", server.url, allow_missing=True)
        assert rater.rate([record], [["red"]])[0][0].value() == 3
        rater.close()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            Said(401, f"Incorrect API key provided: {KEY}".encode()),
            "refused access.*environment variable JUDGE_KEY, which is set",
        ),
        (Said(404, f"no model m for {KEY}".encode()), r"status 404 \(no model m for \*\*\*\); mend rate.endpoint.url"),
        (Said(302, b"", {"Location": "http://elsewhere/"}), "status 302"),
        (Said(400, f"bad parameter {KEY}".encode()), r"refused the first 8 questions .*bad parameter \*\*\*"),
        (Said(500, KEY.encode()), "did not answer after 4 requests"),
    ],
)
def test_what_ends_the_stage_does_not_say_the_key(
    tmp_path: Path,
    record: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    said: Said,
    expected: str,
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with JudgeServer(lambda asked: said) as server:
        rater = judge(tmp_path / "run", server.url, key_env="JUDGE_KEY", concurrency=1)
        with pytest.raises(StageError, match=expected) as caught:
            rater.rate([record], [["x" * n for n in range(1, 11)]])
        rater.close()
    assert KEY not in "".join(traceback.format_exception(caught.value)) and KEY not in caplog.text
    assert KEY not in every_byte(tmp_path / "run")


def test_a_key_in_a_reply_is_taken_out(tmp_path: Path, record: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with JudgeServer(lambda asked: f"You sent {asked.headers['authorization']}") as server:
        rater = judge(tmp_path / "run", server.url, key_env="JUDGE_KEY", tries=2)
        [[rating]] = rater.rate([record], [["red"]])
        rater.close()
    assert KEY not in str(rating) and "You sent Bearer ***" in str(rating.problem)
    assert KEY not in every_byte(tmp_path / "run") and KEY not in server.asked[1].text


def every_byte(folder: Path) -> str:
    return "".join(path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "endpoint",
    [
        {"url": f"http://user:{KEY}@host/v1"},
        {"url": f"http://host/v1?api_key={KEY}"},
        {"key_env": KEY},
        {"key": KEY},
        {"api_key": KEY},
    ],
)
def test_a_key_in_the_configuration_is_refused_unrepeated(endpoint: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="endpoint") as caught:
        RunConfig.from_dict({"rate": {"endpoint": endpoint}})
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_a_key_that_no_header_can_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\nX-Other: ü")
    with pytest.raises(ConfigError, match="JUDGE_KEY holds characters that no key has") as caught:
        judge(tmp_path, "http://localhost/v1", key_env="JUDGE_KEY")
    assert KEY not in str(caught.value)


def test_retry_after() -> None:
    assert [_retry_after({"retry-after": said}) for said in ("7", "-1", "soon", "", "Wed, 21 Oct 2015 07:28:00 GMT")] == [
        7,
        0,
        0,
        0,
        0,
    ]


def test_requests_go_at_the_rate_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only waiting moves; what the endpoint asks for holds all requests back."""
    clock = Clock()
    monkeypatch.setattr(chat_client.time, "monotonic", lambda: clock.now)
    pace, times = Pace(30.0, clock), []  # type: ignore[arg-type]
    for place in range(4):
        if place == 2:
            pace.hold(60)
        pace.wait()
        times.append(clock.now)
    assert times == [0, 2, 62, 64]


class Clock:
    """An event that is never set, and on which waiting takes no time."""

    now = 0.0

    def is_set(self) -> bool:
        return False

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_no_more_requests_at_a_time_than_asked_for(tmp_path: Path, record: dict[str, Any]) -> None:
    """Two are under way together, as each waits for the other, and never a third."""
    meeting, lock, under_way = threading.Barrier(2, timeout=30), threading.Lock(), [0, 0]

    def plays(asked: Asked) -> str:
        with lock:
            under_way[0] += 1
            under_way[1] = max(under_way)
        meeting.wait()
        with lock:
            under_way[0] -= 1
        return by_length(asked)

    with JudgeServer(plays) as server:
        rater = judge(tmp_path / "run", server.url, concurrency=2)
        rater.rate([record], [["x" * n for n in range(1, 9)]])
        rater.close()
    assert under_way == [0, 2] and len(server.asked) == 8


def test_comparisons_in_both_orders(tmp_path: Path, record: dict[str, Any]) -> None:
    def plays(asked: Asked) -> str:
        assert asked.answers is not None
        first, second = asked.answers
        return json.dumps({"better": "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"})

    with JudgeServer(plays) as server:
        rater = judge(tmp_path / "run", server.url)
        assert isinstance(rater, Judge)
        assert rater.compare([record] * 3, [("long", "no"), ("no", "long"), ("ab", "cd")]) == ["A", "B", "tie"]
        rater.close()
    with JudgeServer(lambda asked: "who knows") as server:
        rater = judge(tmp_path / "other", server.url, tries=2)
        assert isinstance(rater, Judge) and rater.compare([record], [("long", "no")]) == [None]
        rater.close()


def test_replies_of_another_run_are_not_paid_twice(tmp_path: Path, record: dict[str, Any]) -> None:
    with JudgeServer(by_length) as server:
        rater = judge(tmp_path / "run", server.url)
        rater.rate([record], [["red", "blue"]])
        rater.close()
        options = RateConfig(
            source="endpoint",
            endpoint=EndpointConfig(url=server.url, model="m"),
            replies=str(tmp_path / "run" / "replies.jsonl"),
        )
        rater = rater_of(options, Surroundings(folder=tmp_path / "second"))
        assert rater.rate([record], [["blue", "x"]]) == [
            [Rating(dict.fromkeys(rater.attributes, 4.0)), Rating(dict.fromkeys(rater.attributes, 1.0))]
        ]
        rater.close()
    assert len(server.asked) == 3 and costs(tmp_path / "second")["requests"] == 1 and costs(tmp_path / "second")["replies"] == 2
