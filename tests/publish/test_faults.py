"""A Hub that fails, is busy, does not answer, or asks for patience."""

from __future__ import annotations

import json
import time
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from adaptermix import PushSettings, push
from adaptermix.errors import PublishError
from adaptermix.publish import patience

from ..factories import contents
from ..refusals import refuses
from .loopback import Fault, Hub, Repository

CREATE, VALIDATE, PREUPLOAD, COMMIT, LOOK = (
    "/repos/create",
    "/validate-yaml",
    "/preupload/",
    "/commit/",
    "/api/models/me/x",
)


def pushed(folder: Path, **more: Any) -> str | None:
    return push(PushSettings(folder=str(folder), repo="me/x", license="mit", **more)).url


def refusal(folder: Path, **more: Any) -> str:
    before = contents(folder)
    with pytest.raises(PublishError) as caught:
        pushed(folder, **more)
    text = str(caught.value)
    assert "\n" not in text
    assert "hf_secret_token" not in text
    assert contents(folder) == before
    return text


@pytest.mark.parametrize("step", [LOOK, CREATE, VALIDATE, PREUPLOAD, COMMIT])
@pytest.mark.parametrize("kind", ["429", "500", "502 with a page", "503", "dropped"])
def test_a_failure_that_passes_is_tried_again_and_there_is_one_commit(
    step: str, kind: str, merged: Path, hub: Hub, pauses: list[float]
) -> None:
    status = 0 if kind == "dropped" else int(kind[:3])
    hub.faults.append(Fault(step, status, times=2, page="page" in kind))
    assert pushed(merged) == f"{hub.url}/me/x"
    assert len(hub.repositories["me/x"].commits) == 1
    assert len(hub.repositories["me/x"].files) == 4
    assert pauses == [1.0, 2.0]


@pytest.mark.parametrize("step", [CREATE, VALIDATE, COMMIT])
def test_tries_end_and_the_reason_stays(step: str, merged: Path, hub: Hub, pauses: list[float]) -> None:
    hub.faults.append(Fault(step, 503, message="The Hub is under maintenance"))
    text = refusal(merged)
    assert "503 Service Unavailable" in text
    assert "push again later" in text
    assert pauses == [1.0, 2.0, 4.0]
    assert hub.count(step) == patience.TRIES
    if step != VALIDATE:
        assert "The Hub is under maintenance" in text


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "hf auth login"),
        (403, "a token that may write there"),
        (404, "Look at the name"),
        (409, "push again"),
        (412, "Another commit changed the repository"),
        (413, "no files that large"),
    ],
)
def test_a_refusal_of_the_commit_keeps_its_reason_and_says_what_is_there(
    status: int, advice: str, merged: Path, hub: Hub, pauses: list[float]
) -> None:
    hub.faults.append(Fault(COMMIT, status, message="Storage quota of me is used up"))
    text = refusal(merged)
    assert f"pushing to me/x failed while committing: {status} " in text
    assert "Storage quota of me is used up" in text
    assert advice in text
    assert "The public repository was made and is empty" in text
    assert pauses == []
    assert hub.count(COMMIT) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_creation_says_that_nothing_was_made(status: int, merged: Path, hub: Hub) -> None:
    hub.faults.append(
        Fault(CREATE, status, message="You don't have the rights to create a model under the namespace me")
    )
    text = refusal(merged)
    assert "the rights to create a model under the namespace me" in text
    assert "No repository was made" in text
    assert hub.repositories == {}


def test_a_repository_that_was_there_is_said_to_be_as_before(merged: Path, hub: Hub) -> None:
    hub.repositories["me/x"] = Repository()
    hub.faults.append(Fault(COMMIT, 403, message="no"))
    assert "The repository existed before, and no commit was made" in refusal(merged)


def test_a_lost_answer_of_a_commit_makes_no_second_one(merged: Path, hub: Hub) -> None:
    hub.faults.append(Fault(COMMIT, 0, times=1, after=True))
    assert pushed(merged) == f"{hub.url}/me/x"
    assert len(hub.repositories["me/x"].commits) == 1
    assert hub.count(COMMIT) == 1


