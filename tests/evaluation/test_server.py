"""Answers of a server are those of the local model; faults of the server are survived or refused in one sentence."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import adaptermix
from adaptermix.adapters import open_adapter
from adaptermix.merging.on_model import acting
from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.generate import Limits, generate_ids
from adaptermix.tasks.test_record import state_folder

from ..refusals import refuses

ROWS = [(f"wake me at {number}", "alarm") for number in range(6)] + [("is it cold", "weather")]


@dataclass
class Fake:
    """A server that generates with a local model.

    Args:
        base: The model.
        adapters: Adapters by name.
        takes_ids: Whether prompts may be token ids, and stops token ids.
        faults: Statuses for the next requests; 0 drops the connection.
        retry_after: Header of refused requests.
    """

    base: BaseModel
    adapters: dict[str, Path]
    takes_ids: bool = True
    faults: list[int] = field(default_factory=list)
    retry_after: str = "0"
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name} for name in ("served", *self.adapters)]}

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt = body["prompt"]
        if not self.takes_ids and (isinstance(prompt, list) or "stop_token_ids" in body):
            return 422, {"detail": "prompt must be a string"}
        ids = prompt if isinstance(prompt, list) else self.base.tokenizer(prompt)["input_ids"]
        limits = Limits(max_new_tokens=body["max_tokens"], one_line=False, ends=body.get("stop_token_ids", ()))
        folder = self.adapters.get(body["model"])
        with self.lock, acting(self.base, [open_adapter(folder)] if folder else []):
            (answer,) = generate_ids(self.base, [ids], limits, batch_size=1)
        text = self.base.tokenizer.decode(answer, skip_special_tokens=True)
        for stop in body.get("stop", []):
            text = text.split(stop)[0]
        return 200, {"choices": [{"text": text}]}


def serve(fake: Fake) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, fake.models())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.requests.append(body)
                fake.keys.append(self.headers.get("Authorization"))
                fault = fake.faults.pop(0) if fake.faults else None
            if fault == 0:
                self.connection.close()
            elif fault:
                self._answer(fault, {"error": "busy"})
            else:
                self._answer(*fake.complete(body))

        def _answer(self, status: int, document: dict[str, Any]) -> None:
            text = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            if status >= 400:
                self.send_header("Retry-After", fake.retry_after)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rows") / "en.csv"
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS))
    return str(file)


@pytest.fixture(scope="module")
def task(causal: Path, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adapters") / "task"
    adaptermix.train_task(
        base=str(causal), task="classify", train=[data], out=str(out), steps=20, learning_rate=0.02, dtype="float32"
    )
    return out


@pytest.fixture
def fake(causal: Path, task: Path) -> Fake:
    return Fake(load_base(str(causal), device="cpu", dtype="float32", quantize="none"), {"task": task})


@pytest.fixture
def url(fake: Fake) -> Iterator[str]:
    server = serve(fake)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def settings(causal: Path, rows: str, **more: Any) -> dict[str, Any]:
    return {
        "base": str(causal),
        "task": "classify",
        "data": [rows],
        "dtype": "float32",
        "max_new_tokens": 8,
        "device": "cpu",
        **more,
    }


@pytest.mark.parametrize("takes_ids", [True, False], ids=["ids", "texts"])
def test_answers_are_those_of_the_local_model(
    takes_ids: bool, fake: Fake, url: str, causal: Path, task: Path, data: str
) -> None:
    fake.takes_ids = takes_ids
    here = adaptermix.evaluate(**settings(causal, data, adapter=str(task)))
    there = adaptermix.evaluate(**settings(causal, data, adapter=str(task), server=url))
    assert there.answers == here.answers
    assert len(set(here.answers)) > 1
    assert there.document() == here.document()
    # the first request finds the form, the others use it
    assert len(fake.requests) == len(ROWS) + (0 if takes_ids else 2)
    assert {isinstance(body["prompt"], list) for body in fake.requests[-len(ROWS) :]} == {takes_ids}
    assert {body["model"] for body in fake.requests} == {"task"}


def test_an_adapter_is_compared_with_the_base_by_its_name(
    fake: Fake, url: str, causal: Path, task: Path, data: str
) -> None:
    with refuses("server.model: served, task"):
        adaptermix.evaluate(**settings(causal, data, adapter=str(task), server=url, against="base"))
    fake.adapters = {"task": task, causal.name: causal}
    assert causal.name in {entry["id"] for entry in fake.models()["data"]}


def test_the_key_is_sent_and_never_shown(
    fake: Fake, url: str, causal: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    fake.faults = [401]
    with refuses("server.failed: 401") as caught:
        adaptermix.evaluate(**settings(causal, data, server=url, server_model="served"))
    assert fake.keys == ["Bearer secret-key"]
    assert "secret-key" not in str(caught.value)


@pytest.mark.parametrize("faults", [[429, 500, 0], [503, 0, 502]], ids=str)
def test_busy_servers_are_asked_again(
    faults: list[int], fake: Fake, url: str, causal: Path, task: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptermix.publish.patience.FIRST_PAUSE", 0.01)
    fake.faults = list(faults)
    there = adaptermix.evaluate(**settings(causal, data, adapter=str(task), server=url))
    assert len(there.answers) == len(ROWS)
    assert fake.faults == []


def test_a_long_wait_is_refused(fake: Fake, url: str, causal: Path, data: str) -> None:
    fake.faults, fake.retry_after = [429], "3600"
    with refuses("server.busy: 3,600 s"):
        adaptermix.evaluate(**settings(causal, data, server=url, server_model="served"))


def test_an_interrupted_evaluation_asks_only_for_the_rest(
    fake: Fake, url: str, causal: Path, task: Path, data: str
) -> None:
    options = settings(causal, data, adapter=str(task), server=url, batch_size=1)
    here = adaptermix.evaluate(**settings(causal, data, adapter=str(task)))
    answer = fake.complete
    asked: list[int] = []

    def failing(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        asked.append(1)
        return (400, {"error": "broken"}) if len(asked) == 4 else answer(body)

    fake.complete = failing  # type: ignore[method-assign]
    with refuses("server.failed: 400"):
        adaptermix.evaluate(**options)
    first = len(fake.requests)
    stored = list((state_folder() / "answers").iterdir())
    assert len(stored) == 1
    stored[0].write_text(stored[0].read_text() + '[5, "torn')
    there = adaptermix.evaluate(**options)
    assert there.answers == here.answers
    assert len(fake.requests) - first < len(ROWS)
    assert list((state_folder() / "answers").iterdir()) == []


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"server": "localhost:8000"}, "server.url"),
        ({"server_model": "x"}, "server.model-only"),
        ({"server": "http://x", "quantize": "nf4"}, "server.quantize"),
        ({"server": "http://x", "task": "choice"}, "server.task"),
        ({"server": "http://127.0.0.1:9"}, "server.failed"),
    ],
)
def test_requests_that_cannot_be_done_are_refused(
    more: dict[str, Any], code: str, causal: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaptermix.publish.patience.FIRST_PAUSE", 0.01)
    if more.get("task") == "choice":
        file = tmp_path / "en.jsonl"
        file.write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n')
        more = {**more, "data": [str(file)], "server_model": "x"}
    with refuses(code):
        adaptermix.evaluate(**settings(causal, data, **more))


def test_heads_are_refused(encoder: Path, data: str, tmp_path: Path) -> None:
    adaptermix.train_task(base=str(encoder), task="classify", train=[data], out=str(tmp_path / "head"), steps=1)
    with refuses("server.head"):
        adaptermix.evaluate(
            base=str(encoder), task="classify", data=[data], adapter=str(tmp_path / "head"), server="http://x"
        )
