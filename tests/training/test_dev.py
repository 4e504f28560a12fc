"""Looks at the dev loss: when, of what, and what a run holds on to."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix import (
    AlignSettings,
    JointSettings,
    RetrieveSettings,
    TaskSettings,
    retrieve,
    train_align,
    train_joint,
    train_task,
)
from adaptermix.models.base import load_base
from adaptermix.tasks.data import read_pairs
from adaptermix.training.early_stopping import DevLosses
from adaptermix.training.task import TaskData

from ..refusals import refuses
from .data import Notes, write_pairs, write_slots
from .test_heads import settings_for as headed
from .test_joint import values


def joint(base: Path, folder: Path, **more: object) -> JointSettings:
    slots, pairs = write_slots(folder), write_pairs(folder)
    own: dict[str, object] = {"task": "slots", "train": [slots], "dev": [slots], "pairs": pairs, "steps": None}
    return JointSettings(**values(base, folder, **(own | more)))


@pytest.mark.parametrize(("alternate", "every"), [("step", 4), ("batch", 4), ("sum", 2)])
def test_a_look_is_taken_after_each_pass_over_the_tasks_rows(
    alternate: str, every: int, causal: Path, tmp_path: Path
) -> None:
    report = train_joint(joint(causal, tmp_path, alternate=alternate, batch_size=3, epochs=2))
    assert report.steps == 2 * every
    assert [entry["step"] for entry in report.history if "dev_task_loss" in entry] == [every, 2 * every]


@pytest.mark.parametrize("every", [None, 5])
def test_a_run_that_is_shorter_than_a_pass_is_looked_at_when_it_ends(
    every: int | None, causal: Path, tmp_path: Path
) -> None:
    slots = write_slots(tmp_path)
    own = {"task": "slots", "train": [slots], "dev": [slots], "patience": 1, "evaluate_every": every}
    report = train_task(TaskSettings(**values(causal, tmp_path, **own, batch_size=2, steps=2)))
    assert [entry["step"] for entry in report.history if "dev_loss" in entry] == [2]
    assert report.kept == 2


def test_the_sum_weighs_alignment_as_training_does(causal: Path, tmp_path: Path) -> None:
    settings = joint(causal, tmp_path, steps=2, dev_pairs=write_pairs(tmp_path), align_weight=0.1, evaluate_every=2)
    entry = next(entry for entry in train_joint(settings).history if "dev_sum_loss" in entry)
    assert entry["dev_sum_loss"] == pytest.approx(entry["dev_task_loss"] + 0.1 * entry["dev_align_loss"])


def test_a_dev_loss_does_not_depend_on_the_batches(causal: Path, tmp_path: Path) -> None:
    settings = TaskSettings(**values(causal, tmp_path, task="slots", train=[write_slots(tmp_path)]))
    data, base = TaskData.read(settings), load_base(str(causal), dtype="float32", device="cpu")
    rows = data.objective(base, data.train, settings.max_length)
    found = [
        DevLosses(base, {"dev": rows}, settings.model_copy(update={"batch_size": size}))()["dev"] for size in (1, 4, 6)
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_a_run_does_not_go_on_with_another_dev_set(causal: Path, tmp_path: Path) -> None:
    import adaptermix.training.runner as module

    slots = write_slots(tmp_path)
    dev = write_slots(tmp_path, "dev.en.jsonl")
    settings = TaskSettings(**values(causal, tmp_path, task="slots", train=[slots], dev=[dev], patience=3))

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_documents", die)
        with pytest.raises(KeyboardInterrupt):
            train_task(settings)
    Path(dev).write_text("".join(Path(dev).read_text().splitlines(keepends=True)[:3]))
    with refuses("run.settings: dev"):
        train_task(settings.model_copy(update={"resume": True}))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"dora": True, "on_top_of": "adapter"}, "train.on-top-of-dora"),
        ({"pooling": "bos", "exclude_bos": True}, "pooling.exclude-bos"),
        ({"anchor": "base", "stop_gradient": True}, "align.anchor"),
        ({"alternate": "sum", "discard": True}, "joint.discard"),
        ({"head": "classes", "template": "plain"}, "head.no-template"),
    ],
)
def test_options_that_would_do_nothing_or_harm_are_refused(
    more: dict[str, object], says: str, causal: Path, tmp_path: Path
) -> None:
    with refuses(says):
        joint(causal, tmp_path, **more)


def test_pairs_without_negatives_are_refused(causal: Path, tmp_path: Path) -> None:
    (tmp_path / "de-en.tsv").write_text("rot\tred\n" * 5)
    settings = AlignSettings(**values(causal, tmp_path, pairs=[str(tmp_path / "de-en.tsv")]))
    with refuses("align.too-few-pairs: pairs"):
        train_align(settings)


def test_the_first_token_of_a_language_model_is_no_sentence_vector(causal: Path, tmp_path: Path) -> None:
    settings = AlignSettings(**values(causal, tmp_path, pairs=write_pairs(tmp_path), pooling="bos"))
    with refuses("pooling.bos"):
        train_align(settings)


def test_rows_that_are_cut_are_told(causal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from adaptermix.cli.console import Lines

    settings = TaskSettings(**values(causal, tmp_path, task="slots", train=[write_slots(tmp_path)], max_length=24))
    train_task(settings, watch=Lines())
    assert "6 of 6 (en 6) rows are longer than 24 tokens (--max-length)" in capsys.readouterr().err


def test_alignment_on_top_of_an_adapter_with_a_head_and_its_retrieval(encoder: Path, tmp_path: Path) -> None:
    from adaptermix import EvaluateSettings, evaluate, merge

    task = headed(encoder, tmp_path)
    train_task(task)
    pairs = write_pairs(tmp_path)
    on_top = {"pairs": pairs, "on_top_of": task.out, "out": str(tmp_path / "align")}
    train_align(AlignSettings(**values(encoder, tmp_path, **on_top)))
    merge([task.out, str(tmp_path / "align")], weights=[1.0, 1.0], out=tmp_path / "both")
    place = {"base": str(encoder), "dtype": "float32", "device": "cpu"}
    found = [
        retrieve(RetrieveSettings(adapter=adapter, data=pairs[:1], **place)).layers  # type: ignore[arg-type]
        for adapter in (task.out, str(tmp_path / "both"), None)
    ]
    assert len({len(layers) for layers in found}) == 1
    data = {"task": "classify", "data": task.train, "adapter": str(tmp_path / "both")}
    assert evaluate(EvaluateSettings(**place, **data)).overall.n == 12  # type: ignore[arg-type]


def test_a_header_of_pairs_is_no_pair(tmp_path: Path) -> None:
    (tmp_path / "de-en.csv").write_text("source,target\nrot,red\n")
    assert [pair.source for pair in read_pairs([str(tmp_path / "de-en.csv")])[0]] == ["rot"]


def test_pairs_without_a_side_in_training_too_or_too_long_are_counted(causal: Path, tmp_path: Path) -> None:
    notes, files = Notes(), write_pairs(tmp_path)
    settings = joint(causal, tmp_path, steps=1, dev_pairs=files[:1], max_length=30)
    with Path(files[1]).open("a") as file:
        file.write(f"quatre\t\n{'x' * 40}\tlong\n")
    train_joint(settings, watch=notes)
    assert "1 of 17 pairs lack a side, a label or an answer and are left out." in notes.said
    assert any(note.startswith("warning: 12 of 12 dev pairs are also in the training pairs") for note in notes.said)
    assert "1 of 16 (fr 1) source sentences are longer than 30 tokens (--max-length) and lose their ends." in notes.said
    assert sum("are also in" in note for note in notes.said) == 2  # the task's rows have their own


def test_dev_losses_are_told_without_patience_too(causal: Path, tmp_path: Path) -> None:
    files = [write_slots(tmp_path)]
    own = {"task": "slots", "train": files, "dev": files, "steps": 4, "evaluate_every": 2}
    report = train_task(TaskSettings(**values(causal, tmp_path, **own)))
    looks = [entry["dev_loss"] for entry in report.history if "dev_loss" in entry]
    assert len(looks) == 2
    assert report.document()["dev"] == {"dev_loss": {"first": looks[0], "last": looks[1], "best": min(looks)}}
