"""What every task must satisfy, as tests to inherit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..errors import DataError
from ..tasks import ComparableTask, JoinableTask, LabelTask, MarkedTask, Metric, SpanTask, Task, TokenTask
from ..tasks.data.tables import Recognisable

_LAW = settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def _value(metric: Metric, rows: Sequence[Recognisable], answers: Sequence[str]) -> float:
    """Return the value of a metric over the rows that it can score."""
    counts = [metric.count(row, answer) for row, answer in zip(rows, answers, strict=True)]
    kept = np.array([count for count in counts if count is not None], dtype=np.float64)
    assert len(kept), f"{metric.name} must be able to score a row of the data"
    return float(metric.value(kept.sum(0)))


class TaskLaws:
    """Laws of a task. Name a subclass TestSomething, and set `task` and `data` in it.

    Attributes:
        task: The task that is tested.
        data: Text of small data files by name, such as `de.tsv`. Together they have at least three rows with different
            texts, none of which is left out.
    """

    task: Task
    data: Mapping[str, str]

    @pytest.fixture
    def files(self, tmp_path: Path) -> list[str]:
        for name, text in self.data.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        return [str(tmp_path / name) for name in self.data]

    @pytest.fixture
    def rows(self, files: list[str]) -> Sequence[Recognisable]:
        return self.task.read(files)[0]

    def test_the_name_is_one_word(self) -> None:
        """Recipes, manifests and the command line use the unchanged name."""
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.task.name), "a name is lower case, with hyphens"

    def test_reading_is_repeatable_and_reports_every_file(self, files: list[str]) -> None:
        """Equal files give equal rows."""
        (rows, used), (again, _) = self.task.read(files), self.task.read(files)
        assert list(rows) == list(again), "reading twice must give equal rows"
        assert [str(file.path) for file in used] == files, "reading must return its files, in order"
        assert all(file.used is not None for file in used), "files must be marked with the rows that were used"

    def test_rows_can_be_picked(self, files: list[str]) -> None:
        """`--rows 1:` leaves out the first row of each file."""
        whole, _ = self.task.read(files)
        part, used = self.task.read(files, rows="1:")
        assert len(part) < len(whole), "`rows` must pick rows of each file"
        assert all(row in whole for row in part), "`rows` must only pick rows"
        assert all(file.used and file.used.picked == "1:" for file in used), "files must be marked with the choice"

    def test_a_file_that_cannot_be_read_is_one_sentence(self, tmp_path: Path) -> None:
        """Faults of data files are `DataError`s of one line that name the file."""
        empty, absent = tmp_path / "de-en.jsonl", tmp_path / "absent.jsonl"
        empty.write_text("\n\n", encoding="utf-8")
        for path in (empty, absent):
            with pytest.raises(DataError) as caught:
                self.task.read([str(path)])
            assert path.name in str(caught.value), "the message must name the file"
            assert "\n" not in str(caught.value), "the message must be one line"

    def test_rows_have_texts_a_language_and_an_answer(self, rows: Sequence[Recognisable]) -> None:
        """Training, evaluation and the protection of test data need all of them."""
        assert len(rows) >= 3, "the data must have three rows"
        for row in rows:
            assert self.task.texts(row), "a row must have a text"
            assert all(isinstance(text, str) and text.strip() for text in self.task.texts(row)), "texts must be text"
            assert self.task.language(row), "a row must have a language"
            assert self.task.answer(row).strip(), "a row must have an answer"
            assert all(isinstance(part, str) for part in self.task.evidence(row)), "evidence must be text"
            if self.task.one_line:
                assert len(self.task.answer(row).splitlines()) == 1, "the answer of a one-line task must be one line"
        assert len({row.row_texts for row in rows}) == len(rows), "rows must be recognised by their `row_texts`"

    def test_every_template_can_be_filled_in(self, rows: Sequence[Recognisable]) -> None:
        """Templates use placeholders that `fields` has, and prompts show each row's texts."""
        assert self.task.templates, "a task must have a template"
        for name, template in self.task.templates.items():
            assert name == template.name, "templates must be listed by name"
            for row in rows:
                fields = self.task.fields(row)
                if template.turns:
                    assert all(len(turn) == 2 for turn in fields[template.turns]), "turns are (role, content)"  # type: ignore[attr-defined]
                    continue
                prompt = (template.system or "").format_map(fields) + template.prompt.format_map(fields)
                missing = [text for text in self.task.texts(row) if text not in prompt]
                assert not missing, f"the prompt of template {name!r} must show the row's texts, and lacks {missing}"

    def test_right_answers_have_the_best_score(self, rows: Sequence[Recognisable]) -> None:
        """No metric prefers empty answers, and the headline metric distinguishes them from right ones."""
        right = [self.task.answer(row) for row in rows]
        metrics = self.task.metrics(rows)
        assert len({metric.name for metric in metrics}) == len(metrics) > 0, "metrics must have different names"
        for metric in metrics:
            best, worst = (_value(metric, rows, answers) for answers in (right, [""] * len(rows)))
            assert best >= worst, f"right answers must not score below empty ones ({metric.name})"
            assert best > worst or metric is not metrics[0], f"{metric.name} must prefer right answers to empty ones"

    @_LAW
    @given(data=st.data())
    def test_any_answer_can_be_scored(self, rows: Sequence[Recognisable], data: st.DataObject) -> None:
        """Models write any text; a row has equally many counts for every answer, and right answers score best."""
        pieces = st.one_of(st.text(), st.sampled_from([self.task.answer(row) for row in rows]))
        answers = [data.draw(st.one_of(pieces, st.tuples(pieces, pieces).map("\n".join))) for _ in rows]
        for metric in self.task.metrics(rows):
            counts = [metric.count(row, answer) for row, answer in zip(rows, answers, strict=True)]
            assert len({len(count) for count in counts if count is not None}) <= 1, (
                f"{metric.name} must give equally many counts for every row and answer"
            )
            value = _value(metric, rows, answers)
            best = _value(metric, rows, [self.task.answer(row) for row in rows])
            assert np.isfinite(value), f"{metric.name} must be finite, got {value}"
            assert value <= best + 1e-9, f"{metric.name} of right answers must be the largest"

    def test_values_are_functions_of_sums(self, rows: Sequence[Recognisable]) -> None:
        """The bootstrap passes the sums of many resamples to `value` at once."""
        for metric in self.task.metrics(rows):
            counts = [metric.count(row, answer) for row in rows for answer in (self.task.answer(row), "")]
            sums = np.array([count for count in counts if count is not None], dtype=np.float64)
            together, alone = metric.value(sums), [float(metric.value(each)) for each in sums]
            assert np.allclose(together, alone), f"{metric.name} of a batch of sums must equal each value"

    def test_labels_are_the_answers(self, rows: Sequence[Recognisable]) -> None:
        """The classes of a classification head are the answers of the task."""
        if isinstance(self.task, LabelTask):
            assert {self.task.answer(row) for row in rows} <= set(self.task.labels(rows)), "answers must be labels"
            assert all(1 <= len(self.task.segments(row)) <= 2 for row in rows), "one or two texts are classified"

    def test_tags_stand_for_the_answers(self, rows: Sequence[Recognisable]) -> None:
        """A token classification head that is right has the score of the right answer."""
        if not isinstance(self.task, TokenTask):
            return
        tagged = [self.task.answer_from_tags(row, self.task.tags(row)) for row in rows]
        assert all(len(self.task.words(row)) == len(self.task.tags(row)) for row in rows), "each word must have a tag"
        for metric in self.task.metrics(rows):
            right = _value(metric, rows, [self.task.answer(row) for row in rows])
            assert _value(metric, rows, tagged) == right, f"right tags must score fully ({metric.name})"

    def test_spans_stand_for_the_answers(self, rows: Sequence[Recognisable]) -> None:
        """A question answering head that is right gives the right answer, also on an excerpt of the text."""
        if not isinstance(self.task, SpanTask):
            return
        for row in rows:
            span = self.task.span(row)
            if self.task.lacks_its_answer(row):
                assert span is None, "a row whose answers are not in its text has no span"
                continue
            assert self.task.answer_at(row, span) == self.task.answer(row), "the span must be the answer"
            part = self.task.excerpt(row, 1)
            assert self.task.answer_at(part, self.task.span(part)) == self.task.answer(row), "excerpts keep the answer"

    def test_choices_are_found_in_their_text(self, rows: Sequence[Recognisable]) -> None:
        """A head that scores choices reads each choice once, after the passage."""
        if not isinstance(self.task, MarkedTask):
            return
        for row in rows:
            marked, options = self.task.marked(row), self.task.options(row)
            ends = [marked.passage[1], *(end for _, end in marked.spans)]
            assert len(marked.spans) == len(options), "each option must have a span"
            assert self.task.answer(row) in options, "the answer must be an option"
            for (start, end), before in zip(marked.spans, ends, strict=False):
                assert before <= start < end <= len(marked.text), "spans must follow the passage and each other"

    def test_answers_can_be_given_to_rows_without_any(self, rows: Sequence[Recognisable]) -> None:
        """Answers of one model can serve as labels for another."""
        if isinstance(self.task, ComparableTask):
            for row in rows:
                (text,) = self.task.texts(row)
                bare = self.task.unlabelled(text, self.task.language(row))
                assert self.task.texts(bare) == (text,), "an unlabelled row is about its text"
                assert self.task.answer(self.task.labelled(bare, self.task.answer(row))) == self.task.answer(row), (
                    "a labelled row has the answer that it was given"
                )
            assert self.task.agreement(rows), "answers in two languages are compared by a metric"

    def test_sources_come_before_the_texts(self, rows: Sequence[Recognisable]) -> None:
        """Input-level fusion puts the source before the text, and the right answer stays the same."""
        if isinstance(self.task, JoinableTask):
            for row, source in zip(rows, [*rows[1:], rows[0]], strict=True):
                both = self.task.with_source(row, source)
                assert self.task.answer(both) == self.task.answer(row), "the source must not change the answer"
                for text, first, last in zip(*map(self.task.texts, (both, source, row)), strict=True):
                    assert text.startswith(first), "the source must precede the text"
                    assert text.endswith(last), "the row's text must follow the source"
