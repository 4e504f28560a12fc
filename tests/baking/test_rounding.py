"""Code search against loops, and what it keeps of a delta."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("bitsandbytes")

from adaptermix.baking.fidelity import fidelity
from adaptermix.baking.rounding import Inputs, descend, fit, fit_scales, nearest_plane
from adaptermix.baking.strategies import STRATEGIES, Insertion, Known, Rows, leading
from adaptermix.models.formats import FORMATS, FourBit

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
    return Rows(covariance=moment(found - mean), mean=mean, count=rows)


def error(known: Inputs, difference: torch.Tensor) -> torch.Tensor:
    """Mean squared length of each row's outputs under a difference of weights."""
    return ((difference @ known.moment) * difference).sum(1)


def moment(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_nearest_plane_is_the_loop_that_rounds_one_column_after_another(kind: str) -> None:
    """In blocks or not, as a loop over single weights in float64 with the conditional optimum of the rest."""
    weight, delta = case(0.05)
    base, known = FORMATS[kind](weight), Inputs(moment=moment(inputs(1)))
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
    base, known = FORMATS[kind](weight), Inputs(moment=moment(inputs(1)))
    target, scales = base.weight() + delta, base.scale_of_each()
    codes, errors = base.codes.long(), [error(known, base.weight() - target)]
    for _ in range(3):
        codes = descend(target, codes, scales, base.table, known)
        errors.append(error(known, base.table[codes] * scales - target))
        assert (errors[-1] <= errors[-2] * (1 + 1e-5)).all()
    assert errors[1].sum() < errors[0].sum()


def test_scales_are_those_of_least_squares() -> None:
    weight, delta = case(0.1)
    base, known = FourBit.of(weight, kind="nf4", double=False), Inputs(moment=moment(inputs(1)))
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
    base, known = FORMATS[kind](weight), Inputs(moment=moment(inputs(1)))
    target = base.weight() + delta
    found = fit(base, target, known)
    assert (error(known, found.weight() - target) <= error(known, base.weight() - target) * (1 + 1e-5)).all()
    if relative == 0:
        assert torch.equal(found.codes, base.codes)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_on_rows_that_had_no_part_calibrated_codes_keep_what_plain_rounding_loses(has_bias: bool, kind: str) -> None:
    weight, delta = case(0.02)
    base, held = FORMATS[kind](weight), inputs(3)
    known = Known(fitted=rows_of(1), chosen=rows_of(2), measured=rows_of(3))
    wanted = Insertion(base=base, delta=delta, known=known, settle=torch.Tensor.clone if has_bias else None)
    naive = wanted.measured(STRATEGIES["requantize"](wanted), known.measured)
    baked = STRATEGIES["calibrated"](wanted)
    found = wanted.measured(baked, known.measured)
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
    known = Known(fitted=rows_of(1, rows), chosen=rows_of(2), measured=rows_of(3))
    wanted = Insertion(base=FORMATS["nf4"](weight), delta=delta, known=known)
    plain = wanted.measured(STRATEGIES["requantize"](wanted), known.chosen).error
    found = STRATEGIES["calibrated"](wanted)
    assert wanted.measured(found, known.chosen).error <= plain
    assert wanted.measured(found, known.measured).error <= plain * 1.1


def test_a_bias_that_rounds_the_shift_away_takes_no_part() -> None:
    weight, delta = case(0.02)
    known = Known(fitted=rows_of(1), chosen=rows_of(2), measured=rows_of(3))
    wanted = Insertion(base=FORMATS["nf4"](weight), delta=delta, known=known, settle=torch.zeros_like)
    assert STRATEGIES["calibrated"](wanted).shift is None


def test_inputs_of_which_one_never_moves_are_no_obstacle() -> None:
    weight, delta = case(0.02)
    still = inputs(1)
    still[:, 5] = 50.0
    mean = still.mean(0)
    rows = Rows(covariance=moment(still - mean), mean=mean, count=len(still))
    wanted = Insertion(
        base=FORMATS["nf4"](weight),
        delta=delta,
        known=Known(fitted=rows, chosen=rows, measured=rows),
        settle=torch.Tensor.clone,
    )
    baked = STRATEGIES["calibrated"](wanted)
    assert wanted.measured(baked, rows).kept > 0.5


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_chance_keeps_all_of_it_on_average_with_much_noise(kind: str) -> None:
    weight, delta = case(0.02)
    base = FORMATS[kind](weight)
    wanted = Insertion(base=base, delta=delta)
    found = wanted.measured(STRATEGIES["stochastic"](wanted), None)
    assert found.kept == pytest.approx(1.0, abs=0.25)
    assert 1 < found.error < 10


def test_nothing_intended_is_kept_whole() -> None:
    zero = torch.zeros(3, 4)
    assert fidelity(zero, zero, None).kept == 1.0
    whole = fidelity(zero + 1, zero + 1, None).document()
    assert {key: value for key, value in whole.items() if value is not None} == {"kept": 1.0, "error": 0.0}
    assert fidelity(zero + 1, zero, None).error == 1.0


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_small_lora_repays_what_codes_lose(has_bias: bool, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(OUT, INTO, generator=generator) * 0.05
    strength = torch.logspace(0, -2, 16)  # as adapters have it, of which few directions count
    delta = torch.randn(OUT, 16, generator=generator) * strength @ torch.randn(16, INTO, generator=generator)
    delta *= 0.005 * weight.norm() / delta.norm()
    known = Known(fitted=rows_of(1), chosen=rows_of(2), measured=rows_of(3))
    settle = torch.Tensor.clone if has_bias else None
    wanted = Insertion(base=FORMATS[kind](weight), delta=delta, known=known, settle=settle, rank=16, most=0.5)
    codes, found = wanted.by("calibrated"), STRATEGIES["residual"](wanted)
    assert wanted.measured(found, known.measured).kept >= 0.95
    assert wanted.measured(found, known.measured).error < wanted.measured(codes, known.measured).error
    root = torch.linalg.cholesky(known.measured.moment.double())
    shares = torch.linalg.svdvals(delta.double() @ root).square().cumsum(0)
    alone = int((shares < 0.96 * shares[-1]).sum()) + 1  # the rank that cutting the delta takes
    assert found.lora is not None
    assert found.lora.rank < 2 * alone


def test_where_no_smaller_lora_repays_it_the_lora_is_the_delta() -> None:
    weight, delta = case(1e-4)
    known = Known(fitted=rows_of(1), chosen=rows_of(2), measured=rows_of(3))
    wanted = Insertion(base=FORMATS["nf4"](weight), delta=delta, known=known, rank=4, least=1.0)
    found = STRATEGIES["residual"](wanted)
    assert found.lora is not None
    torch.testing.assert_close(found.lora.dense(), delta, rtol=1e-3, atol=1e-6 * float(delta.abs().max()))
    assert torch.equal(found.weight.codes, wanted.base.codes)


def test_the_lora_is_the_best_of_its_rank_in_outputs() -> None:
    """As the truncated decomposition of the weighted matrix in float64."""
    _, matrix = case(0.1)
    full = matrix + 0.01 * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5))
    known = rows_of(1).moment
    found = leading(full, known, 3)
    root = torch.linalg.cholesky(known.double() + 1e-3 * known.diagonal().mean() * torch.eye(INTO), upper=True).T
    singular = torch.linalg.svdvals(full.double() @ root)
    off = ((full - found.dense()).double() @ root).square().sum()
    assert float(off) == pytest.approx(float(singular[3:].square().sum()), rel=1e-3)


