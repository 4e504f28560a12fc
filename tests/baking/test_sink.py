"""Inputs of which one position is a thousand times larger than the others decide nothing alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("bitsandbytes")

from adaptermix import bake
from adaptermix.baking.activations import InputsOfModules, split
from adaptermix.baking.fidelity import Fidelity, over_modules
from adaptermix.baking.strategies import Insertion, Known, Rows, _nearest
from adaptermix.models.base import BaseModel, load_base
from adaptermix.models.formats import FORMATS
from adaptermix.progress import SILENT
from tests.baking.test_bake import adapter
from tests.baking.test_forms import settings

LARGER = 1000.0
TOKENS = 20
TEXTS = [" ".join(str((n * k) % 37) for k in range(1, 3 + n % 9)) for n in range(60)]
PATH = "model.layers.3.mlp.down_proj"


def with_sink(base: BaseModel) -> None:
    """Let the first token of each text reach a module a thousand times as large."""

    def enlarge(_module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = given[0].clone()
        found[:, 0] *= LARGER
        return (found,)

    base.model.get_submodule(PATH).register_forward_pre_hook(enlarge)


def read_alone(base: BaseModel, texts: list[str]) -> list[Tensor]:
    """Return the module's inputs of each text, in float64."""
    found: list[Tensor] = []
    hook = base.model.get_submodule(PATH).register_forward_pre_hook(lambda _, given: found.append(given[0][0].double()))
    with torch.inference_mode():
        for text in texts:
            base.model(**base.tokenizer([text], return_tensors="pt"))
    hook.remove()
    return found


def check(found: Rows | None, rows: Tensor, weights: Tensor) -> None:
    """The moment is the weighted mean of outer products."""
    assert found is not None
    moment = (rows * weights[:, None]).T @ rows / weights.sum()
    assert found.count == len(rows)
    torch.testing.assert_close(found.moment.double(), moment, rtol=1e-3, atol=1e-5 * float(moment.abs().max()))
    mean = (weights @ rows) / weights.sum()
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-3, atol=1e-4 * float(mean.abs().max()))


def test_tokens_are_counted_in_three_ways_each_as_in_float64(tmp_path: Path) -> None:
    from tests.tiny import tiny_causal

    base = load_base(str(tiny_causal(tmp_path / "base")), device="cpu", dtype="float32")
    with_sink(base)
    known = InputsOfModules(base, TEXTS, {"it": PATH}, SILENT).of("it")
    assert known is not None
    parts = {part: read_alone(base, texts) for part, texts in split(TEXTS).items()}
    longest = sorted(split(TEXTS)["fitted"], key=len, reverse=True)[:16]
    usual = torch.cat(read_alone(base, longest)).square().sum(1).median()
    for part, texts in parts.items():
        rows, rest = torch.cat(texts), torch.cat([text[1:] for text in texts])
        sizes = rows.square().sum(1)
        assert sizes.max() > 1e4 * usual
        capped = (usual / sizes).clamp(max=1.0)
        found: Rows = getattr(known, part)
        if part == "fitted":  # codes are fitted to rows of which none counts more than a usual one
            check(found, rows, capped)
            continue
        check(found, rows, torch.ones_like(sizes))
        check(found.rest, rest, torch.ones_like(rest[:, 0]))
        check(found.even, rows, capped)


