"""Bounded requests to the Hub: retries with growing pauses, time limits, and a limit on requested waits."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from importlib import import_module
from typing import Any, TypeVar

from ..errors import as_line
from ..progress import Watcher

Result = TypeVar("Result")
TRIES = 4
FIRST_PAUSE = 1.0
CONNECT_SECONDS, SILENT_SECONDS, ANSWER_SECONDS = 10.0, 60.0, 120.0
"""Limits: for a connection, for a server that sends nothing, and for a whole answer."""
MOST_WAIT = 120.0
"""Most seconds of waiting in total that a server may request from a push."""
_RATE = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d{1,12})")
"""The Hub's header when the rate limit is reached: seconds until new requests are allowed."""
_AGAIN = (408, 429, 500, 502, 503, 504)
_CONNECTION = {"TimeoutException", "NetworkError", "RemoteProtocolError", "ConnectionError", "TimeoutError"}
_INNER = ("/preupload/", "/info/lfs/", "/xet-")
"""Parts of the addresses of requests that huggingface_hub itself retries."""


class WaitTooLongError(Exception):
    """A server requested a longer wait than a push accepts."""


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a response asks to wait; None without such a request.

    Args:
        headers: Headers of the response: `Retry-After` as seconds or as a date, or `ratelimit` of the Hub.
    """
    if limit := _RATE.search(str(headers.get("ratelimit") or "")):
        return float(limit[1])
    text = str(headers.get("retry-after") or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time()) if text else None
    except (ValueError, OverflowError):
        return None


@contextmanager
def bounded() -> Iterator[None]:
    """Apply time limits to huggingface_hub's requests and refuse long waits while the context is open."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY
    waited = [0.0]

    def make() -> Any:
        client = before()
        http = import_module(type(client).__module__.partition(".")[0])
        hooks = client.event_hooks
        client.event_hooks = hooks | {
            "request": [*hooks.get("request", []), _limit],
            "response": [*hooks.get("response", []), lambda r: _look(r, http, waited)],
        }
        return client

    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(before)


def _limit(request: Any) -> None:
    """Set time limits of a request; some calls of huggingface_hub disable the client's."""
    limits = {"connect": CONNECT_SECONDS, "read": SILENT_SECONDS, "write": SILENT_SECONDS, "pool": SILENT_SECONDS}
    timeouts = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = {name: timeouts.get(name) or limit for name, limit in limits.items()}


def _look(response: Any, http: Any, waited: list[float]) -> None:
    """Refuse a response that requests a long wait, and limit the time for the rest of a response.

    Raises:
        WaitTooLongError: the requested waits are too long.
    """
    if response.status_code in _AGAIN and (seconds := asked_wait(response.headers)):
        waited[0] += seconds
        if waited[0] > MOST_WAIT:
            raise WaitTooLongError(
                f"{response.status_code} and asked to wait {seconds:,.0f} s; a push waits at most {MOST_WAIT:.0f} s in "
                f"all. Push again {'later' if seconds > 3600 else f'in {seconds / 60:.0f} minutes'}"
            )
    end = time.monotonic() + ANSWER_SECONDS
    stream = response.stream

    class Limited(http.SyncByteStream):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            for part in stream:
                if time.monotonic() > end:
                    raise http.ReadTimeout(f"an answer took more than {ANSWER_SECONDS:.0f} s")
                yield part

        def close(self) -> None:
            stream.close()

    response.stream = Limited()
    if response.status_code in _AGAIN and response.request.url.path.endswith("/validate-yaml"):
        from huggingface_hub.utils import _http

        response.read()  # huggingface_hub would parse a proxy's error page as JSON
        _http.hf_raise_for_status(response)


def reason_of(error: Exception) -> str:
    """Return the reason of a failed request on one line: a status with its message, or the kind of failure."""
    status = status_of(error)
    message = as_line(getattr(error, "server_message", None) or "", 300)
    if status is not None:
        phrase = as_line(getattr(getattr(error, "response", None), "reason_phrase", "") or "", 60)
        return f"{status} {phrase}{f': {message}' if message else ''}".strip()
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if not lines:
        return name
    return f"{name}: {as_line(lines[0], 300)}" if _is_connection(error) else as_line(" ".join(lines), 300)


def status_of(error: Exception) -> int | None:
    """Return the HTTP status of an error, or None."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_connection(error: Exception) -> bool:
    return any(kind.__name__ in _CONNECTION for kind in type(error).__mro__)


def is_passing(error: Exception) -> bool:
    """Return whether the same request may succeed later: a busy or failing server, a lost connection."""
    status = status_of(error)
    return status in _AGAIN if status is not None else _is_connection(error)


def repeatedly(call: Callable[[], Result], step: str, watch: Watcher) -> Result:
    """Return the result of a call, retrying after temporary failures: pauses of 1, 2 and 4 s, or as requested.

    Args:
        call: Makes the request.
        step: Name of the step, for messages.
        watch: Receives a note about each pause.

    Raises:
        Exception: the error of the last call.
    """
    pause = FIRST_PAUSE
    for number in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            if number == TRIES or not is_passing(error) or _was_repeated(error):
                raise
            headers = getattr(getattr(error, "response", None), "headers", {})
            seconds = max(pause, asked_wait(headers) or 0.0)
            watch.note(f"{step}: {reason_of(error)}; trying again in {seconds:.0f} s")
            time.sleep(seconds)
            pause *= 2
    raise AssertionError("the last try returns or raises")


def _was_repeated(error: Exception) -> bool:
    made = getattr(error, "response", None) or vars(error).get("_request")
    return any(part in str(getattr(made, "url", "")) for part in _INNER)
