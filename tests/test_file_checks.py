"""Checks of outputs and inputs before any work starts."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from adaptermix.errors import OutputError
from adaptermix.io.files import (
    check_not_input,
    check_output,
)

from .factories import contents
from .refusals import refuses
from .test_files import adapter


class TestCheckOutput:
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_new_folder_is_accepted_and_not_made(self, tmp_path: Path, overwrite: bool) -> None:
        check_output(tmp_path / "a" / "b" / "out", overwrite=overwrite)
        assert contents(tmp_path) == {}

    @pytest.mark.parametrize("mark", ["adapter_config.json", "adaptermix.json"])
    def test_an_adapter_folder_is_accepted_with_overwrite_only(self, tmp_path: Path, mark: str) -> None:
        (tmp_path / mark).write_text("{}")
        check_output(tmp_path, overwrite=True)
        with refuses("output.exists"):
            check_output(tmp_path, overwrite=False)

    def test_an_empty_folder_is_accepted_with_overwrite(self, tmp_path: Path) -> None:
        check_output(tmp_path, overwrite=True)

    def test_a_folder_of_something_else_is_never_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with refuses(r"output.not-adapter: adaptermix\.json nor adapter_config"):
            check_output(tmp_path, overwrite=True)

    @pytest.mark.parametrize("other", ["thesis.tex", "nested/notes", "empty/", "link", ".hidden"])
    def test_a_folder_with_a_file_that_its_manifest_does_not_list_is_refused_by_name(
        self, tmp_path: Path, other: str
    ) -> None:
        out = adapter(tmp_path / "out")
        if other == "link":
            (out / other).symlink_to(out / "nested" / "file")
        elif other.endswith("/"):
            (out / other).mkdir()
        else:
            (out / other).write_text("years of work")
        with refuses(f"output.other-files: '{other}'"):
            check_output(out, overwrite=True)

    def test_a_card_that_somebody_edited_is_not_replaced(self, tmp_path: Path) -> None:
        folder, card = adapter(tmp_path / "out"), tmp_path / "out" / "README.md"
        document = {
            "files": ["adapter_config.json", "nested/file", "README.md"],
            "card_sha256": hashlib.sha256(b"as written").hexdigest(),
        }
        (folder / "adaptermix.json").write_text(json.dumps(document))
        card.write_text("as written")
        check_output(folder, overwrite=True)
        card.write_text("as written, and more")
        with refuses("output.edited-card"):
            check_output(folder, overwrite=True)

    @pytest.mark.parametrize("out", [".", "..", "../here/..", "inside/.."])
    def test_the_current_folder_and_its_parents_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
    ) -> None:
        adapter(tmp_path / "here" / "inside")
        monkeypatch.chdir(tmp_path / "here")
        with refuses("output.current-folder"):
            check_output(Path(out), overwrite=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_file_is_refused(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "out").write_text("a file")
        with pytest.raises(OutputError):
            check_output(tmp_path / "out", overwrite=overwrite)

    def test_a_dangling_link_counts_as_existing(self, tmp_path: Path) -> None:
        (tmp_path / "out").symlink_to(tmp_path / "nowhere")
        with refuses("output.exists"):
            check_output(tmp_path / "out", overwrite=False)

    def test_a_folder_under_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("a file")
        with refuses("output.parent-not-writable"):
            check_output(tmp_path / "file" / "out", overwrite=False)

    def test_a_folder_that_may_not_be_written_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
        with refuses("output.parent-not-writable"):
            check_output(tmp_path / "out", overwrite=False)


class TestCheckNotInput:
    @pytest.fixture
    def farm(self, tmp_path: Path) -> Path:
        """Two adapters, one inside the other's folder, and links to them."""
        adapter(tmp_path / "outer")
        adapter(tmp_path / "outer" / "inner")
        (tmp_path / "to-outer").symlink_to("outer")
        (tmp_path / "to-inner").symlink_to(tmp_path / "outer" / "inner")
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "adapter_config.json").symlink_to(tmp_path / "outer" / "inner" / "adapter_config.json")
        return tmp_path

    @pytest.mark.parametrize(
        ("out", "given", "match"),
        [
            ("outer", "outer", "output.is-input"),
            ("outer/", "to-outer", "output.is-input"),
            ("to-outer", "outer", "output.is-input"),
            ("outer/inner/..", "outer", "output.is-input"),
            ("outer", "outer/inner", "output.holds-input"),
            ("outer", "to-inner", "output.holds-input"),
            ("outer", "to-outer/inner/nested/../nested/file", "output.holds-input"),
            ("outer", "linked", "output.holds-input"),
            ("to-outer", "linked", "output.holds-input"),
            ("outer/inner", "outer", "output.in-input"),
            ("new", "./new", "output.is-input"),
        ],
    )
    def test_an_input_is_found_by_whatever_path(
        self, farm: Path, monkeypatch: pytest.MonkeyPatch, out: str, given: str, match: str
    ) -> None:
        monkeypatch.chdir(farm)
        with refuses(match):
            check_not_input(Path(out), [given])

    @pytest.mark.parametrize(("out", "given"), [("outer-2", "outer"), ("outer/new", "outer"), ("outer", "org/outer")])
    def test_other_folders_are_accepted(
        self, farm: Path, monkeypatch: pytest.MonkeyPatch, out: str, given: str
    ) -> None:
        monkeypatch.chdir(farm)
        check_not_input(Path(out), [given])