def test_a_lost_answer_of_the_creation_is_no_failure(merged: Path, hub: Hub) -> None:
    hub.faults.append(Fault(CREATE, 0, times=1, after=True))
    pushed(merged, private=True)
    assert hub.repositories["me/x"].private
    assert len(hub.repositories["me/x"].commits) == 1


def test_somebody_elses_commit_in_between_stops_the_push(merged: Path, hub: Hub) -> None:
    hub.repositories["me/x"] = Repository(files={"README.md": b"of somebody else"})
    hub.faults.append(Fault(COMMIT, 500, times=1))
    asked = hub.fault_for

    def fault_for(path: str) -> Fault | None:
        found = asked(path)
        if found:
            hub.repositories["me/x"].commits.append({})
        return found

    hub.fault_for = fault_for  # type: ignore[method-assign]
    assert "was changed by another commit" in refusal(merged)
    assert hub.repositories["me/x"].files == {"README.md": b"of somebody else"}


@pytest.mark.parametrize("step", [LOOK, CREATE, VALIDATE, PREUPLOAD, COMMIT])
@pytest.mark.parametrize("form", ["seconds", "date", "ratelimit"])
def test_a_server_that_asks_for_an_hour_is_not_waited_for(
    step: str, form: str, merged: Path, hub: Hub, pauses: list[float]
) -> None:
    headers = {
        "seconds": {"Retry-After": "3600"},
        "date": {"Retry-After": formatdate(time.time() + 3600, usegmt=True)},
        "ratelimit": {"ratelimit": '"api";r=0;t=3600'},
    }[form]
    hub.faults.append(Fault(step, 429, headers=headers))
    text = refusal(merged)
    assert "429 and asked to wait 3,600 s" in text or "429 and asked to wait 3,599 s" in text
    assert "a push waits at most 120 s" in text
    assert pauses == []


def test_a_short_wait_is_taken_and_many_of_them_are_not(merged: Path, hub: Hub, pauses: list[float]) -> None:
    hub.faults.append(Fault(COMMIT, 429, times=1, headers={"Retry-After": "30"}))
    pushed(merged)
    assert pauses == [30.0]
    hub.faults.append(Fault(COMMIT, 429, headers={"Retry-After": "50"}))
    (merged / "README.md").write_text("# Another\n")
    assert "asked to wait 50 s" in refusal(merged)
    assert pauses == [30.0, 50.0, 50.0]