def rows_with_sink(seed: int, place: int | None) -> tuple[Tensor, Tensor]:
    """Return inputs of 100 texts, and which of them are first tokens; a token of each text is larger."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(100, TOKENS, 64, generator=generator, dtype=torch.float64)
    rows[..., 32:] *= 0.1
    if place is not None:
        sink = torch.randn(64, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        rows[:, place] = LARGER * (sink + 0.1 * rows[:, place])
    first = torch.zeros(100, TOKENS, dtype=torch.bool)
    first[:, 0] = True
    return rows.reshape(-1, 64), first.reshape(-1)


def counted(rows: Tensor, weights: Tensor) -> Rows:
    mean = weights @ rows / weights.sum()
    moment = (rows * weights[:, None]).T @ rows / weights.sum() - torch.outer(mean, mean)
    return Rows(covariance=moment.float(), mean=mean.float(), count=len(rows))


def every_way(seed: int, place: int | None) -> Rows:
    rows, first = rows_with_sink(seed, place)
    sizes = rows.square().sum(1)
    ones = torch.ones_like(sizes)
    even = counted(rows, (sizes.median() / sizes).clamp(max=1.0))
    return replace(counted(rows, ones), rest=counted(rows[~first], ones[~first]), even=even)


def wanted(place: int | None, relative: float, **more: Any) -> Insertion:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator) * 0.05
    delta = torch.randn(48, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    chosen, held, fitted = (every_way(seed, place) for seed in (2, 3, 1))
    assert fitted.even is not None
    known = Known(fitted=fitted.even, chosen=chosen, measured=held)
    return Insertion(
        base=FORMATS["nf4"](weight), delta=delta * (relative * weight.norm() / delta.norm()), known=known, **more
    )


@pytest.mark.parametrize("place", [None, 0, 1])
def test_calibrated_codes_serve_usual_tokens_and_the_sink_alike(place: int | None) -> None:
    """Measured by a loop over tokens in float64."""
    case = wanted(place, 0.1)
    baked = case.by("calibrated")
    found = case.measured(baked, case.known.measured)  # type: ignore[union-attr]
    rows, first = rows_with_sink(3, place)
    intended, realised = rows @ case.delta.double().T, rows @ case.realised(baked).double().T

    def told(some: Tensor) -> tuple[float, float]:
        size = float(intended[some].square().sum())
        kept = float((intended[some] * realised[some]).sum()) / size
        return kept, float((realised[some] - intended[some]).square().sum() / size) ** 0.5

    kept, error = told(torch.ones_like(first))
    assert (found.kept, found.error) == (pytest.approx(kept, abs=2e-3), pytest.approx(error, abs=2e-3))
    kept, error = told(~first)
    assert (found.kept_rest, found.error_rest) == (pytest.approx(kept, abs=2e-3), pytest.approx(error, abs=2e-3))
    usual = torch.ones(100, TOKENS, dtype=torch.bool)
    usual[:, 0 if place is None else place] = False
    kept, error = told(usual.reshape(-1))
    assert kept > 0.85
    assert error < 0.7


def test_codes_that_serve_the_sink_alone_are_not_taken() -> None:
    """As those are that are fitted to all rows, of which the first tokens decide."""
    right = wanted(0, 0.03, least=0.5, most=0.9)
    assert right.known is not None
    rows, _ = rows_with_sink(1, 0)
    every = counted(rows, torch.ones_like(rows[:, 0]))
    wrong = replace(right, known=replace(right.known, fitted=every))
    assert wrong.known is not None
    baked = _nearest(wrong, wrong.known, float("inf"))
    told = wrong.measured(baked, right.known.measured)
    assert told.kept > 0.5
    assert told.error < 0.9
    assert told.error_rest is not None
    assert told.error_rest > 1
    assert told.most_error >= told.error_rest
    assert not wrong.is_enough(baked, 0.5)
    assert wrong.automatic() is None


def test_of_two_results_that_with_the_lower_mean_of_squared_errors_is_taken() -> None:
    """What serves the sink well and the rest hardly worse is taken; what loses the rest for the sink is not."""
    plain = Fidelity(kept=0.0, error=1.0, error_rest=1.1, error_even=1.1)
    served = Fidelity(kept=1.0, error=0.1, error_rest=1.2, error_even=1.2)
    lost = Fidelity(kept=1.0, error=0.3, error_rest=2.1, error_even=2.0)
    assert plain.overall_error == pytest.approx((3.42 / 3) ** 0.5)
    assert served.overall_error < plain.overall_error < lost.overall_error


def test_means_over_modules_are_over_those_that_tell() -> None:
    found = over_modules(
        [
            Fidelity(kept=1.2, error=0.5, size=1.0, kept_rest=0.5, error_rest=2.0),
            Fidelity(kept=0.8, error=0.1, size=1.0),
            Fidelity(kept=0.0, error=0.0),
        ]
    )
    assert (found.kept, found.error) == (0.9, 0.3)
    assert (found.kept_rest, found.error_rest) == (0.5, 2.0)
    assert found.kept_even is None
    assert (found.least_kept, found.most_error) == (0.5, 2.0)


def test_report_manifest_and_card_tell_it_without_first_tokens(wide: Path, texts: str, tmp_path: Path) -> None:
    one = adapter(wide, tmp_path / "one", alpha=0.5)
    more: dict[str, Any] = {"quantize": "nf4", "strategy": "calibrated", "calibration": [texts], "keep_at_least": 0.0}
    report = bake(settings(wide, one, tmp_path / "out", **more))
    document = report.document()
    rest = [module["kept_rest"] for module in document["modules"].values()]
    assert document["kept_rest"] == pytest.approx(sum(min(1.0, one) for one in rest) / len(rest))
    assert all(module["error_rest"] is not None for module in document["modules"].values())
    written = json.loads((tmp_path / "out" / "adaptermix.json").read_text())["fidelity"]
    assert written["error_rest"] == document["error_rest"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Without the first token of each text: kept {document['kept_rest']:.3f}, error" in card
