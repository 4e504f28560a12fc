"""Which licence a derived model gets, and when a push stops because of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from adaptermix import push
from adaptermix.publish.licences import Parent, card_licence, choose, is_allowed, with_licence

from ..refusals import refuses
from .loopback import Hub, Repository
from .test_push import settings


@pytest.mark.parametrize(
    ("derived", "parent", "allowed"),
    [
        ("mit", "apache-2.0", True),
        ("llama3.1", "mit", True),
        ("mit", "llama3.1", False),
        ("llama3.2", "llama3.1", False),
        ("cc-by-nc-sa-4.0", "cc-by-nc-4.0", True),
        ("cc-by-4.0", "cc-by-nc-4.0", False),
        ("agpl-3.0", "gpl-3.0", True),
        ("gpl-3.0", "agpl-3.0", False),
        ("cc-by-nd-4.0", "cc-by-nd-4.0", False),
        ("mit", "other", None),
    ],
)
def test_what_a_parent_allows(derived: str, parent: str, allowed: bool | None) -> None:
    assert is_allowed(derived, parent) is allowed


@pytest.mark.parametrize(
    ("licences", "found"),
    [
        (["apache-2.0"], "apache-2.0"),
        (["mit", "apache-2.0"], "mit"),
        (["apache-2.0", "gemma"], "gemma"),
        (["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit"], "cc-by-nc-sa-4.0"),
        (["apache-2.0", None], "apache-2.0"),
        ([None, "apache-2.0"], None),
        (["other"], None),
        ([], None),
    ],
)
def test_the_licence_is_one_that_all_parents_allow(licences: list[str | None], found: str | None) -> None:
    parents = [Parent(name=str(n), licence=one, must_have=n == 0) for n, one in enumerate(licences)]
    assert choose(None, parents) == found


def test_parents_without_a_common_licence_stop_a_push() -> None:
    parents = [Parent(name="a", licence="llama3"), Parent(name="b", licence="gemma")]
    with refuses(r"push.license-conflict: a \(llama3\), b \(gemma\)"):
        choose(None, parents)
    with refuses("push.license-conflict: gemma"):
        choose("mit", [*parents[1:], parents[0]])
    with refuses("push.license-no-derivatives: c is under cc-by-nd-4.0"):
        choose("mit", [Parent(name="c", licence="cc-by-nd-4.0")])


def test_a_licence_is_added_to_a_header_and_the_rest_stays() -> None:
    for text in ("# Mine\n", "---\ntags: [a]\n---\n# Mine\n"):
        added = with_licence(text, "mit")
        assert added.endswith(text.removeprefix("---\n"))
        assert card_licence(added) == ModelCard(added).data.license == "mit"
    assert card_licence("---\nlicense: [\n---\n") is None


def test_the_licence_of_the_base_on_the_hub_is_taken(merged: Path, hub: Hub) -> None:
    hub.repositories["org/base"] = Repository(licence="Apache-2.0")
    report = push(settings(merged, license=None))
    assert ModelCard(report.card).data.license == "apache-2.0"
    assert hub.repositories["me/slots-merged"].files["README.md"].decode() == report.card


def test_a_conflict_with_the_base_on_the_hub_stops_before_a_repository_is_made(merged: Path, hub: Hub) -> None:
    hub.repositories["org/base"] = Repository(licence="llama3")
    with refuses("push.license-conflict: org/base must be under llama3, and the licence is mit"):
        push(settings(merged, license="mit"))
    hub.repositories["org/base"] = Repository(licence="other")
    with refuses("push.no-license: org/base"):
        push(settings(merged, license=None))
    del hub.repositories["org/base"]
    with refuses("push.no-license: org/base"):
        push(settings(merged, license=None))
    assert hub.repositories == {}
    assert any("--license" in note for note in push(settings(merged, license=None, dry_run=True)).notes)


def test_cards_of_parents_on_this_machine_count_without_a_network(merged: Path) -> None:
    (merged.parent / "align" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    with refuses("push.license-conflict: align must be under cc-by-nc-4.0, cc-by-nc-sa-4.0"):
        push(settings(merged, dry_run=True))
    push(settings(merged, license="cc-by-nc-sa-4.0", dry_run=True))


def test_an_edited_card_and_the_option_name_one_licence(merged: Path) -> None:
    text = (merged / "README.md").read_text()
    (merged / "README.md").write_text(with_licence(text, "apache-2.0"))
    with refuses("push.license-two: --license is mit, .*names apache-2.0"):
        push(settings(merged, dry_run=True))
    with refuses("push.license-name"):
        push(settings(merged, license="MIT License", dry_run=True))
