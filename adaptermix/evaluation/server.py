"""Answers of an inference server with the completions interface of OpenAI: vLLM, SGLang, llama.cpp, transformers serve.

The server receives token ids, so that prompts are those of a local model. A server that takes texts only receives the
text of a prompt, after a check that the tokenizer makes the same token ids of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import AdapterSource
from ..errors import AdapterMixError, PlanError, ServerError, as_line
from ..io.json_types import JsonObject
from ..models.pretrained import load_config, load_generation_config, load_tokenizer
from ..options import EvaluateSettings, GenerationSettings
from ..progress import SILENT, Watcher
from ..publish.patience import CONNECT_SECONDS, MOST_WAIT, asked_wait, reason_of, repeatedly, status_of
from ..tasks import ChoiceTask, Task, get_template
from ..tasks.data.prompt_ids import PromptIds
from ..tasks.data.report import by_language
from ..tasks.data.tables import Row
from ..tasks.test_record import state_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER_SECONDS = 600.0
"""Longest time for one answer: requests wait in the server's queue."""
_KEYS = ("ADAPTERMIX_API_KEY", "OPENAI_API_KEY")
"""Environment variables for the server's key, the first that is set."""
_REFUSED = (400, 404, 405, 415, 422, 501)
"""Statuses of servers that do not take a form of request."""


class Server:
    """A server, and the form of requests that it takes.

    Args:
        url: Its address, with or without `/v1`.
        model: Name of the model or adapter at the server; None for one of `names`.
        names: Possible names; the first that the server lists is taken.
        watch: Receives notes about repeated requests.

    Raises:
        ServerError: the server cannot be reached, or lists none of the names.
    """

    def __init__(self, url: str, *, model: str | None, names: Sequence[str] = (), watch: Watcher = SILENT) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._client, self._watch = _client(), watch
        key = next((os.environ[name] for name in _KEYS if os.environ.get(name)), None)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model = model or self._model_of(names)
        self._form: int | None = None

    def _request(self, method: str, path: str, body: JsonObject | None = None) -> Any:
        """Return the JSON document of a response.

        Raises:
            Exception: the request failed, as `repeatedly` raises it.
        """
        response = self._client.request(method, f"{self._url}/v1/{path}", json=body, headers=self._headers)
        if (asked_wait(response.headers) or 0) > MOST_WAIT and response.status_code >= 400:
            raise ServerError(
                f"{self._url} asks to wait {asked_wait(response.headers):,.0f} s, and at most {MOST_WAIT:.0f} s are "
                "accepted. Start the command again later: answers that have arrived are kept.",
                code="server.busy",
            )
        response.raise_for_status()
        return response.json()

    def _model_of(self, names: Sequence[str]) -> str:
        document = self._repeatedly(partial(self._request, "GET", "models"), "list of models")
        entries = document.get("data") if isinstance(document, dict) else None
        listed = [str(entry["id"]) for entry in entries or [] if isinstance(entry, dict) and "id" in entry]
        known = next((name for name in names if name in listed), None)
        if known is None:
            raise ServerError(
                f"the server must have a model named {' or '.join(map(repr, names))}, and {self._url} has "
                f"{as_line(', '.join(listed) or 'none', 300)}. Name one with --server-model.",
                code="server.model",
            )
        return known

    def _repeatedly(self, call: Callable[[], Any], step: str) -> Any:
        try:
            return repeatedly(call, step, self._watch)
        except AdapterMixError:
            raise
        except Exception as error:  # the client library has many kinds
            message = _message_of(error)
            raise ServerError(
                f"{self._url} must answer ({step}), and does not: {reason_of(error).rstrip('.')}{message}.",
                code="server.failed",
            ) from error

    def complete(self, forms: Sequence[JsonObject]) -> str:
        """Return the text that follows a prompt.

        Args:
            forms: The same request in several forms; the first that the server takes is used from then on.

        Raises:
            ServerError: the server cannot be reached, or takes none of the forms.
        """
        for number, form in enumerate(forms) if self._form is None else [(self._form, forms[self._form])]:
            body = {"model": self.model, **form}
            try:
                document = self._repeatedly(partial(self._request, "POST", "completions", body), "completions")
            except ServerError as error:
                status = status_of(error.__cause__) if isinstance(error.__cause__, Exception) else None
                if status in _REFUSED and self._form is None and number + 1 < len(forms):
                    continue
                raise
            self._form = number
            return _text_of(document, self._url)
        raise AssertionError("the last form returns or raises")


