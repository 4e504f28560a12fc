"""Code search against loops, and what it keeps of a delta."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("bitsandbytes")

from adaptermix.baking.fidelity import fidelity
from adaptermix.baking.grid import quantize
from adaptermix.baking.rounding import Inputs, descend, fit, fit_scales, nearest_plane
from adaptermix.baking.strategies import STRATEGIES, Known, Rows, Wanted

OUT, INTO = 48, 192


def inputs(seed: int, rows: int = 4000, into: int = INTO) -> torch.Tensor:
    """Inputs as layers have them: a few strong directions, many weak ones, a mean."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(into, into, generator=torch.Generator().manual_seed(99)) / into**0.5
    strength = torch.logspace(0.5, -1.5, into)
    return (torch.randn(rows, into, generator=generator) * strength) @ mixing + 0.1


def case(relative: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, INTO, generator=generator) * 0.05
    delta = torch.randn(OUT, 4, generator=generator) @ torch.randn(4, INTO, generator=generator)
    return weight, delta * (relative * weight.norm() / delta.norm())


def rows_of(seed: int, rows: int = 4000) -> Rows:
    found = inputs(seed, rows)
    mean = found.mean(0)
    return Rows(spread=moment(found - mean), mean=mean, count=rows)


def moment(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nearest_plane_is_the_loop_that_rounds_one_column_after_another(kind: str) -> None:
    """In blocks or not, as a loop over single weights in float64 with the conditional optimum of the rest."""
    weight, delta = case(0.05)
    base, known = quantize(weight, kind=kind), Inputs(moment=moment(inputs(1)))
    target, scales, table = base.weight() + delta, base.scale_of_each(), base.table
    found = nearest_plane(target, scales, table, known)
    order, root = known.order, known.root.double()
    for row in range(0, OUT, 7):
        errors = torch.zeros(INTO, dtype=torch.float64)
        for place in range(INTO - 1, -1, -1):
            column = int(order[place])
            shift = float(root[place, place + 1 :] @ errors[place + 1 :]) / float(root[place, place])
            center = float(target[row, column]) - shift
            values = table.double() * float(scales[row, column])
            distance = (values - center).abs()
            assert float(distance[found[row, column]] - distance.min()) < 1e-6
            errors[place] = values[int(found[row, column])] - float(target[row, column])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_each_step_lowers_the_error(kind: str) -> None:
    weight, delta = case(0.1)
    base, known = quantize(weight, kind=kind), Inputs(moment=moment(inputs(1)))
    target, scales = base.weight() + delta, base.scale_of_each()
    codes, errors = base.codes.long(), [known.error(base.weight() - target)]
    for _ in range(3):
        codes = descend(target, codes, scales, base.table, known)
        errors.append(known.error(base.table[codes] * scales - target))
        assert (errors[-1] <= errors[-2] * (1 + 1e-5)).all()
    assert errors[1].sum() < errors[0].sum()


def test_scales_are_those_of_least_squares() -> None:
    weight, delta = case(0.1)
    base, known = quantize(weight, kind="nf4", double=False), Inputs(moment=moment(inputs(1)))
    target = base.weight() + delta
    found = fit_scales(target, base, known).view(OUT, -1)
    values = base.table[base.codes.long()].double()
    root = torch.linalg.cholesky(known.moment.double(), upper=True)
    for row in range(0, OUT, 11):
        blocks = torch.stack([values[row] * (torch.arange(INTO) // 64 == block) for block in range(INTO // 64)])
        best = torch.linalg.lstsq(root @ blocks.T, root @ target[row].double()).solution
        torch.testing.assert_close(found[row].double(), best, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("relative", [0.0, 0.003, 0.03, 0.3])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_error_is_never_above_that_of_the_base(relative: float, kind: str) -> None:
    weight, delta = case(relative)
    base, known = quantize(weight, kind=kind), Inputs(moment=moment(inputs(1)))
    target = base.weight() + delta
    found = fit(base, target, known)
    assert (known.error(found.weight() - target) <= known.error(base.weight() - target) * (1 + 1e-5)).all()
    if relative == 0:
        assert torch.equal(found.codes, base.codes)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_on_rows_that_had_no_part_calibrated_codes_keep_what_plain_rounding_loses(has_bias: bool, kind: str) -> None:
    weight, delta = case(0.02)
    base, held = quantize(weight, kind=kind), inputs(3)
    known = Known(fitted=rows_of(1), chosen=rows_of(2), held=rows_of(3))
    wanted = Wanted(base=base, delta=delta, known=known, settle=torch.Tensor.clone if has_bias else None)
    naive = wanted.measured(STRATEGIES["requantize"](wanted).weight, known.held)
    baked = STRATEGIES["calibrated"](wanted)
    found = wanted.measured(baked.weight, known.held, baked.shift)
    assert naive.kept < 0.2
    assert found.kept > 0.75
    assert found.error <= naive.error
    # as outputs tell it
    intended = held @ delta.T
    realised = held @ (baked.weight.weight() - base.weight()).T + (0 if baked.shift is None else baked.shift)
    assert float((intended * realised).sum() / intended.square().sum()) == pytest.approx(found.kept, abs=1e-3)
    off = (realised - intended).square().sum() / intended.square().sum()
    assert float(off.sqrt()) == pytest.approx(found.error, abs=1e-3)
    assert (baked.shift is None) == (not has_bias)


@pytest.mark.parametrize("relative", [0.01, 0.3, 3.0, 10.0])
@pytest.mark.parametrize("rows", [30, 4000])
def test_calibrated_is_not_worse_than_plain_rounding_on_the_rows_to_choose_on(relative: float, rows: int) -> None:
    """However large the delta is and however few the rows are."""
    weight, delta = case(relative)
    known = Known(fitted=rows_of(1, rows), chosen=rows_of(2), held=rows_of(3))
    wanted = Wanted(base=quantize(weight, kind="nf4"), delta=delta, known=known)
    plain = wanted.measured(STRATEGIES["requantize"](wanted).weight, known.chosen).error
    found = STRATEGIES["calibrated"](wanted)
    assert wanted.measured(found.weight, known.chosen).error <= plain
    assert wanted.measured(found.weight, known.held).error <= plain * 1.1


def test_a_bias_that_rounds_the_shift_away_takes_no_part() -> None:
    weight, delta = case(0.02)
    known = Known(fitted=rows_of(1), chosen=rows_of(2), held=rows_of(3))
    wanted = Wanted(base=quantize(weight, kind="nf4"), delta=delta, known=known, settle=torch.zeros_like)
    assert STRATEGIES["calibrated"](wanted).shift is None


def test_inputs_of_which_one_never_moves_are_no_obstacle() -> None:
    weight, delta = case(0.02)
    still = inputs(1)
    still[:, 5] = 50.0
    mean = still.mean(0)
    rows = Rows(spread=moment(still - mean), mean=mean, count=len(still))
    wanted = Wanted(
        base=quantize(weight, kind="nf4"),
        delta=delta,
        known=Known(fitted=rows, chosen=rows, held=rows),
        settle=torch.Tensor.clone,
    )
    baked = STRATEGIES["calibrated"](wanted)
    assert wanted.measured(baked.weight, rows, baked.shift).kept > 0.5


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_chance_keeps_all_of_it_on_average_with_much_noise(kind: str) -> None:
    weight, delta = case(0.02)
    base = quantize(weight, kind=kind)
    wanted = Wanted(base=base, delta=delta)
    found = wanted.measured(STRATEGIES["stochastic"](wanted).weight, None)
    assert found.kept == pytest.approx(1.0, abs=0.25)
    assert 1 < found.error < 10


def test_nothing_intended_is_kept_whole() -> None:
    zero = torch.zeros(3, 4)
    assert fidelity(zero, zero, None).kept == 1.0
    assert fidelity(zero + 1, zero + 1, None).document() == {"kept": 1.0, "error": 0.0, "codes_changed": None}
    assert fidelity(zero + 1, zero, None).error == 1.0
