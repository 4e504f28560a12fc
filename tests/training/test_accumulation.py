"""Rows weigh the same however they are split into batches and processes: the step is that of one large batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptermix import AlignSettings, FusionSettings, JointSettings, TaskSettings, train_task
from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.blocks import keep_blocks
from adaptermix.tasks.data import read_pairs
from adaptermix.training import align, fusion
from adaptermix.training.early_stopping import DevLosses
from adaptermix.training.joint import JointLoss, own_batches
from adaptermix.training.lora import factors, inject
from adaptermix.training.losses import contrastive_loss, keeper_loss
from adaptermix.training.parallel import Processes
from adaptermix.training.task import TaskData, TaskLoss

from .data import write_pairs
from .test_joint import values

SPLITS = [(8, 1, 1), (4, 2, 1), (1, 8, 1), (8, 1, 2), (4, 2, 2), (2, 4, 3), (1, 8, 2)]
"""Rows per batch, batches per step, processes."""

WORDS = ["go", "rome", "bern", "oslo", "now", "late", "home", "there"]


def _rows(task: str) -> list[dict[str, Any]]:
    """Eight rows whose answers, words and windows differ in number."""
    texts = [" ".join(WORDS[: 1 + row]) for row in range(8)]
    made: dict[str, Callable[[int, str], dict[str, Any]]] = {
        "slots": lambda row, text: {"text": text, "slots": [{"type": "x", "value": w} for w in text.split()[:row]]},
        "classify": lambda row, text: {"text": text, "label": ("a", "quite long label")[row % 2]},
        "nli": lambda row, text: {"premise": text, "hypothesis": "go", "label": row % 3},
        "ner-json": lambda row, text: {"tokens": text.split(), "ner_tags": ["B-LOC"] + ["I-LOC"] * row},
        "qa": lambda row, text: {"question": "where?", "context": text, "answers": [text[: 2 + row].strip()]},
        "sft": lambda row, text: {"prompt": "say", "answer": f"{text} " * (1 + row)},
    }
    return [made[task](row, text) for row, text in enumerate(texts)]


def write(folder: Path, task: str) -> str:
    if task == "translate":
        path = folder / "de-en.tsv"
        path.write_text("".join(f"wort {n}\t{' '.join(WORDS[: 1 + n])}\n" for n in range(8)))
    elif task == "slots-tags":
        path = folder / "train.en.tsv"
        lines = [(" ".join(WORDS[: 1 + n]), " ".join(["B-x"] + ["O"] * n)) for n in range(8)]
        path.write_text("".join(f"{text}\t{tags}\tintent\n" for text, tags in lines))
    else:
        path = folder / "train.en.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in _rows(task)))
    return str(path)


class Crowd(Processes):
    """One of several processes, as the losses of tasks see it."""

    def __init__(self, count: int, rank: int) -> None:
        super().__init__()
        self.count, self.rank = count, rank


def gradients(base: BaseModel, losses: Sequence[Callable[[int], Any]], batches: int) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the gradients of one optimizer step, summed over batches and processes as a trainer does."""
    live, total = factors(base.model), 0.0
    for parameter in live.values():
        parameter.grad = None
    for loss_of in losses:
        for number in range(batches):
            loss = loss_of(number).loss
            loss.backward()
            total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in live.items() if p.grad is not None}