def _client() -> Any:
    """Return a client of the HTTP library of huggingface_hub, whose own client refuses requests offline."""
    from huggingface_hub import get_session

    http = import_module(type(get_session()).__module__.partition(".")[0])
    return http.Client(timeout=http.Timeout(_ANSWER_SECONDS, connect=CONNECT_SECONDS), limits=http.Limits())


def _message_of(error: Exception) -> str:
    """Return the server's message about a refused request."""
    response = getattr(error, "response", None)
    text = getattr(response, "text", "") if response is not None else ""
    return f" ({as_line(text.strip(), 200)})" if text.strip() else ""


def _text_of(document: object, url: str) -> str:
    choices = document.get("choices") if isinstance(document, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    text = first.get("text") if isinstance(first, dict) else None
    if not isinstance(text, str):
        raise ServerError(
            f"{url} must answer with a text in choices[0].text, and answers {as_line(json.dumps(document), 200)}.",
            code="server.answer",
        )
    return text


class ServerAnswering:
    """Rows for a server to answer, with the prompts of a local model.

    Args:
        server: The server.
        base: The base model of the server; only its tokenizer and configuration are read.
        task: The task.
        rows: Its rows.
        settings: Generation settings; `batch_size` requests are sent at a time.
        template: Name of the prompt template.
        watch: Receives progress.

    Raises:
        PlanError: the task compares likelihoods.
        ModelError: there is no such base model.
    """

    def __init__(
        self,
        server: Server,
        base: str,
        task: Task,
        rows: Sequence[Row],
        settings: GenerationSettings,
        *,
        template: str,
        watch: Watcher = SILENT,
    ) -> None:
        if isinstance(task, ChoiceTask):
            raise PlanError(
                f"task '{task.name}' compares likelihoods, which --server cannot do: evaluate it without --server.",
                code="server.task",
            )
        self._server, self._task, self._rows, self._settings, self._watch = server, task, rows, settings, watch
        self._tokenizer = load_tokenizer(base)
        chosen = get_template(task, template)
        ids = PromptIds(tokenizer=self._tokenizer)
        self._prompts = [ids.encode(chosen, task.fields(row), task.language(row)) for row in rows]
        self._most = settings.max_new_tokens
        self._stops = sorted({chosen.end(self._tokenizer), *_ends(base, self._tokenizer)})
        self._fit(base, ids)

    def _fit(self, base: str, ids: PromptIds) -> None:
        """Truncate prompts so that prompt and answer fit the model's positions, as `Answering` does."""
        limit = getattr(load_config(base).get_text_config(), "max_position_embeddings", None)
        if not limit:
            return
        room = max(limit - self._most, (limit + 1) // 2)
        long = [number for number, prompt in enumerate(self._prompts) if len(prompt) > room]
        for number in long:
            self._prompts[number] = ids.shortened(self._prompts[number], room)
        if long:
            languages = [self._task.language(self._rows[number]) for number in long]
            self._watch.note(
                f"{by_language(languages, len(self._prompts))} prompts are longer than {room} tokens and lose their "
                f"beginning: this base model has {limit} positions, also for the answer (--max-new-tokens)."
            )
        self._most = min(self._most, max(1, limit - max(map(len, self._prompts), default=0)))

    def forms(self, prompt: Sequence[int]) -> list[JsonObject]:
        """Return the request for a prompt in all forms, the best first.

        Texts are among them only if the tokenizer makes the same token ids of the text.
        """
        plain: JsonObject = {"max_tokens": self._most, "temperature": 0.0}
        lines: JsonObject = {**plain, "stop": ["\n"]} if self._task.one_line else plain
        ids: JsonObject = {"prompt": list(prompt)}
        forms = [{**lines, **ids, "stop_token_ids": list(self._stops)}, {**lines, **ids}]
        text = _text_with(self._tokenizer, prompt)
        if text is not None:
            forms += [{**lines, "prompt": text}, {**plain, "prompt": text}]
        return forms

    def __call__(self, label: str = "answer") -> list[str]:
        """Return one answer per row. Answers of an interrupted call with the same requests are used again.

        Raises:
            ServerError: the server fails, or does not take the prompts.
        """
        forms = [self.forms(prompt) for prompt in self._prompts]
        with _kept(self._server.model, forms) as (known, keep):
            waiting = [number for number in range(len(forms)) if number not in known]
            with self._watch.track(label, len(forms)) as advance:
                advance(len(known), "")
                if waiting:  # alone, since it finds the form that the server takes
                    known[waiting[0]] = keep(waiting[0], self._server.complete(forms[waiting[0]]))
                    advance(1, "")
                self._rest(forms, waiting[1:], known, keep, advance)
        return [self._cut(known[number]) for number in range(len(forms))]

    def _rest(
        self,
        forms: Sequence[Sequence[JsonObject]],
        waiting: Sequence[int],
        known: dict[int, str],
        keep: Callable[[int, str], str],
        advance: Callable[[int, str], None],
    ) -> None:
        """Ask for the other answers, several at a time."""
        with ThreadPoolExecutor(self._settings.batch_size or 1) as pool:
            futures = {pool.submit(self._server.complete, forms[number]): number for number in waiting}
            try:
                for future in as_completed(futures):
                    number = futures[future]
                    known[number] = keep(number, future.result())
                    advance(1, "")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _cut(self, text: str) -> str:
        # A line break ends a local answer, also at its start.
        return (text.split("\n", 1)[0] if self._task.one_line else text).strip()


def _ends(base: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens with which a model ends a text."""
    configured = load_generation_config(base).eos_token_id
    listed = [] if configured is None else configured if isinstance(configured, list) else [configured]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _text_with(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> str | None:
    """Return a text of which the tokenizer makes these token ids, with or without its special tokens; else None."""
    whole = str(tokenizer.decode(list(prompt)))
    bare = str(tokenizer.decode(list(prompt), skip_special_tokens=True))
    return next((text for text in (bare, whole) if tokenizer(text)["input_ids"] == list(prompt)), None)


@contextmanager
def _kept(
    model: str, forms: Sequence[Sequence[JsonObject]]
) -> Iterator[tuple[dict[int, str], Callable[[int, str], str]]]:
    """Yield the answers of an interrupted call with the same requests, and a function that stores another answer.

    The file is removed at the end; after an error it stays for the next call.
    """
    key = hashlib.sha256(json.dumps([model, [each[0] for each in forms]]).encode()).hexdigest()[:32]
    path = state_folder() / "answers" / f"{key}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = dict(_stored(path, len(forms)))
    with path.open("a", encoding="utf-8") as file:

        def keep(number: int, text: str) -> str:
            file.write(json.dumps([number, text]) + "\n")
            file.flush()
            return text

        yield known, keep
    path.unlink(missing_ok=True)


def _stored(path: Path, count: int) -> Iterator[tuple[int, str]]:
    """Yield the answers of a file; a line that was not written whole ends it."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            number, text = json.loads(line)
        except ValueError:
            return
        if isinstance(number, int) and 0 <= number < count and isinstance(text, str):
            yield number, text


def server_answers(
    settings: EvaluateSettings,
    systems: Sequence[AdapterSource],
    task: Task,
    rows: Sequence[Row],
    *,
    template: str,
    label: str,
    watch: Watcher,
) -> list[str]:
    """Return a server's answers for an adapter, or for the base model.

    Args:
        settings: The evaluation.
        systems: The adapter; none for the base model.
        task: The task.
        rows: Its rows.
        template: Name of the prompt template.
        label: Name of the progress bar.
        watch: Receives progress.

    Raises:
        AdapterMixError: the server fails, or cannot do what the task or the adapter needs.
    """
    if any(system.meta.fusion for system in systems):
        raise PlanError(
            "no server runs adapters that fuse texts with their sources: evaluate them without --server.",
            code="server.fusion",
        )
    names = [system.name for system in systems] or [settings.base, Path(settings.base).name]
    server = Server(str(settings.server), model=settings.server_model, names=names, watch=watch)
    answering = ServerAnswering(server, settings.base, task, rows, settings, template=template, watch=watch)
    return answering(label)
