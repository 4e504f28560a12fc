"""A module that only one adapter has: the others count as zero there, for every method, and the report says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptermix import merge
from adaptermix.errors import PlanError
from adaptermix.methods import METHODS
from adaptermix.methods.base import is_weighted_sum
from adaptermix.methods.mergekit import mergekit_methods

from ..factories import WEIGHTS, adapter_deltas, key, write_lora
from ..methods import oracles

LOWER, UPPER = "layers.0.q", "layers.1.q"
SHAPE = (12, 10, 2)
FORMS = ("absent", "zero B", "zero A", "scale 0", "cancelling")
BY_FACTORS = ("peft-linear", "factor-average")
"""Methods that add factors: a zero delta with an A of its own is not the same to them, as it is not to PEFT."""


def members() -> list[str]:
    try:
        return [f"mergekit:{name}" for name in mergekit_methods() if name != "passthrough"]
    except PlanError:
        return []


NAMES = [
    *sorted(name for name, cls in METHODS.items() if not cls.learner and len(cls.roles) in (0, 2)),
    *members(),
]
FACTOR = {
    "mergekit:ties": 1.0,
    "mergekit:della": 1.0,
    "mergekit:ram": 1.0,
    "mergekit:ramplus_tl": 1.0,
    "mergekit:sce": 1.0,
    "factor-average": 0.36,
}
"""What a delta of weight 0.6 that acts alone is multiplied by; 0.6, or 1/2 where a method takes no weights, else."""
UNWEIGHTED = ("karcher", "model_stock", "nearswap", "ram", "ramplus_tl", "sce")
CHANGES = ("iso-c", "mergekit:nearswap")
"""Methods that change the direction of a delta that acts alone."""


def weights_of(method: str) -> list[float]:
    return [0.5, 0.5] if method.removeprefix("mergekit:") in UNWEIGHTED and ":" in method else [0.6, 0.4]


def options_of(method: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if method in ("ties", "magnitude-prune", "knots", "dare-linear", "dare-ties"):
        found["density"] = 1.0
    if method == "breadcrumbs":
        found |= {"density": 1.0, "outliers": 0.0}
    if method == "della":
        found |= {"density": 1.0, "epsilon": 0.0}
    return found | ({"t": 0.5} if method == "mergekit:nearswap" else {})


class Layout:
    """A task adapter of two layers, and an alignment adapter of the lower one, with nothing or a zero above."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.task = write_lora(folder / "task", {LOWER: SHAPE, UPPER: SHAPE}, alpha=4, seed=1)
        for form in FORMS:
            self._align(folder / form.replace(" ", "_"), form)

    def _align(self, path: Path, form: str) -> None:
        modules = {LOWER: SHAPE} if form == "absent" else {LOWER: SHAPE, UPPER: SHAPE}
        write_lora(path, modules, alpha={LOWER: 4, UPPER: 0} if form == "scale 0" else 4, seed=2)
        if form in ("absent", "scale 0"):
            return
        tensors = load_file(path / WEIGHTS)
        a, b = tensors[key(UPPER, "A")], tensors[key(UPPER, "B")]
        if form == "cancelling":
            a[1], b[:, 1] = -2 * a[0], b[:, 0] / 2
        else:
            (b if form == "zero B" else a).zero_()
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})

    def statistics(self, method: str, *, everywhere: bool) -> dict[str, Any]:
        kind = METHODS[method].statistics if method in METHODS else None
        if kind is None:
            return {}
        paths = []
        for number, modules in enumerate(((LOWER, UPPER), (LOWER, UPPER) if everywhere else (LOWER,))):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(40, 10, generator=generator)
            tensor = x.T @ x if kind == "in in" else torch.rand(12, 10, generator=generator) + 0.1
            paths.append(self.folder / f"{method}{number}{everywhere}.safetensors")
            save_file({module: tensor.clone() for module in modules}, paths[-1])
        return {"statistics": paths}

    def merged(self, method: str, form: str, *, everywhere: bool = False, **more: Any) -> tuple[Tensor, Any]:
        """Return the merged delta of the upper layer, and the report of it."""
        out = self.folder / "out" / f"{method}-{form}-{len(list(self.folder.glob('out/*')))}".replace(":", "_")
        settings = {
            "weights": weights_of(method),
            "options": options_of(method),
            "max_residual": 1.0,
            **self.statistics(method, everywhere=everywhere),
            **more,
        }
        folders = [self.folder / "task", self.folder / form.replace(" ", "_")]
        report = merge(folders, method=method, out=out, **settings)
        return adapter_deltas(out)[UPPER], report.modules[UPPER]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return Layout(tmp_path_factory.mktemp("layout"))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("method", NAMES)
