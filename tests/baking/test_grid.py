"""Weights in 4 bits are those of bitsandbytes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bitsandbytes")
from bitsandbytes import functional

from adaptermix.models.formats import FORMATS, EightBit, FourBit, pack, unpack


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 128), (5, 192), (7, 96)])
def test_codes_and_scales_stand_for_what_bitsandbytes_reads(double: bool, kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    found = FourBit.of(weight, kind=kind, double=double)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
    if shape[1] % 64 == 0:  # it reads other rows wrongly on some processors
        torch.testing.assert_close(found.weight(), functional.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-8)
    assert (found.weight() - weight).abs().max() < 0.35 * weight.abs().max()
    assert torch.equal(pack(found.codes), packed)
    assert torch.equal(unpack(packed, weight.numel()).view(shape), found.codes)


def test_scales_are_stored_in_eight_bits_and_codes_stay() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    found = FORMATS["nf4"](weight)
    wanted = found.scales * (1 + 0.05 * torch.randn(len(found.scales), generator=torch.Generator().manual_seed(2)))
    new = found.with_scales(wanted)
    assert torch.equal(new.codes, found.codes)
    inside = wanted < found.scales.max()
    assert ((new.scales - wanted).abs() / wanted)[inside].max() < 0.02
    again = new.with_scales(new.scales)
    assert torch.equal(again.scales, new.scales)
    assert torch.equal(found.with_scales(found.scales).scales, found.scales)


def test_what_is_stored_is_read_by_bitsandbytes() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    found = FORMATS["nf4"](weight)
    codes = found.codes.clone()
    codes[0] = 15 - codes[0]
    changed = found.with_codes(codes).with_scales(found.scales * 1.02)
    parts = changed.stored("a.weight")
    assert set(parts) == {
        "a.weight",
        "a.weight.absmax",
        "a.weight.nested_absmax",
        "a.weight.nested_quant_map",
        "a.weight.quant_map",
        "a.weight.quant_state.bitsandbytes__nf4",
    }
    statistics = {name.removeprefix("a."): part for name, part in parts.items() if name != "a.weight"}
    state = functional.QuantState.from_dict(statistics, device=torch.device("cpu"))
    read = functional.dequantize_4bit(parts["a.weight"], state)
    torch.testing.assert_close(read, changed.weight(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(48, 128), (5, 96)])
def test_in_eight_bits_it_is_llm_int8(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    found = EightBit.of(weight)
    steps, scales, _ = functional.int8_vectorwise_quant(weight.half())
    parts = found.stored("a.weight")
    assert torch.equal(parts["a.weight"], steps)
    assert torch.equal(parts["a.SCB"], scales)
    torch.testing.assert_close(found.weight(), functional.int8_vectorwise_dequant(steps, scales), rtol=1e-5, atol=1e-8)
    assert float((found.weight() - weight).abs().max()) < 0.6 * float(scales.max()) / 127
    assert float(found.table[-1]) == 1.0


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 128])
def test_what_is_stored_is_read_as_it_was(kind: str, double: bool, block: int) -> None:
    weight = torch.randn((12, 128), generator=torch.Generator().manual_seed(0)).bfloat16()
    found = FourBit.of(weight, kind=kind, double=double, block=block)
    parts = found.stored("w")
    read = FourBit.read(parts.pop("w"), {name.removeprefix("w."): part for name, part in parts.items()})
    assert torch.equal(read.weight(), found.weight())
    assert (read.dtype, read.block) == (torch.bfloat16, block)