def assert_same(one: tuple[float, Mapping[str, Tensor]], other: tuple[float, Mapping[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    norm = torch.stack([gradient.norm() for gradient in one[1].values()]).norm()
    apart = torch.stack([(gradient - other[1][name]).norm() for name, gradient in one[1].items()]).norm()
    assert float(norm) > 0
    assert float(apart) <= 1e-5 * float(norm)


def moved(base: BaseModel) -> None:
    """Move B away from zero, so that gradients reach A too."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, parameter in factors(base.model).items():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)


GENERATED = ["slots", "classify", "nli", "translate", "ner-json", "qa", "sft"]
HEADS = [("classify", "classes"), ("nli", "classes"), ("slots-tags", "tokens"), ("ner-json", "tokens"), ("qa", "span")]


@pytest.mark.parametrize(("task", "head"), [(task, "none") for task in GENERATED] + HEADS, ids=str)
def test_batches_and_processes_give_the_step_of_one_large_batch(
    task: str, head: str, causal: Path, encoder: Path, tmp_path: Path
) -> None:
    data = write(tmp_path, task)
    model = causal if head == "none" else encoder
    # windows of 24 tokens cut the longer texts of the span head into several
    more = {
        "task": task.removesuffix("-tags"),
        "train": [data],
        "head": head,
        "max_length": 24 if head == "span" else 256,
    }
    found = []
    for size, accumulate, count in SPLITS:
        settings = TaskSettings(**values(model, tmp_path, **more, batch_size=size, accumulate=accumulate))
        read = TaskData.read(settings)
        base = read.load(settings)
        inject(base.model, settings, seed=0, head=base.head_modules)
        moved(base)
        rows = read.objective(base, read.train, settings.max_length)
        assert len({rows.terms([row]) for row in range(8)}) > 1 or head == "classes"
        base.model.eval()  # an encoder has dropout of its own
        losses = [TaskLoss(rows, settings, Crowd(count, rank)) for rank in range(count)]
        found.append(gradients(base, losses, accumulate))
    for other in found[1:]:
        assert_same(found[0], other)


def test_the_reported_loss_is_the_mean_over_answer_tokens(causal: Path, tmp_path: Path) -> None:
    """By a loop over rows, one at a time; the mean of the rows' means is another number."""
    settings = TaskSettings(
        **values(causal, tmp_path, task="sft", train=[write(tmp_path, "sft")], batch_size=1, accumulate=8, steps=1),
        max_length=512,
    )
    reported = train_task(settings).history[0]["loss"]
    base = load_base(str(causal), dtype="float32", device="cpu")
    data = TaskData.read(settings)
    total, tokens, means = 0.0, 0, []
    for row in data.train:
        prompt = data.template.encode(data.task.fields(row), base.tokenizer)
        answer = data.template.encode_answer(data.task.answer(row), base.tokenizer)
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            logits = base.model(ids).logits[0, len(prompt) - 1 : -1].double()
        losses = -logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1)
        total, tokens = total + float(losses.sum()), tokens + len(answer)
        means.append(float(losses.mean()))
    assert reported == pytest.approx(total / tokens, rel=1e-5)
    assert abs(reported - sum(means) / 8) > 1e-4


@pytest.mark.parametrize("kind", ["gated", "x-mixup", "input"])
def test_fused_rows_weigh_the_same(kind: str, encoder: Path, tmp_path: Path) -> None:
    data = write(tmp_path, "classify")
    source = tmp_path / "source.fr.jsonl"
    source.write_text(Path(data).read_text())
    found = []
    for size, accumulate, count in SPLITS[:5]:
        own = {"task": "classify", "train": [data], "source": [str(source)], "fusion": kind, "targets": ["auto"]}
        settings = FusionSettings(**values(encoder, tmp_path, **own, batch_size=size, accumulate=accumulate))
        read = TaskData.read(settings)
        base = read.load(settings)
        fusing = fusion._fusing(base, read, settings, fusion.SILENT)
        rows = fusion._LOSSES.get(kind, fusion.FusedRows)(fusing, read.train, read.train)
        inject(fusing.base.model, settings, seed=0, head=fusing.base.head_modules)
        fusing.base.model.train()
        for module in fusing.base.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        losses = [TaskLoss(rows, settings, Crowd(count, rank)) for rank in range(count)]
        found.append(gradients(fusing.base, losses, accumulate))
    for other in found[1:]:
        assert_same(found[0], other)


def test_pairs_of_a_step_weigh_the_same_and_so_do_the_kept_tokens(causal: Path, tmp_path: Path) -> None:
    """Fifteen pairs in batches of 10: one batch draws a pair twice, so the batches differ in pairs and in tokens."""
    settings = AlignSettings(
        **values(causal, tmp_path, pairs=write_pairs(tmp_path), batch_size=10, accumulate=3, keeper=0.5, balance="rows")
    )
    pairs, _ = read_pairs(settings.pairs)
    base = load_base(settings.base, dtype="float32", device="cpu")
    keep_blocks(base.model, 2)
    inject(base.model, settings, seed=0)
    moved(base)
    loss = align.AlignLoss(base, pairs, settings)
    batches = [loss._batch(number) for number in range(3)]
    assert len({len(batch) for batch in batches}) > 1
    contrast = kept = 0.0
    tokens = 0
    with torch.no_grad():
        for batch in batches:
            source, target, keeper = loss._sides(batch)
            assert keeper is not None
            contrast += float(contrastive_loss(source, target)) * len(batch)
            kept += float(keeper) * loss._kept_tokens(batch)
            tokens += loss._kept_tokens(batch)
    parts = [loss(number) for number in range(3)]
    wanted = contrast / sum(map(len, batches)) + 0.5 * kept / tokens
    assert sum(float(part.loss.detach()) for part in parts) == pytest.approx(wanted, rel=1e-5)
    # the means of the batches' means is another number
    assert tokens * len(batches[0]) != loss._kept_tokens(batches[0]) * sum(map(len, batches))


def test_a_dev_loss_weighs_kept_tokens_not_batches(causal: Path, tmp_path: Path) -> None:
    settings = AlignSettings(
        **values(causal, tmp_path, pairs=write_pairs(tmp_path), batch_size=4, keeper=3.0, temperature=1e6)
    )
    pairs, _ = read_pairs(settings.pairs)
    base = load_base(settings.base, dtype="float32", device="cpu")
    inject(base.model, settings, seed=0)
    moved(base)
    loss = align.AlignLoss(base, pairs, settings)
    base.model.eval()
    found = DevLosses(base, {"dev_loss": loss.of_rows}, settings)()["dev_loss"]
    ids = loss._target_ids
    with torch.no_grad():
        base_states = loss._of_base(ids)[1]
        states = loss._states.read(ids, range(len(ids)))[1]
    assert len(states) == sum(map(len, ids)) == loss._kept_tokens(range(len(ids)))
    # batches of 4, 4, 4 and 3; at this temperature a pair's loss is the logarithm of their count
    contrast = (3 * 4 * torch.log(torch.tensor(4.0)) + 3 * torch.log(torch.tensor(3.0))) / 15
    assert found == pytest.approx(float(contrast + 3 * keeper_loss(states, base_states)), rel=1e-4)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("alternate", "discard"), [("sum", False), ("step", False), ("step", True), ("batch", False), ("batch", True)]
)
def test_joint_objectives_weigh_terms_within_and_batches_between(
    alternate: str, accumulate: int, discard: bool, causal: Path, tmp_path: Path
) -> None:
    own = {"task": "sft", "train": [write(tmp_path, "sft")], "pairs": write_pairs(tmp_path)}
    settings = JointSettings(
        **values(causal, tmp_path, **own, alternate=alternate, discard=discard, accumulate=accumulate, batch_size=2)
    )
    sizes = {"task": [3, 40, 7, 19, 2, 33, 5, 11] * 4, "align": [2, 2, 1, 2, 2, 1, 2, 2] * 4}
    asked: dict[str, list[int]] = {"task": [], "align": []}

    def part(name: str, number: int) -> align.BatchLoss:
        """A loss of 1 per term of the task, of 10 per pair."""
        together = own_batches(settings, name)(number)
        assert number in together
        asked[name].append(number)
        value = sizes[name][number] * (1.0 if name == "task" else 10.0) / sum(sizes[name][n] for n in together)
        return align.BatchLoss(torch.tensor(value), 1)

    losses: Any = {name: lambda number, name=name: part(name, number) for name in sizes}
    loss = JointLoss(losses, settings)
    for step in range(4):
        found = [loss(number) for number in range(step * accumulate, (step + 1) * accumulate)]
        turns = [name for batch in found for name in batch.parts]
        weights = {name: 1.0 if alternate == "sum" else turns.count(name) / accumulate for name in turns}
        wanted = weights.get("task", 0.0) + 10 * weights.get("align", 0.0)
        assert sum(float(batch.loss) for batch in found) == pytest.approx(wanted)
    for numbers in asked.values():
        assert numbers == sorted(set(numbers))
