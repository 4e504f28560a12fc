"""Stacks that generate: mixed rows, training of the projection alone, and the folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptermix import EvaluateSettings, StackSettings, TaskSettings, evaluate, train_stack, train_task
from adaptermix.adapters import open_adapter
from adaptermix.merging.on_model import acting
from adaptermix.models.generate import Limits, generate_ids, pad_left
from adaptermix.models.languages import Tagged
from adaptermix.models.mixed_rows import MixedEmbeddings, MixedRows, mount_mixed
from adaptermix.models.stack import Projected, StackForm, embedding_of

from ..refusals import refuses
from ..tiny import tiny_causal
from .data import write_pairs
from .stacks import batch_of, loaded, stage_2
from .test_joint import values

PROMPTS = ["rot", "ein langer Satz", "a b c"]


class OwnRows(nn.Module):
    """An encoder that returns the rows of a table of embeddings."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(d_model=table.weight.shape[1]))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def mixed_settings(top: Path, below: Path | None, folder: Path, **more: Any) -> StackSettings:
    own = {"encoder": below and str(below), "mode": "replace", "task": "translate", "train": write_pairs(folder)[:1]}
    shared = {name: value for name, value in values(top, folder).items() if name not in ("rank", "dropout")}
    return StackSettings(**(shared | {"steps": 2} | own | more))