def test_where_one_adapter_acts_it_is_multiplied_by_what_the_report_says(layout: Layout, method: str) -> None:
    found, report = layout.merged(method, "absent")
    weight = weights_of(method)[0]
    assert report.weights == pytest.approx((FACTOR.get(method, weight), 0.0), rel=1e-5)
    if method not in CHANGES:
        assert close(found, FACTOR.get(method, weight) * layout.task[UPPER])


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("method", [name for name in NAMES if name not in BY_FACTORS])
def test_absent_and_zero_are_one_function(layout: Layout, method: str, form: str) -> None:
    absent, report = layout.merged(method, "absent")
    zero, other = layout.merged(method, form)
    assert close(zero, absent)
    # A sum need not multiply factors, so it does not see that they cancel.
    if form != "cancelling" or method not in METHODS or not is_weighted_sum(METHODS[method]):
        assert other.weights == report.weights
        assert other.rank == report.rank


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", ["ties", "dare-ties", "della", "mergekit:dare_ties", "mergekit:della"])
def test_absent_and_zero_are_one_function_where_entries_are_dropped(layout: Layout, method: str, seed: int) -> None:
    if method not in NAMES:
        pytest.skip("mergekit is not installed")
    more: dict[str, Any] = {"options": {"density": 0.5}, "seed": seed}
    assert close(layout.merged(method, "zero B", **more)[0], layout.merged(method, "absent", **more)[0])


def test_ties_over_the_model_counts_the_entries_of_a_module_that_is_absent(layout: Layout) -> None:
    """Of the alignment adapter 0.25 of 240 entries are kept, 60 of its 120 that are not zero."""
    more: dict[str, Any] = {"options": {"density": 0.25, "scope": "model"}, "rank": 10}
    out = layout.folder / "whole"
    for form in ("absent", "zero B"):
        merge(
            [layout.folder / form.replace(" ", "_"), layout.folder / "task"],
            weights=[1.0, 0.0],
            method="ties",
            out=out,
            overwrite=True,
            max_residual=1.0,
            **more,
        )
        assert int((adapter_deltas(out)[LOWER].abs() > 1e-5).sum()) == 60


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_zero_delta_with_statistics_counts_as_they_say(layout: Layout, method: str) -> None:
    files = [
        load_file(path)[UPPER].double().numpy() for path in layout.statistics(method, everywhere=True)["statistics"]
    ]
    delta = layout.task[UPPER].numpy()
    found = [layout.merged(method, form, everywhere=True, rank=10, options={})[0] for form in ("absent", "zero B")]
    if method == "fisher":
        expected = oracles.fisher([delta, 0 * delta], [0.6, 0.4], files)
    else:
        grams = [w * (0.9 * g + 0.1 * (g * torch.eye(10).numpy())) for w, g in zip((0.6, 0.4), files, strict=True)]
        expected = delta @ grams[0] @ torch.linalg.inv(torch.from_numpy(sum(grams))).numpy()
    for one in found:
        assert close(one, torch.from_numpy(expected), 1e-4)


@pytest.mark.parametrize("form", ["absent", "zero B"])
def test_a_zero_delta_counts_by_statistics_with_the_paths_of_its_own_class(tmp_path: Path, form: str) -> None:
    """Its statistics name the modules of the bare encoder, the other adapter has a head."""
    lower, upper = "encoder.layer.0.dense", "encoder.layer.1.dense"
    write_lora(tmp_path / "bare", {lower: (6, 5, 2)} | ({upper: (6, 5, 2)} if form == "zero B" else {}), seed=1)
    if form == "zero B":
        tensors = load_file(tmp_path / "bare" / WEIGHTS)
        save_file(tensors | {key(upper, "B"): torch.zeros(6, 2)}, tmp_path / "bare" / WEIGHTS)
    delta = write_lora(tmp_path / "headed", {f"bert.{path}": (6, 5, 2) for path in (lower, upper)}, seed=2)
    generator = torch.Generator().manual_seed(0)
    grams = []
    for name, prefix in (("bare", ""), ("headed", "bert.")):
        rows = torch.randn(40, 5, generator=generator)
        grams.append(rows.T @ rows / 40)
        save_file({f"{prefix}{path}": grams[-1].clone() for path in (lower, upper)}, tmp_path / f"{name}.safetensors")
    merge(
        [tmp_path / "bare", tmp_path / "headed"],
        weights=[0.5, 0.5],
        method="regmean",
        options={"off_diagonal": 1.0},
        statistics=[tmp_path / "bare.safetensors", tmp_path / "headed.safetensors"],
        out=tmp_path / "out",
    )
    bare, headed = (gram.double() for gram in grams)
    expected = delta[f"bert.{upper}"] @ headed @ torch.linalg.inv(bare + headed)
    assert close(adapter_deltas(tmp_path / "out")[f"bert.{upper}"], expected)


