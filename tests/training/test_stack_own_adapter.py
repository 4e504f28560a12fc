"""The adapter that belongs to a stack acts once: every command refuses it on top of its stack."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adaptermix import (
    EvaluateSettings,
    RetrieveSettings,
    SearchSettings,
    StatisticsSettings,
    evaluate,
    merge,
    retrieve,
    search,
    statistics,
    train_task,
)
from adaptermix.adapters import open_adapter
from adaptermix.evaluation.retrieval import embed
from adaptermix.merging.on_model import acting, refuse_own_adapter

from ..evaluation.test_retrieval import brute_force
from ..refusals import refuses
from .stacks import TEXTS, loaded, write_texts
from .test_heads import settings_for, write_labels

CPU = {"device": "cpu", "dtype": "float32"}
OTHER_BASE = CPU | {"allow_base_mismatch": True}
"""The stack's adapter names the model on top as its base, so that some commands refuse it in any case."""


def parallel(folder: Path) -> list[str]:
    return [write_texts(folder, "de.txt", TEXTS[:6]), write_texts(folder, "en.txt", TEXTS[6:12])]


@pytest.fixture(scope="module")
def tuned(stack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    train_task(settings_for(stack, folder, head="auto", steps=1, out=str(folder / "tuned")))
    return folder / "tuned"


def in_retrieval(stack: Path, own: Path, _tuned: Path, folder: Path) -> None:
    retrieve(RetrieveSettings(base=str(stack), adapter=str(own), data=parallel(folder), **CPU))  # type: ignore[arg-type]


def as_candidates(stack: Path, own: Path, _tuned: Path, folder: Path) -> None:
    retrieve(RetrieveSettings(base=str(stack), candidates_from=str(own), data=parallel(folder), **CPU))  # type: ignore[arg-type]


def in_evaluation(stack: Path, own: Path, tuned: Path, folder: Path) -> None:
    data = [write_labels(folder)]
    evaluate(EvaluateSettings(base=str(stack), adapter=str(tuned), task="classify", data=data, **CPU))  # type: ignore[arg-type]
    with acting(loaded(stack), [open_adapter(tuned), open_adapter(own)], heads=False):
        pass


def in_search(stack: Path, own: Path, tuned: Path, folder: Path) -> None:
    search(
        SearchSettings(  # type: ignore[arg-type]
            adapters=[str(tuned), str(own)],
            base=str(stack),
            task="classify",
            dev=[write_labels(folder)],
            grid=[0.5],
            out=str(folder / "out"),
            allow_tested=True,
            allow_base_mismatch=True,
            **CPU,
        )
    )


def to_start_from(stack: Path, own: Path, _tuned: Path, folder: Path) -> None:
    train_task(settings_for(stack, folder, head="auto", steps=1, start_from=str(own)))


def to_train_on(stack: Path, own: Path, _tuned: Path, folder: Path) -> None:
    train_task(settings_for(stack, folder, head="auto", steps=1, on_top_of=str(own)))


def in_a_dry_run(stack: Path, own: Path, _tuned: Path, folder: Path) -> None:
    train_task(settings_for(stack, folder, head="auto", steps=1, on_top_of=str(own), dry_run=True))


def in_statistics(stack: Path, own: Path, _tuned: Path, folder: Path) -> None:
    texts = [write_texts(folder)]
    statistics(StatisticsSettings(adapter=str(own), base=str(stack), data=texts, out=str(folder / "s"), **OTHER_BASE))  # type: ignore[arg-type]


Use = Callable[[Path, Path, Path, Path], None]
USES: list[Use] = [
    in_retrieval, as_candidates, in_evaluation, in_search, to_start_from, to_train_on, in_a_dry_run, in_statistics,
]  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_it_is_refused_on_top_of_its_stack(use: Use, stack: Path, tuned: Path, tmp_path: Path) -> None:
    own = tmp_path / "copy"
    shutil.copytree(stack / "adapter", own)  # as a copy, which has another path
    with refuses("stack.own-adapter: is the stack's own adapter"):
        use(stack, own, tuned, tmp_path)


def test_a_merge_that_contains_it_is_refused(stack: Path, tmp_path: Path) -> None:
    merge([stack / "adapter", stack / "adapter"], weights=[0.5, 0.5], out=tmp_path / "merged")
    with refuses("stack.own-adapter: contains the stack's own adapter"):
        refuse_own_adapter(str(stack), [open_adapter(tmp_path / "merged")])


def test_it_acts_on_the_model_that_it_was_trained_on(stack: Path, top: Path, tuned: Path) -> None:
    """On the model alone it acts once, and adapters that were trained on the stack act on the stack."""
    refuse_own_adapter(str(top), [open_adapter(stack / "adapter")])
    refuse_own_adapter(str(stack), [open_adapter(tuned)])


def test_queries_of_a_stack_and_candidates_of_the_model_on_top(stack: Path, top: Path, tmp_path: Path) -> None:
    data = parallel(tmp_path)
    found = retrieve(
        RetrieveSettings(base=str(stack), data=data, candidates_from=str(top), to=["en"], **CPU)  # type: ignore[arg-type]
    )
    queries = embed(loaded(stack), TEXTS[:6], batch_size=6, max_length=64)
    candidates = embed(loaded(top), TEXTS[6:12], batch_size=6, max_length=64)
    assert list(found.n) == ["de-en"]
    for layer, (x, y) in enumerate(itertools.zip_longest(queries, candidates)):
        expected = [float(i == n) for n, i in enumerate(brute_force(x, y, 4))]
        assert list(found.hits[layer]["de-en"]) == expected
    assert not torch.equal(queries, embed(loaded(top), TEXTS[:6], batch_size=6, max_length=64))