_INTERPRETED = """
import torch
from adaptermix.baking.sweep import sweep_block
from adaptermix.baking.sweep_triton import sweep_block as fused
for rows, columns, levels in ((37, 50, 16), (16, 64, 256), (5, 3, 16)):
    torch.manual_seed(rows)
    given = torch.randn(300, columns)
    weight, gradient = torch.randn(2, rows, columns).unbind()
    rest = torch.rand(rows, columns) + 0.1, given.T @ given / 300, torch.linspace(-1, 1, levels)
    (codes, moves), (same, near) = (run(weight, gradient.clone(), *rest) for run in (sweep_block, fused))
    assert torch.equal(codes, same)
    torch.testing.assert_close(moves, near)
"""


def test_the_kernel_for_gpus_is_the_loop() -> None:
    """As Triton's interpreter runs it, where Triton is installed."""
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", _INTERPRETED], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_gpu_it_is_as_on_a_cpu(kind: str) -> None:
    weight, delta = case(0.02)
    known = Known(fitted=rows_of(1), chosen=rows_of(2), measured=rows_of(3))
    on_cpu = STRATEGIES["calibrated"](Insertion(base=FORMATS[kind](weight), delta=delta, known=known))
    told = Insertion(base=FORMATS[kind](weight), delta=delta, known=known).measured(on_cpu, known.measured)
    there = Known(**{part: _there(getattr(known, part)) for part in ("fitted", "chosen", "measured")})
    wanted = Insertion(base=FORMATS[kind](weight.cuda()), delta=delta.cuda(), known=there)
    found = wanted.measured(STRATEGIES["calibrated"](wanted), there.measured)
    assert found.kept == pytest.approx(told.kept, abs=0.03)
    assert found.error == pytest.approx(told.error, abs=0.03)