@pytest.mark.parametrize("method", ["slerp", "karcher", "model-stock", "regmean", "fisher"])
def test_weights_that_do_not_sum_to_one(layout: Layout, method: str) -> None:
    """Sums stay sums; a mean divides by all weights, also by that of an adapter without statistics."""
    factor = 0.75 if METHODS[method].statistics else 3.0
    found, report = layout.merged(method, "absent", weights=[3.0, 1.0])
    assert close(found, factor * layout.task[UPPER])
    assert report.weights == pytest.approx((factor, 0.0))


@pytest.mark.parametrize("method", ["slerp", "fisher", "regmean", "ties", "mergekit:linear", "mergekit:slerp"])
def test_filled_to_one_an_adapter_that_acts_alone_is_merged_alone(layout: Layout, method: str) -> None:
    if method not in NAMES:
        pytest.skip("mergekit is not installed")
    for form in ("absent", "zero B"):
        found, report = layout.merged(method, form, fill="one")
        assert close(found, layout.task[UPPER])
        assert report.weights == (1.0, 0.0)


def test_biases_inside_loras_merge_alike(tmp_path: Path) -> None:
    """A LoRA without the module, and one whose update and bias are zero."""
    found = []
    for form in ("absent", "zero"):
        for number, modules in enumerate(((LOWER, UPPER), (LOWER,) if form == "absent" else (LOWER, UPPER))):
            path = tmp_path / f"{form}{number}"
            write_lora(path, dict.fromkeys(modules, SHAPE), alpha=2, seed=number, lora_bias=True)
            tensors = load_file(path / WEIGHTS)
            for module in modules:
                lost = number == 1 and module == UPPER
                generator = torch.Generator().manual_seed(number)
                bias = torch.randn(12, generator=generator)
                tensors[f"base_model.model.{module}.lora_B.bias"] = bias * (not lost)
                if lost:
                    tensors[key(module, "B")].zero_()
            save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        merge([tmp_path / f"{form}0", tmp_path / f"{form}1"], weights=[0.6, 0.4], method="slerp", out=tmp_path / form)
        found.append(load_file(tmp_path / form / WEIGHTS)[f"base_model.model.{UPPER}.lora_B.bias"])
    torch.testing.assert_close(found[0], found[1])
    own = load_file(tmp_path / "absent0" / WEIGHTS)[f"base_model.model.{UPPER}.lora_B.bias"]
    torch.testing.assert_close(found[0], 0.6 * own)


@pytest.mark.parametrize(
    "method", ["mergekit:linear", "mergekit:multislerp", "karcher", "model-stock", "tsv", "fisher"]
)
def test_of_three_adapters_one_lacks_the_module(tmp_path: Path, method: str) -> None:
    """Means divide by all three weights; a paper's count of models is that of the two that have a direction."""
    if method not in NAMES:
        pytest.skip("mergekit is not installed")
    deltas, weights = [], [0.5, 0.3, 0.2]
    for seed, name in enumerate("abc"):
        modules = (LOWER,) if name == "c" else (LOWER, UPPER)
        deltas.append(write_lora(tmp_path / name, dict.fromkeys(modules, SHAPE), alpha=4, seed=seed).get(UPPER))
        ones = {module: torch.ones(12, 10) * (seed + 1) for module in modules}
        save_file(ones, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in "abc"] if method == "fisher" else ()
    report = merge(
        [tmp_path / name for name in "abc"],
        weights=weights,
        method=method,
        statistics=files,
        rank=10,
        max_residual=1.0,
        out=tmp_path / "out",
    )
    one, other = (delta.numpy() for delta in deltas[:2] if delta is not None)
    if method in ("mergekit:linear", "mergekit:multislerp"):
        api = pytest.importorskip("mergekit.merge_methods.api")
        tensors = [torch.from_numpy(one), torch.from_numpy(other), torch.zeros(12, 10, dtype=torch.float64)]
        expected = api.merge_tensors(tensors, method.removeprefix("mergekit:"), parameters={"weight": weights}).numpy()
    elif method == "karcher":
        expected = oracles.karcher([one, other], weights[:2])
    elif method == "model-stock":
        expected = oracles.model_stock([one, other], weights[:2])
    elif method == "tsv":
        expected = oracles.tsv([one, other], weights[:2], None)
    else:  # the third has no statistics of the module: the mean of the two, times 0.8
        expected = (0.5 * one + 0.3 * 2 * other) / (0.5 + 0.6) * 0.8
    assert close(adapter_deltas(tmp_path / "out")[UPPER], torch.from_numpy(expected), 1e-4)
    assert report.modules[UPPER].weights == (0.5, 0.3, 0.0)
