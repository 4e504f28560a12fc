"""What must hold of fused LoRAs, whatever model they are in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptermix.fusion import FUSIONS, Sources, fused, read_sources
from adaptermix.fusion.sources import fused_modules
from tests.tiny import tiny_causal, tiny_encoder

from ..refusals import refuses

# PEFT uses the older name
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")

DECODERS = ["llama", "qwen2", "qwen3", "gemma3"]
ENCODERS = ["bert", "xlm-roberta"]
BOTH = ["t5", "mt5"]
KINDS = [*DECODERS, *ENCODERS, *BOTH]
SMOOTH = [name for name in FUSIONS if name != "cross-attention-paper"]
IDS = torch.arange(3, 27).reshape(2, 12)
SOURCE = torch.arange(30, 48).reshape(2, 9)


def model_of(kind: str, folder: Path, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    if kind in BOTH:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
        config = AutoConfig.for_model(kind, vocab_size=64, decoder_start_token_id=0, **sizes)
        return AutoModelForSeq2SeqLM.from_config(config).eval()
    if kind == "xlm-roberta":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = AutoConfig.for_model(kind, vocab_size=64, max_position_embeddings=64, pad_token_id=1, **sizes)
        return AutoModel.from_config(config, **options).eval()
    if kind == "bert":
        return AutoModel.from_pretrained(tiny_encoder(folder), **options).eval()
    return AutoModelForCausalLM.from_pretrained(tiny_causal(folder, kind), **options).eval()


def fuse(model: Any, fusion: str = "add", *, seed: int = 0, name: str = "default", **more: Any) -> Any:
    """Put a fused LoRA with random factors into a model."""
    from peft import PeftModel, get_peft_model

    from adaptermix.fusion.lora import FusionConfig

    kind = model.config.model_type
    targets = ["query", "value"] if kind in ENCODERS else ["q", "v"] if kind in BOTH else ["q_proj", "v_proj"]
    config = FusionConfig(r=4, lora_alpha=8, target_modules=targets, fusion=fusion, **more)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path and f".{name}" in path:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def batch(ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}


def out(model: Any, given: dict[str, Tensor], sources: Sources | None) -> Tensor:
    """Return logits, or states of an encoder."""
    more = {"decoder_input_ids": given["input_ids"][:, :5]} if model.config.model_type in BOTH else {}
    with fused(model, sources) as fuser:
        found = model(**given, **more)
    assert (fuser.count > 0) == (sources is not None)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def sources_of(
    model: Any, given: dict[str, Tensor], target: dict[str, Tensor], alignment: str = "position", **more: Any
) -> Sources:
    extra = {"decoder_input_ids": given["input_ids"][:, :1]} if model.config.model_type in BOTH else {}
    found = read_sources(model, given, run=(lambda: model(**given, **extra)), **more)
    return found.align(alignment, target["attention_mask"].sum(-1).tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fusion", SMOOTH)
@torch.no_grad()
def test_a_source_matters_and_nothing_else_changes_where_it_does_not(kind: str, fusion: str, tmp_path: Path) -> None:
    model = fuse(model_of(kind, tmp_path / "m"), fusion)
    target, source = batch(IDS), batch(SOURCE)
    sources = sources_of(model, source, target)
    plain = out(model, target, None)
    with_source = out(model, target, sources)
    assert float((with_source - plain).abs().max()) > 1e-4
    # no token of the source is there: plain LoRA
    none = Sources(states=sources.states, mask=torch.zeros_like(sources.mask), lead=sources.lead)
    torch.testing.assert_close(out(model, target, none), plain)
    # a source of zeros adds nothing
    if fusion in ("add", "gated"):
        zero = {path: torch.zeros_like(states) for path, states in sources.states.items()}
        torch.testing.assert_close(
            out(model, target, Sources(states=zero, mask=sources.mask, lead=sources.lead)), plain
        )
    # the last projection of zeros: the base
    with model.disable_adapter():
        base = out(model, target, None)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:
            parameter.zero_()
    torch.testing.assert_close(out(model, target, sources), base)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fusion", SMOOTH)
@pytest.mark.parametrize("alignment", ["position", "end", "soft"])
@torch.no_grad()
def test_padding_and_the_rows_beside_it_change_nothing(kind: str, fusion: str, alignment: str, tmp_path: Path) -> None:
    soft = alignment == "soft"
    model = fuse(model_of(kind, tmp_path / "m"), fusion, fusion_alignment=alignment)
    alone, target = batch(SOURCE[:1]), batch(IDS[:1])
    place = "position" if soft else alignment
    wanted = out(model, target, sources_of(model, alone, target, place))
    # the source in a batch with a longer one, padded on the right
    longer = torch.cat([torch.nn.functional.pad(SOURCE[:1], (0, 4)), torch.arange(20, 33)[None]])
    mask = torch.ones_like(longer)
    mask[0, 9:] = 0
    padded, both = batch(longer, mask), batch(IDS)
    found = out(model, both, sources_of(model, padded, both, place))
    torch.testing.assert_close(found[:1], wanted, rtol=1e-3, atol=1e-4)
    if kind in DECODERS:  # a target that is padded on the left, as prompts are
        ids, mask = torch.nn.functional.pad(IDS[:1], (3, 0)), torch.tensor([[0] * 3 + [1] * 12])
        shifted = batch(ids, mask) | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        found = out(model, shifted, sources_of(model, alone, target, place))
        torch.testing.assert_close(found[:, 3:], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
@torch.no_grad()
def test_how_attention_is_computed_does_not_matter(kind: str, tmp_path: Path) -> None:
    found = []
    for way in ("eager", "sdpa"):
        model = fuse(model_of(kind, tmp_path / way, attn_implementation=way))
        target = batch(IDS)
        found.append(out(model, target, sources_of(model, batch(SOURCE), target)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@torch.no_grad()
def test_the_flash_kernel_gives_the_same(kind: str, tmp_path: Path) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = fuse(model_of(kind, tmp_path / "m", attn_implementation="sdpa"))
    target, found = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, []
    for kernel in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(kernel):
            found.append(out(model, target, sources_of(model, batch(SOURCE), target)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near_and_learns(kind: str, tmp_path: Path) -> None:
    """A base in bfloat16 with factors in float32, and a base in float32 under autocast."""
    target, whole = batch(IDS), fuse(model_of(kind, tmp_path / "m"))
    wanted = out(whole, target, sources_of(whole, batch(SOURCE), target)).detach()
    half = fuse(model_of(kind, tmp_path / "m").to(torch.bfloat16))
    assert {p.dtype for name, p in half.named_parameters() if "lora_A" in name} == {torch.float32}
    for model, is_mixed in ((half, False), (whole, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
            found = out(model, target, sources_of(model, batch(SOURCE), target))
            found.float().square().mean().backward()
        assert float((found.detach().float() - wanted).norm() / wanted.norm()) < 0.1
        gradients = [p.grad for name, p in model.named_parameters() if "lora_A" in name and p.grad is not None]
        assert gradients
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@torch.no_grad()
def test_queries_and_values_fuse_whatever_else_has_a_lora(tmp_path: Path) -> None:
    """As in the release, whose decoders have LoRAs on all linear layers."""
    from peft import get_peft_model

    from adaptermix.fusion.lora import FusionConfig

    model = get_peft_model(model_of("llama", tmp_path / "m"), FusionConfig.release(r=4, target_modules="all-linear"))
    ends = {path.rpartition(".")[2] for path in fused_modules(model)}
    assert ends == {"q_proj", "v_proj"}


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("fusion", SMOOTH)
@pytest.mark.parametrize("alignment", ["position", "end"])
@torch.no_grad()
def test_step_by_step_it_is_what_it_is_at_once(kind: str, fusion: str, alignment: str, tmp_path: Path) -> None:
    """A prompt with its source, and an answer behind it that is read token by token."""
    model = fuse(model_of(kind, tmp_path / "m"), fusion)
    prompt = batch(IDS[:, :8])
    sources = sources_of(model, batch(SOURCE), prompt, alignment)
    wanted = out(model, batch(IDS), sources)
    with fused(model, sources):
        first = model(**prompt, use_cache=True)
        found, cache = [first.logits], first.past_key_values
        for place in range(8, IDS.shape[1]):
            step = batch(IDS[:, place : place + 1], torch.ones(2, place + 1, dtype=torch.long))
            answer = model(**step, past_key_values=cache, use_cache=True)
            found.append(answer.logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("fusion", SMOOTH)
def test_activations_that_are_computed_twice_give_the_same_gradients(kind: str, fusion: str, tmp_path: Path) -> None:
    gradients: list[dict[str, Tensor]] = []
    for twice in (False, True):
        model = fuse(model_of(kind, tmp_path / str(twice)), fusion)
        model.train()
        if twice:
            model.enable_input_require_grads()
            model.base_model.model.gradient_checkpointing_enable()
        target = batch(IDS)
        sources = sources_of(model, batch(SOURCE), target)
        with fused(model, sources) as fuser:
            found = model(**target, **({} if kind == "bert" else {"use_cache": False}))
            loss = (found.logits if hasattr(found, "logits") else found.last_hidden_state).square().mean()
            once = fuser.count
            loss.backward()
        assert once == len(fused_modules(model))
        assert (fuser.count > once) == twice  # fused again when computed again
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("lora_A" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_passes_that_share_sources_take_them_in_turn(kind: str, tmp_path: Path) -> None:
    model = fuse(model_of(kind, tmp_path / "m"))
    target = batch(IDS[[0, 1, 0]])
    sources = sources_of(model, batch(SOURCE[[0, 1, 1]]), target, "end")
    wanted = out(model, target, sources)
    parts = [batch(IDS[[0, 1]]), batch(IDS[[0]])]
    more = {"decoder_input_ids": IDS[:2, :5]} if kind in BOTH else {}
    with fused(model, sources):
        for _ in range(2):  # and begin again
            outputs = [
                model(**part, **{key: ids[: len(part["input_ids"])] for key, ids in more.items()}) for part in parts
            ]
            found = [each.logits if hasattr(each, "logits") else each.last_hidden_state for each in outputs]
            torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
@torch.no_grad()
def test_adapters_are_saved_loaded_and_kept_apart(fusion: str, tmp_path: Path) -> None:
    from peft import PeftModel

    from adaptermix.fusion.lora import load_fusion

    model = fuse(model_of("llama", tmp_path / "m"), fusion)
    target, source = batch(IDS), batch(IDS + 20)
    sources = sources_of(model, source, target)
    first = out(model, target, sources)
    model.save_pretrained(tmp_path / "one")
    fuse(model, "add", seed=5, name="other")
    torch.testing.assert_close(out(model, target, sources), first)
    model.set_adapter("other")
    assert float((out(model, target, sources) - first).abs().max()) > 1e-4
    model.set_adapter("default")
    torch.testing.assert_close(out(model, target, sources), first)
    with refuses("fusion.not-mergeable"):
        model.merge_adapter()
    again = load_fusion(model_of("llama", tmp_path / "m"), str(tmp_path / "one")).eval()
    torch.testing.assert_close(out(again, target, sources_of(again, source, target)), first)
    # PEFT alone: a plain LoRA
    with pytest.warns(UserWarning, match="fusion"):
        plain = PeftModel.from_pretrained(model_of("llama", tmp_path / "m"), tmp_path / "one").eval()
    torch.testing.assert_close(plain(**target).logits, out(again, target, None))


@torch.no_grad()
def test_bases_in_4_bits_fuse_too(wide: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from adaptermix.models.base import load_base
    from adaptermix.models.quantization import keep_codes

    base = load_base(str(wide), device="cpu", dtype="float32", quantize="nf4")
    keep_codes(base.model)
    model = fuse(base.model)
    target = batch(IDS)
    sources = sources_of(model, batch(SOURCE), target)
    found = out(model, target, sources)
    whole = load_base(str(wide), device="cpu", dtype="float32").model
    with torch.no_grad():
        from bitsandbytes.functional import dequantize_4bit

        for path, module in base.model.named_modules():
            if hasattr(getattr(module, "weight", None), "quant_state") and module.weight.quant_state is not None:
                plain = path.replace("base_model.model.", "").replace(".base_layer", "")
                state = module.weight.quant_state
                whole.get_submodule(plain).weight.copy_(dequantize_4bit(module.weight.data, state))
    other = fuse(whole)
    torch.testing.assert_close(
        found, out(other, target, sources_of(other, batch(SOURCE), target)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
@torch.no_grad()
def test_sources_are_the_states_that_they_are_said_to_be(norm: bool, offset: int, tmp_path: Path) -> None:
    model = fuse(model_of("llama", tmp_path / "m"))
    given = batch(SOURCE)
    found = read_sources(model, given, norm=norm, offset=offset)
    inner = model.base_model.model.model
    with model.disable_adapter():
        states = model(**given, output_hidden_states=True).hidden_states
    count = len(inner.layers)
    for place, block in enumerate(found.states):
        wanted = states[place + offset]
        if norm and place + offset < count:
            wanted = inner.layers[place + offset].input_layernorm(wanted)
        elif not norm and place + offset == count:
            wanted = None  # hidden states end behind the last norm
        if wanted is not None and not (norm and place + offset == count):
            torch.testing.assert_close(found.states[block], wanted)
        elif wanted is None:
            torch.testing.assert_close(inner.norm(found.states[block]), states[-1])


@torch.no_grad()
def test_the_release_fuses_place_by_place_padding_too(tmp_path: Path) -> None:
    """The module of the release, as a loop over places."""
    from adaptermix.fusion.lora import align

    generator = torch.Generator().manual_seed(0)
    target, source = (torch.randn(2, 6, 4, generator=generator) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    places = torch.arange(6).expand(2, -1)
    given = align(target, source, torch.ones_like(mask), places)
    release = {"add": source + target, "mul": source * target, "add-relu": source.relu() + target.relu()}
    for name, wanted in release.items():
        torch.testing.assert_close(FUSIONS[name](4)(given), wanted)
    # equation 3: the source asks, of the longer side's length
    fuse = FUSIONS["cross-attention-paper"](4)
    asked = fuse(align(target[:, :5], source, torch.ones_like(mask), places[:, :5]))
    longer = torch.nn.functional.pad(target[:, :5], (0, 0, 0, 1))
    wanted = torch.nn.functional.scaled_dot_product_attention(fuse.query(source), fuse.key(longer), fuse.value(longer))
    torch.testing.assert_close(asked, wanted[:, :5])


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    from adaptermix.fusion.lora import FusionConfig

    with refuses("fusion.unknown: add, mul"):
        FusionConfig(fusion="sum")
    with refuses("fusion.unknown: position, end"):
        FusionConfig(fusion_alignment="middle")
    model = model_of("llama", tmp_path / "m")
    with refuses("fusion.no-module"):
        read_sources(model, batch(SOURCE))
    model = fuse(model)
    sources = read_sources(model, batch(SOURCE))
    with (
        refuses("fusion.source-count: 3.*2 of 2 left"),
        fused(model, sources),
    ):
        model(**batch(IDS[[0, 1, 1]]))
    with refuses("fusion.sources-unread: 2.*1"), fused(model, sources):
        model(**batch(IDS[:1]))
    release, paper = FusionConfig.release(), FusionConfig.paper()
    assert (release.fusion_offset, paper.fusion_offset) == (0, 1)
    assert release.fusion_pads
    assert not paper.fusion_norm