def _there(rows: Rows) -> Rows:
    return Rows(covariance=rows.covariance.cuda(), mean=rows.mean.cuda(), count=rows.count)


LEVELS = [1.0, 0.45, 0.02, 0.0, -0.3, -1.0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("nf4", [1, 0.4407098, 0, 0, -0.2844414, -1]),
        ("fp4", [1, 0.5, 1 / 192, 0, -1 / 3, -1]),
        ("int8", [1, 57 / 127, 3 / 127, 0, -38 / 127, -1]),
    ],
)
def test_the_nearest_codes_by_hand(kind: str, expected: list[float]) -> None:
    weight = torch.tensor([[*LEVELS, *[0.0] * 58]])
    assert FORMATS[kind](weight).weight()[0, :6].tolist() == pytest.approx(expected, abs=1e-4)


def in_steps(delta: list[float]) -> Insertion:
    """A row of 8 bits whose scale is 127, so that every whole number is a code."""
    base = FORMATS["int8"](torch.tensor([[127.0, 10.0, -3.0, 0.0]]))
    assert base.weight().tolist() == [[127.0, 10.0, -3.0, 0.0]]
    return Insertion(base=base, delta=torch.tensor([delta]))


@pytest.mark.parametrize(
    ("strategy", "delta", "expected"),
    [
        ("requantize", [0.0, 0.6, 0.4, -0.6], [127, 11, -3, -1]),
        ("requantize", [0.0, 2.0, -5.0, 1.0], [127, 12, -8, 1]),
        ("requantize", [127.0, 1.0, 0.0, 0.0], [254, 12, -4, 0]),  # the scale grows, so that codes are two apart
        ("stochastic", [0.0, 2.0, -5.0, 1.0], [127, 12, -8, 1]),
        ("stochastic", [127.0, 1.0, 0.0, 0.0], [127, 11, -3, 0]),  # the scale stays, and what lies beyond is cut
    ],
)
def test_a_delta_on_codes_that_are_whole_numbers(strategy: str, delta: list[float], expected: list[float]) -> None:
    assert STRATEGIES[strategy](in_steps(delta)).weight.weight()[0].tolist() == pytest.approx(expected)


def test_chance_rounds_up_as_often_as_the_share_says() -> None:
    base = FORMATS["int8"](torch.tensor([[127.0, *[10.0] * 4000]]))
    wanted = Insertion(base=base, delta=torch.tensor([[0.0, *[0.25] * 4000]]))
    found = STRATEGIES["stochastic"](wanted).weight.weight()[0, 1:].round(decimals=3)
    assert found.unique().tolist() == [10, 11]
    assert float((found == 11).float().mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("strategy", ["calibrated", "residual"])
def test_a_delta_that_codes_hold_is_written_whole(strategy: str) -> None:
    """Four inputs that know nothing of each other, of which none is constant."""
    rows = Rows(covariance=torch.eye(4), mean=torch.zeros(4), count=9)
    wanted = in_steps([0.0, 2.0, -5.0, 1.0])
    wanted = Insertion(base=wanted.base, delta=wanted.delta, known=Known(fitted=rows, chosen=rows, measured=rows))
    found = STRATEGIES[strategy](wanted)
    assert found.lora is None
    assert found.shift is None
    assert found.weight.weight()[0].tolist() == pytest.approx([127, 12, -8, 1], abs=0.01)


@pytest.mark.parametrize(
    ("delta", "has_rows", "expected"),
    [
        ([0.0, 2.0, -5.0, 1.0], True, "requantize"),  # codes hold it, so that nothing better is there
        ([0.0, 2.0, -5.0, 1.0], False, None),
        # plain rounding keeps nothing of a fifth of a step, and the next codes are much too far
        ([0.0, 0.2, -0.2, 0.2], True, None),
    ],
)
def test_which_strategy_auto_takes(delta: list[float], has_rows: bool, expected: str | None) -> None:
    rows = Rows(covariance=torch.eye(4), mean=torch.zeros(4), count=9)
    known = Known(fitted=rows, chosen=rows, measured=rows) if has_rows else None
    wanted = in_steps(delta)
    found = Insertion(base=wanted.base, delta=wanted.delta, known=known, least=0.9, most=0.5)
    assert found.automatic() == expected
