"""Weights in 4 bits are those of bitsandbytes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bitsandbytes")
from bitsandbytes import functional

from adaptermix.baking.grid import pack, quantize, stored, with_codes, with_scales
from adaptermix.quantization import unpack


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(48, 128), (5, 192), (7, 96)])
def test_codes_and_scales_stand_for_what_bitsandbytes_reads(double: bool, kind: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    found = quantize(weight, kind=kind, double=double)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=double)
    if shape[1] % 64 == 0:  # it reads other rows wrongly on some processors
        torch.testing.assert_close(found.weight(), functional.dequantize_4bit(packed, state), rtol=1e-6, atol=1e-8)
    assert (found.weight() - weight).abs().max() < 0.35 * weight.abs().max()
    assert torch.equal(pack(found.codes), packed)
    assert torch.equal(unpack(packed, weight.numel()).view(shape), found.codes)


def test_scales_are_stored_in_eight_bits_and_codes_stay() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    found = quantize(weight, kind="nf4")
    wanted = found.scales * (1 + 0.05 * torch.randn(len(found.scales), generator=torch.Generator().manual_seed(2)))
    new = with_scales(found, wanted)
    assert torch.equal(new.codes, found.codes)
    inside = wanted < found.scales.max()
    assert ((new.scales - wanted).abs() / wanted)[inside].max() < 0.02
    again = with_scales(new, new.scales)
    assert torch.equal(again.scales, new.scales)
    assert torch.equal(with_scales(found, found.scales).scales, found.scales)


def test_what_is_stored_is_read_by_bitsandbytes() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3))
    found = quantize(weight, kind="nf4")
    codes = found.codes.clone()
    codes[0] = 15 - codes[0]
    changed = with_scales(with_codes(found, codes), found.scales * 1.02)
    parts = stored("a.weight", changed)
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
