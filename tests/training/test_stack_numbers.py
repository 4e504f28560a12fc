"""Numbers of stacks: language tags, 4-bit weights, dtypes, and what a dry run counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adaptermix import train_stack, train_task
from adaptermix.models.base import backbone, load_base
from adaptermix.models.both_sides import see_both_sides
from adaptermix.models.formats.bitsandbytes import FORMATS
from adaptermix.models.stack import Projected, embedding_of, mount
from adaptermix.progress import Advance, Silent

from ..halves import TAGS, tiny_encoder_decoder
from ..refusals import refuses
from ..tiny import tiny_causal
from .stacks import batch_of, loaded, stack_settings, stage_2, write_texts
from .test_heads import settings_for, write_labels


@pytest.fixture(scope="module")
def nllb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_decoder(tmp_path_factory.mktemp("nllb") / "encoder", "nllb")


@contextmanager
def first_ids(embedding: Projected) -> Iterator[list[int]]:
    """Collect the first token of each text that the encoder of a stack reads."""
    seen: list[int] = []
    hook = embedding.encoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.extend(kwargs["input_ids"][:, 0].tolist()), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.fixture(scope="module")
def tagged(causal: Path, nllb: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[int]]:
    """A stack trained on Javanese texts, and the first tokens that its encoder read in training."""
    folder = tmp_path_factory.mktemp("tagged")
    trained: list[list[int]] = []
    with ExitStack() as contexts:

        class Look:
            def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
                trained.append(contexts.enter_context(first_ids(embedding_of(model))))

        texts = f"jv={write_texts(folder, 'jv.txt')}"
        train_stack(stack_settings(causal, nllb, folder, texts=[texts], steps=2), callbacks=[Look()])
    return folder / "stack", set(trained[0])


def test_the_encoder_of_a_stack_reads_the_tag_of_each_text(tagged: tuple[Path, set[int]]) -> None:
    base = loaded(tagged[0])
    ids = {tag: base.tokenizer.convert_tokens_to_ids(tag) for tag in TAGS}
    assert tagged[1] == {ids["jav_Latn"]}
    rows = base.encode(["red sky"] * 3, ["de", "en", "ace"])
    batch = base.tokenizer.pad({"input_ids": [row["input_ids"] for row in rows]}, return_tensors="pt")
    with torch.no_grad(), first_ids(embedding_of(base.model)) as read:
        states = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert read == [ids["deu_Latn"], ids["eng_Latn"], ids["ace_Latn"]]
    assert not torch.allclose(states[0], states[1])


def test_padding_on_the_left_changes_nothing(tagged: tuple[Path, set[int]]) -> None:
    """Both models number positions from the first token of a text; BERT would count the padding."""
    base = loaded(tagged[0])
    states = []
    for side in ("left", "right"):
        batch = base.tokenizer(["red", "the red sky"], padding=True, padding_side=side, return_tensors="pt")
        kept = batch["attention_mask"].bool()
        assert not kept[0].all()
        with torch.no_grad():
            found = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        states.append(found.last_hidden_state[kept])
    torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)


def test_a_language_without_a_tag_is_refused_by_name(
    causal: Path, nllb: Path, tagged: tuple[Path, set[int]], tmp_path: Path
) -> None:
    with refuses("model.language: 'fr'"):
        train_stack(stack_settings(causal, nllb, tmp_path, texts=[f"fr={write_texts(tmp_path, 'x.txt')}"]))
    with refuses("model.language: 'fr'"):
        loaded(tagged[0]).encode(["red sky"], ["fr"])


def test_in_4_bits_the_lora_acts_next_to_the_weights(wide: Path, below: Path, tmp_path: Path) -> None:
    """The reference has the dequantised codes as plain weights, to which the LoRA is added as a matrix."""
    pytest.importorskip("bitsandbytes")
    train_stack(stack_settings(wide, below, tmp_path, steps=20, learning_rate=0.01))
    folder = tmp_path / "stack"
    stack = load_base(str(folder), device="cpu", dtype="float32", quantize="nf4")
    reference = loaded(folder)
    lora = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    with torch.no_grad():
        for name, module in reference.model.named_modules():
            key = f"base_model.model.{name}.lora_%s.weight"
            if key % "A" not in lora:
                continue
            codes = FORMATS["nf4"](module.weight.detach()).weight()
            delta = config["lora_alpha"] / config["r"] * lora[key % "B"] @ lora[key % "A"]
            module.weight.copy_(codes + delta)
            module._forward_hooks.clear()
        batch = batch_of(stack.tokenizer)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        quantised, expected, plain = (
            each.model(**inputs).last_hidden_state for each in (stack, reference, loaded(folder))
        )
    error, of_rounding = (float((each - expected).norm() / expected.norm()) for each in (quantised, plain))
    assert error < of_rounding / 10  # so the codes are there, and not the whole weights
    assert error < 1e-4


def test_the_projection_stays_in_float32(top: Path, below: Path, tmp_path: Path) -> None:
    train_stack(stack_settings(top, below, tmp_path, steps=1, dtype="bfloat16"))
    stored = load_file(tmp_path / "stack" / "projection.safetensors")
    base = load_base(str(tmp_path / "stack"), device="cpu", dtype="bfloat16")
    embedding = embedding_of(base.model)
    assert all(torch.equal(parameter, stored[name]) for name, parameter in embedding.projection.named_parameters())
    assert base.model.dtype == torch.bfloat16
    ids = batch_of(base.tokenizer)["input_ids"]
    with torch.no_grad():
        states = embedding.encoder_states(ids).double()
        exact = states @ stored["weight"].double().T + stored["bias"].double()
        found = embedding(ids)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(embedding(ids), found)
    assert found.dtype == torch.bfloat16
    # one rounding of the result: half of bfloat16's 2**-7 between neighbours
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_dry_run_counts_the_projection(top: Path, below: Path, tmp_path: Path) -> None:
    planned = train_stack(stack_settings(top, below, tmp_path, dry_run=True))
    assert planned.parameters == train_stack(stack_settings(top, below, tmp_path, steps=1)).parameters


def test_a_model_that_reads_in_one_direction_is_refused_by_name(below: Path, tmp_path: Path) -> None:
    base, encoder = loaded(tiny_causal(tmp_path / "mamba", "mamba")), loaded(below)
    body: Any = backbone(base)
    mount(body, encoder.model, encoder.tokenizer)
    with refuses("stack.attention: MambaModel"):
        see_both_sides(body)


def test_a_stack_is_not_sharded(stack: Path, tmp_path: Path) -> None:
    with refuses("processes.settings: is a stack"):
        train_task(settings_for(stack, tmp_path, shard_base=True, dry_run=True))


def test_the_teacher_shows_how_far_it_is(stack: Path, teacher: Path, tmp_path: Path) -> None:
    bars: dict[str, list[int]] = {}

    class Watch(Silent):
        @contextmanager
        def track(self, label: str, total: int) -> Iterator[Advance]:
            bars[label] = [total, 0]
            yield lambda done, _text: bars[label].__setitem__(1, bars[label][1] + done)

    train_stack(stage_2(stack, teacher, tmp_path, dev=[write_labels(tmp_path, "dev.en.tsv")]), watch=Watch())
    assert bars["teacher"] == [12, 12]