@pytest.mark.parametrize("step", [LOOK, CREATE, COMMIT])
def test_an_answer_that_trickles_ends(
    step: str, merged: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setattr(patience, "ANSWER_SECONDS", 0.1)
    hub.faults.append(Fault(step, 200, slow=True, times=patience.TRIES))
    assert "an answer took more than" in refusal(merged)
    assert pauses == [1.0, 2.0, 4.0]


def test_a_server_that_says_nothing_is_left(merged: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    import socket

    from huggingface_hub import constants

    monkeypatch.setattr(patience, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        text = refusal(merged)
    assert "failed while looking for the repository: ReadTimeout" in text
    assert "No repository was made" in text
    assert pauses == [1.0, 2.0, 4.0]


def test_no_server_at_all(merged: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "Check the network" in refusal(merged)
    assert pauses == [1.0, 2.0, 4.0]


def test_large_files_go_another_way_and_arrive(merged: Path, hub: Hub) -> None:
    hub.large = True
    hub.faults.append(Fault("/upload/", 500, times=1))
    pushed(merged)
    weights = (merged / "adapter_model.safetensors").read_bytes()
    assert hub.repositories["me/x"].files["adapter_model.safetensors"] == weights
    assert len(hub.repositories["me/x"].commits) == 1


def test_a_branch_is_made_before_it_is_pushed_to(merged: Path, hub: Hub) -> None:
    hub.faults.append(Fault("/branch/", 500, times=1))
    pushed(merged, revision="v2")
    paths = [path for _, path in hub.requests]
    assert paths.index("/api/models/me/x/branch/v2") < paths.index("/api/models/me/x/commit/v2")


def test_words_of_a_server_are_escaped(merged: Path, hub: Hub) -> None:
    hub.faults.append(Fault(COMMIT, 403, message="\x1b]0;owned\x07\u202e" + "x" * 10_000))
    text = refusal(merged)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert len(text) < 900


def test_huggingface_hub_is_left_as_it_was(merged: Path, hub: Hub) -> None:
    from huggingface_hub.utils import _http

    before = _http._GLOBAL_CLIENT_FACTORY
    pushed(merged)
    assert _http._GLOBAL_CLIENT_FACTORY is before


@pytest.mark.parametrize("step", [LOOK, CREATE, PREUPLOAD, COMMIT])
def test_a_wrong_answer_is_a_failure_that_keeps_the_token(step: str, merged: Path, hub: Hub) -> None:
    hub.faults.append(Fault(step, 200, page=True))
    assert "pushing to me/x failed while" in refusal(merged)
    assert not hub.repositories.get("me/x", Repository()).commits


@pytest.mark.parametrize("after", [False, True])
def test_a_pull_request_is_opened_once_also_if_its_answer_is_lost(after: bool, merged: Path, hub: Hub) -> None:
    hub.repositories["me/x"] = Repository(requests=[{"README.md": b"of somebody else"}])
    hub.faults.append(Fault(COMMIT, 0, times=1, after=after))
    assert pushed(merged, create_pr=True) == f"{hub.url}/me/x/discussions/2"
    assert len(hub.repositories["me/x"].requests) == 2
    assert hub.repositories["me/x"].requests[1]["adapter_model.safetensors"]
    assert hub.repositories["me/x"].commits == []


def test_a_pull_request_needs_a_repository_and_the_main_branch(merged: Path, hub: Hub) -> None:
    with refuses("push.no-repository"):
        pushed(merged, create_pr=True)
    assert hub.repositories == {}
    for more, code in (({"revision": "v2"}, "push.request-of-branch"), ({"tag": "v1"}, "push.tag-of-request")):
        with refuses(code):
            pushed(merged, create_pr=True, **more)


@pytest.mark.parametrize("after", [False, True])
def test_a_tag_is_set_once_and_must_be_new(after: bool, merged: Path, hub: Hub) -> None:
    hub.faults.append(Fault("/tag/", 0, times=1, after=after))
    pushed(merged, tag="v1.0")
    repository = hub.repositories["me/x"]
    assert repository.tags == {"v1.0": repository.head}
    (merged / "README.md").write_text("# Another\n")
    with refuses("push.tag-exists: v1.0"):
        pushed(merged, tag="v1.0")
    assert len(repository.commits) == 1


def test_a_tag_that_is_refused_is_said_to_be_all_that_is_missing(merged: Path, hub: Hub) -> None:
    hub.faults.append(Fault("/tag/", 403, message="no tags"))
    assert "The files were committed, and only the tag is missing" in refusal(merged, tag="v1")
    assert len(hub.repositories["me/x"].commits) == 1


def test_a_card_that_was_edited_on_the_hub_stays(merged: Path, hub: Hub) -> None:
    pushed(merged)
    repository = hub.repositories["me/x"]
    edited = repository.files["README.md"] + b"\nMore, by hand.\n"
    repository.files["README.md"] = edited
    for _ in range(2):
        pushed(merged, base_id="org/other")
        assert repository.files["README.md"] == edited
        assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] == "org/other"
    (merged / "README.md").write_text("# Here too\n")
    assert "edited both here and in me/x" in refusal(merged)
    repository.files["README.md"] = b"---\nlicense: mit\n---\n"
    pushed(merged)
    assert repository.files["README.md"].endswith(b"# Here too\n")