@pytest.fixture(scope="module")
def mixed(causal: Path, below: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    train_stack(mixed_settings(causal, below, folder, mode="augment"))
    return folder / "out"


def logits(base: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        result: Tensor = base.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return result


def prompts_of(base: Any, texts: list[str] = PROMPTS) -> list[list[int]]:
    rows = [(base.mixed.read(text, "de"), base.tokenizer(text)["input_ids"]) for text in texts]
    return [base.mixed.prompt(foreign, own, base.tokenizer.bos_token_id) for foreign, own in rows]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_an_encoder_that_returns_own_embeddings_changes_nothing(
    kind: str, tmp_path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    base = loaded(tiny_causal(tmp_path / kind, kind))
    model: Any = base.model.to(dtype)
    first, border, second = [1, 20, 31, 7], 40, [9, 12, 60]
    plain = torch.tensor([[*first, border, *second]])
    expected = logits(base, plain)
    own = model.get_input_embeddings()
    rows = mount_mixed(model, OwnRows(own), base.tokenizer, augments=True)  # type: ignore[arg-type]
    embedding = embedding_of(model)
    assert isinstance(embedding, MixedEmbeddings)
    scale = getattr(own, "embed_scale", torch.tensor(1.0)).to(dtype)  # Gemma scales inside its embeddings
    with torch.no_grad():
        embedding.projection.weight.copy_(torch.eye(len(embedding.projection.weight)))
        embedding.projection.bias.zero_()
        embedding.border.weight.copy_(own.weight[border] * scale)
    mixed_row = torch.tensor([[1, *(rows.offset + each for each in first[1:]), rows.border, *second]])
    torch.testing.assert_close(logits(base, mixed_row), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(logits(base, plain), expected)  # without the encoder's ids, bit for bit


def test_padding_on_either_side_changes_nothing(mixed: Path) -> None:
    base = loaded(mixed)
    rows = prompts_of(base)
    width = max(map(len, rows))
    left = pad_left(rows, 0, base.device)
    right = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    beside = logits(base, left["input_ids"], left["attention_mask"]), logits(base, right, (right != 0).long())
    for number, row in enumerate(rows):
        alone = logits(base, torch.tensor([row]))[0]
        torch.testing.assert_close(beside[0][number, -len(row) :], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(beside[1][number, : len(row)], alone, atol=1e-5, rtol=1e-4)


def test_rows_without_ids_of_the_encoder_are_those_of_the_model(mixed: Path, causal: Path) -> None:
    base, plain = loaded(mixed), loaded(causal)
    ids = [plain.tokenizer(text)["input_ids"] for text in PROMPTS]
    batch = pad_left(ids, 0, base.device)
    assert torch.equal(logits(base, *batch.values()), logits(plain, *batch.values()))
    beside = pad_left([*ids, *prompts_of(base, ["rot"])], 0, base.device)
    for number, row in enumerate(ids):
        alone = logits(plain, torch.tensor([row]))[0]
        found = logits(base, *beside.values())[number, -len(row) :]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
def test_generation_with_a_cache_is_that_without(kind: str, below: Path, tmp_path: Path) -> None:
    top = tiny_causal(tmp_path / kind, kind, layers=2)
    train_stack(mixed_settings(top, below, tmp_path, mode="augment", steps=1))
    base = loaded(tmp_path / "out")
    prompts = prompts_of(base)
    stops = Limits(max_new_tokens=20).stops(base)
    expected = []
    for prompt in prompts:
        answer: list[int] = []
        while len(answer) < 20 and not stops & set(answer):
            answer.append(int(base.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, -1].argmax()))
        expected.append([token for token in answer if token not in stops])
    found = generate_ids(base, prompts, Limits(max_new_tokens=20), batch_size=1 if kind == "mamba" else 3)
    assert found == expected
    drafts = [answer[:5] for answer in expected]
    if kind != "mamba":
        assert generate_ids(base, prompts, Limits(max_new_tokens=20), batch_size=3, drafts=drafts) == expected


def test_the_projection_alone_is_trained(causal: Path, below: Path, tmp_path: Path) -> None:
    names: set[str] = set()
    before: dict[str, Tensor] = {}

    class Look:
        def on_train_begin(self, _a: Any, _s: Any, _c: Any, *, model: nn.Module, **_: Any) -> None:
            before.update({name: value.clone() for name, value in model.state_dict().items()})

        def on_step_end(self, _a: Any, _s: Any, _c: Any, *, model: nn.Module, **_: Any) -> None:
            names.update(name for name, parameter in model.named_parameters() if parameter.requires_grad)
            after = model.state_dict()
            assert {name for name in after if not torch.equal(after[name], before[name])} == names
            embedding = embedding_of(model)
            assert not embedding.encoder.training
            assert all(p.grad is None for frozen in embedding._frozen for p in frozen.parameters())
            assert all(not p.requires_grad for frozen in embedding._frozen for p in frozen.parameters())

    report = train_stack(mixed_settings(causal, below, tmp_path, steps=1), callbacks=[Look()])
    assert {name.rpartition("embed_tokens.")[2] for name in names} == {
        "projection.weight",
        "projection.bias",
        "border.weight",
    }
    counted = train_stack(mixed_settings(causal, below, tmp_path, dry_run=True, overwrite=True))
    assert counted.parameters == report.parameters == 16 * 32 + 32 + 32


def test_gradients_are_those_of_finite_differences(causal: Path, below: Path) -> None:
    model = loaded(causal).model.double()
    rows = mount_mixed(model, loaded(below).model.double(), loaded(below).tokenizer, augments=True)
    embedding = embedding_of(model)
    texts = [[1, 101, 102, rows.border, 9, 8], [rows.offset + 5, rows.offset + 6, rows.offset + 7, rows.border, 4, 3]]
    ids = torch.tensor(texts)

    def loss() -> Tensor:
        scores: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].log_softmax(-1)
        return scores[:, -2:].gather(-1, ids[:, -2:, None]).sum()

    loss().backward()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    for parameter in embedding.stored().values():
        assert parameter.grad is not None
        step = 1e-3 * torch.randn_like(parameter)  # norms and attention round to float32
        with torch.no_grad():
            ends = []
            for sign in (1, -2):
                parameter.add_(sign * step)
                ends.append(float(loss()))
            parameter.add_(step)
        assert ends[0] - ends[1] == pytest.approx(2 * float((parameter.grad * step).sum()), rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trained_stack_is_the_loaded_one(causal: Path, below: Path, tmp_path: Path, checkpointing: bool) -> None:
    seen: list[Tensor] = []

    class Look:
        def on_train_end(self, _a: Any, _s: Any, _c: Any, *, model: nn.Module, **_: Any) -> None:
            seen.append(logits(SimpleNamespace(model=model.eval()), row))

    row = torch.tensor([prompts_of(_encoded(causal, below))[1]])
    more = {"gradient_checkpointing": checkpointing, "mode": "augment", "learning_rate": 0.1, "batch_size": 12}
    report = train_stack(mixed_settings(causal, below, tmp_path, steps=8, **more), callbacks=[Look()])
    assert report.history[-1]["loss"] < report.history[0]["loss"] - 0.01
    torch.testing.assert_close(logits(loaded(tmp_path / "out"), row), seen[0], atol=1e-4, rtol=1e-3)


def _encoded(top: Path, below: Path) -> Any:
    base, encoder = loaded(top), loaded(below)
    return replace(base, mixed=mount_mixed(base.model, encoder.model, encoder.tokenizer, augments=True))


def test_from_mapping_over_augmentation_to_a_task(causal: Path, below: Path, tmp_path: Path) -> None:
    mapping, both = tmp_path / "mapping", tmp_path / "both"
    train_stack(mixed_settings(causal, below, tmp_path, out=str(mapping)))
    (tmp_path / "qa.de.jsonl").write_text(json.dumps({"question": "Wer?", "context": "Ada ging.", "answers": ["Ada"]}))
    rows = {"task": "qa", "train": [str(tmp_path / "qa.de.jsonl")]}
    train_stack(mixed_settings(mapping, None, tmp_path, mode="augment", out=str(both), **rows))
    forms = [json.loads((each / "stack.json").read_text()) for each in (mapping, both)]
    assert [form["mode"] for form in forms] == ["replace", "augment"]
    assert forms[0]["base"] == forms[1]["base"]
    assert not (both / "adapter").exists()
    files = [json.loads((each / "adaptermix.json").read_text())["data"] for each in (mapping, both)]
    assert [{file["name"] for file in each} for each in files] == [{"de-en.tsv"}, {"de-en.tsv", "qa.de.jsonl"}]
    common = {"base": str(both), "device": "cpu", "dtype": "float32"}
    train_task(TaskSettings(**common, **rows, steps=2, rank=2, out=str(tmp_path / "lora")))  # type: ignore[arg-type]
    asked = {**common, "task": "qa", "data": rows["train"], "max_new_tokens": 4}
    with_lora = evaluate(EvaluateSettings(**asked, adapter=str(tmp_path / "lora")))  # type: ignore[arg-type]
    assert with_lora.scores["de"].n == 1
    base, lora = loaded(both), open_adapter(tmp_path / "lora")
    row = torch.tensor([prompts_of(base)[1]])
    alone = logits(base, row)
    with acting(base, [lora]):
        assert not torch.equal(logits(base, row), alone)


def test_a_continued_stack_starts_where_the_other_one_ended(causal: Path, below: Path, tmp_path: Path) -> None:
    train_stack(mixed_settings(causal, below, tmp_path, out=str(tmp_path / "one")))
    more = {"learning_rate": 1e-12, "steps": 1, "mode": "replace"}
    train_stack(mixed_settings(tmp_path / "one", None, tmp_path, out=str(tmp_path / "two"), **more))
    one, two = (loaded(tmp_path / name) for name in ("one", "two"))
    row = torch.tensor([prompts_of(one)[1]])
    torch.testing.assert_close(logits(two, row), logits(one, row), atol=1e-4, rtol=1e-3)


def test_what_each_mode_reads(below: Path) -> None:
    rows = MixedRows(
        reader=Tagged(tokenizer=loaded(below).tokenizer, tags={}), offset=100, border=500, longest=None, augments=True
    )
    assert rows.prompt([1, 7, 2], [1, 8, 9], bos=1) == [1, 101, 107, 102, 500, 8, 9]
    assert rows.prompt([1, 7, 2], [8, 9], bos=1) == [101, 107, 102, 500, 8, 9]
    assert replace(rows, augments=False).prompt([1, 7, 2], [1, 8, 9], bos=1) == [1, 101, 107, 102, 500]
    assert rows.split([1, 101, 107, 102, 500, 8, 9]) == ([1, 7, 2], [1, 8, 9])


def test_the_beginning_of_both_readings_is_cut(below: Path, causal: Path) -> None:
    own = loaded(causal).tokenizer
    rows = MixedRows(
        reader=Tagged(tokenizer=loaded(below).tokenizer, tags={}), offset=100, border=500, longest=6, augments=True
    )
    row = [1, 101, 107, 108, 109, 102, 500, 10, 11, 12]  # 1 and 2 are special tokens of both
    assert rows.shortened(row, 10, own) == row
    assert rows.shortened(row, 7, own) == [1, 101, 109, 102, 500, 11, 12]
    short = [1, 101, 107, 108, 109, 102, 500, 10]
    assert rows.shortened(short, 7, own) == [1, 101, 108, 109, 102, 500, 10]  # the encoder gets what is left
    bare = replace(rows, augments=False)
    assert bare.shortened([1, 101, 107, 108, 109, 102, 500], 5, own) == [1, 101, 109, 102, 500]
    text = "a" * 9
    whole = rows.reader.tokenizer(text)["input_ids"]
    assert rows.read(text, "de") == [whole[0], *whole[-5:]]


def test_long_prompts_fit_into_training_and_evaluation(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "long.de.jsonl").write_text(json.dumps({"prompt": "rot " * 200, "answer": "red"}))
    rows = {"task": "sft", "train": [str(tmp_path / "long.de.jsonl")]}
    train_stack(mixed_settings(mixed, None, tmp_path, mode="augment", steps=1, max_length=40, **rows))
    asked = {"base": str(mixed), "task": "sft", "data": rows["train"], "device": "cpu", "max_new_tokens": 4}
    assert evaluate(EvaluateSettings(**asked)).scores["de"].n == 1  # type: ignore[arg-type]


def test_a_projection_that_is_kept_projects_the_same(below: Path) -> None:
    torch.manual_seed(0)
    embedding = Projected(loaded(below).model, nn.Embedding(5, 4), width=16, pad_id=0)
    ids = torch.tensor([[1, 5, 6]])
    before = embedding(ids)
    embedding.standardize(torch.randn(16), torch.rand(16) + 0.5, keep=True)
    torch.testing.assert_close(embedding(ids), before, atol=1e-5, rtol=1e-4)


def test_folders_without_a_mode_load_as_before(stack: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(stack, tmp_path / "copy")
    form = json.loads((copy / "stack.json").read_text())
    assert (form.pop("mode"), form.pop("offset")) == ("states", 0)
    (copy / "stack.json").write_text(json.dumps(form))
    old, new = loaded(copy), loaded(stack)
    batch = batch_of(old.tokenizer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(old.model(**inputs).last_hidden_state, new.model(**inputs).last_hidden_state)
    assert old.mixed is None


def test_the_tag_of_a_pair_is_that_of_its_first_language() -> None:
    tokenizer: Any = SimpleNamespace()
    tagged = Tagged(tokenizer=tokenizer, tags={"de": "deu_Latn", "zh-Hant": "zho_Hant", "en": "eng_Latn"})
    found = [tagged.tag_of(each) for each in ("de-en", "zh-Hant-en", "en-zh-Hant", "fr-en", "de")]
    assert found == ["deu_Latn", "zho_Hant", "eng_Latn", None, "deu_Latn"]


def test_languages_without_a_tag_are_refused(below: Path) -> None:
    rows = MixedRows(
        reader=Tagged(tokenizer=loaded(below).tokenizer, tags={"de": "de"}),
        offset=9,
        border=99,
        longest=None,
        augments=False,
    )
    with refuses("model.language: 'fr-en'"):
        rows.read("un", "fr-en")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"texts": ["x"]}, "stack.rows"),
        ({"teacher": "x"}, "stack.rows"),
        ({"train": []}, "stack.rows"),
        ({"rank": 4}, "stack.no-lora"),
        ({"start_from": "x"}, "stack.no-lora"),
        ({"projection_rate": 1e-3}, "stack.no-lora"),
        ({"attention": "both"}, "stack.of-states"),
        ({"encoder": None, "projection_init": "random"}, "stack.continued"),
        ({"shard_base": True}, "stack.shard"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(
    causal: Path, below: Path, tmp_path: Path, options: dict[str, Any], code: str
) -> None:
    with refuses(code):
        mixed_settings(causal, below, tmp_path, **options)


def test_models_that_cannot_take_part_are_refused(
    causal: Path, encoder: Path, below: Path, mixed: Path, tmp_path: Path
) -> None:
    with refuses("stack.mode"):
        train_stack(mixed_settings(encoder, below, tmp_path))
    with refuses("stack.no-stack"):
        train_stack(mixed_settings(causal, None, tmp_path))
    with refuses("stack.of-stacks"):
        train_stack(mixed_settings(mixed, below, tmp_path))
    with refuses("stack.template"):
        stage_2(mixed, causal, tmp_path, template="plain")
    with refuses("stack.generates"):
        loaded(mixed).encode(["rot"], ["de"])
    bare = loaded(below)
    bare.tokenizer.pad_token = None
    with refuses("model.special-tokens"):
        mount_mixed(loaded(causal).model, bare.model, bare.tokenizer, augments=True)


def test_a_model_on_top_with_more_embeddings_is_refused(mixed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(mixed, tmp_path / "copy")
    form = StackForm.read(mixed)
    (copy / "stack.json").write_text(json.dumps(replace(form, offset=form.offset + 1).document()))
    with refuses("stack.changed"):
        loaded(copy)
