"""Weights and options by place, and what an adapter weighs where others do not act."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptermix.errors import PlanError
from adaptermix.merging import merge
from adaptermix.merging.overrides import layer_of, make_override, split_settings
from adaptermix.methods.base import METHODS

from ..factories import WEIGHTS, adapter_deltas, contents, key, write_lora
from ..refusals import refuses

LAYERS = 5
MODULES = {f"model.layers.{n}.{kind}_proj": (6, 5, 2) for n in range(LAYERS) for kind in ("q", "v")} | {
    "lm_head": (7, 5, 2)
}
NAMES = ["task", "align"]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Two adapters and their exact deltas."""
    deltas = [write_lora(tmp_path / name, MODULES, alpha=4, seed=seed) for seed, name in enumerate(NAMES, 1)]
    return [tmp_path / name for name in NAMES], deltas


Pair = tuple[list[Path], list[dict[str, Tensor]]]


def holds(pair: Pair, out: Path, weights: dict[str, tuple[float, float]], **settings: Any) -> None:
    """Merge, and compare with the float64 sum by the weights that each module should have."""
    report = merge(pair[0], out=out, weights=[0.9, 0.1], **settings)
    got = adapter_deltas(out)
    assert set(got) == set(MODULES)
    for module in MODULES:
        own = weights.get(module, (0.9, 0.1))
        assert report.modules[module].weights == pytest.approx(own, abs=1e-12)
        expected = own[0] * pair[1][0][module] + own[1] * pair[1][1][module]
        assert (got[module] - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("model.layers.12.attn.q_proj", 12),
        ("0.weight", 0),
        ("h.3", 3),
        ("layers.2.experts.7.up", 2),
        ("lm_head", None),
        ("model.conv2d.x1", None),
    ],
)
def test_the_number_of_the_block_is_the_first_whole_number(module: str, number: int | None) -> None:
    assert layer_of(module) == number


class TestDelta:
    """The merged delta is the float64 sum by the weights of each place."""

    def test_a_glob_over_module_paths(self, pair: Pair, tmp_path: Path) -> None:
        expected = {module: (0.25, 0.75) for module in MODULES if module.endswith("q_proj")}
        holds(pair, tmp_path / "out", expected, places=[{"modules": "*q_proj", "weights": 0.25}])

    def test_a_range_of_layers_holds_both_ends_and_nothing_outside_the_blocks(self, pair: Pair, tmp_path: Path) -> None:
        expected = {m: (1.5, -0.5) for m in MODULES if layer_of(m) in (1, 2, 3)}
        holds(pair, tmp_path / "out", expected, places=[{"layers": "1-3", "weights": [1.5, -0.5]}])

    @pytest.mark.parametrize("layers", ["2", " 2 ", "2-2", 2])
    def test_one_layer(self, pair: Pair, tmp_path: Path, layers: Any) -> None:
        expected = {m: (0.0, 1.0) for m in MODULES if layer_of(m) == 2}
        holds(pair, tmp_path / "out", expected, places=[{"layers": layers, "weights": 0.0}])

    def test_all_layers_leave_what_lies_outside_the_blocks(self, pair: Pair, tmp_path: Path) -> None:
        expected = {m: (0.3, 0.7) for m in MODULES if layer_of(m) is not None}
        holds(pair, tmp_path / "out", expected, places=[{"layers": "all", "weights": 0.3}])

    def test_a_curve_runs_linearly_between_evenly_spaced_points(self, pair: Pair, tmp_path: Path) -> None:
        """Three points over layers 0 to 4: ends and middle as given, halfway between in layers 1 and 3."""
        values = [1.0, 0.75, 0.5, 0.35, 0.2]
        expected = {m: (values[n], 1 - values[n]) for m in MODULES if (n := layer_of(m)) is not None}
        holds(pair, tmp_path / "out", expected, places=[{"curve": [1.0, 0.5, 0.2]}])

    def test_a_curve_over_some_layers(self, pair: Pair, tmp_path: Path) -> None:
        expected = {"model.layers.1.q_proj": (1.0, 0.0), "model.layers.2.q_proj": (0.5, 2.0)}
        expected["model.layers.3.q_proj"] = (0.0, 4.0)
        place = {"layers": "1-3", "modules": "*q_proj", "curve": [[1, 0], "0,4"]}
        holds(pair, tmp_path / "out", expected, places=[place])

    def test_a_curve_over_one_layer_takes_its_first_point(self, pair: Pair, tmp_path: Path) -> None:
        expected = {m: (0.4, 0.6) for m in MODULES if layer_of(m) == 3}
        holds(pair, tmp_path / "out", expected, places=[{"layers": "3", "curve": [0.4, 1.0]}])

    def test_a_curve_without_layers_spans_the_blocks_of_its_own_modules(self, tmp_path: Path) -> None:
        modules = {f"encoder.{n}.q": (4, 4, 1) for n in range(3)} | {f"decoder.{n}.q": (4, 4, 1) for n in range(7)}
        for seed, name in enumerate(NAMES):
            write_lora(tmp_path / name, modules, seed=seed)
        place = {"modules": "encoder.*", "curve": [0, 1]}
        report = merge([tmp_path / name for name in NAMES], weights=[0.9], places=[place])
        assert [report.modules[f"encoder.{n}.q"].weights[0] for n in range(3)] == [0.0, 0.5, 1.0]

    def test_of_two_places_the_later_wins(self, pair: Pair, tmp_path: Path) -> None:
        places = [{"modules": "*q_proj", "weights": 0.25}, {"layers": "0-1", "weights": 0.5}]
        expected = {m: (0.25, 0.75) for m in MODULES if m.endswith("q_proj")}
        expected |= {m: (0.5, 0.5) for m in MODULES if layer_of(m) in (0, 1)}
        holds(pair, tmp_path / "one", expected, places=places)
        expected |= {m: (0.25, 0.75) for m in MODULES if m.endswith("q_proj")}
        holds(pair, tmp_path / "two", expected, places=places[::-1])

    def test_settings_at_a_place_are_places(self, pair: Pair, tmp_path: Path) -> None:
        options = {"weights@*q_proj": "0.25,0.75", "weights@layers:1-2,*v_proj": 0.5, "curve@layers:3-4": [0, 1]}
        expected = {m: (0.25, 0.75) for m in MODULES if m.endswith("q_proj")}
        expected |= {f"model.layers.{n}.v_proj": (0.5, 0.5) for n in (1, 2)}
        expected |= {m: (n - 3.0, 4.0 - n) for m in MODULES if (n := layer_of(m)) in (3, 4) and n is not None}
        holds(pair, tmp_path / "out", expected, options=options)

    def test_settings_at_a_place_come_after_the_places(self, pair: Pair, tmp_path: Path) -> None:
        expected = {m: (0.1, 0.9) for m in MODULES if m.endswith("q_proj")}
        places = [{"modules": "*q_proj", "weights": 0.6}]
        holds(pair, tmp_path / "out", expected, options={"weights@*q_proj": 0.1}, places=places)

    def test_options_of_the_method_differ_by_place(self, pair: Pair) -> None:
        """A gain of 2 at a place doubles the norm there and nowhere else."""
        settings: dict[str, Any] = {"weights": [0.5, 0.5], "method": "ties", "form": "dense"}
        plain = merge(pair[0], options={"density": 0.5}, **settings)
        placed = merge(pair[0], options={"density": 0.5, "gain@layers:1-2": 2.0}, **settings)
        for module in MODULES:
            factor = 2 if layer_of(module) in (1, 2) else 1
            assert placed.modules[module].norm == pytest.approx(factor * plain.modules[module].norm, rel=1e-6)

    def test_options_at_a_place_join_those_of_earlier_places_and_of_everywhere(self, pair: Pair) -> None:
        settings: dict[str, Any] = {"weights": [0.5, 0.5], "method": "ties", "form": "dense"}
        alone = merge(pair[0], options={"density": 0.3, "gain": 4.0, "order": "scale-first"}, **settings)
        places = [{"layers": "0-1", "options": {"gain": 4.0}}, {"modules": "*q_proj", "options": {"density": 0.3}}]
        placed = merge(pair[0], options={"density": 1.0, "order": "scale-first"}, places=places, **settings)
        module = "model.layers.0.q_proj"
        assert placed.modules[module].norm == pytest.approx(alone.modules[module].norm, rel=1e-6)


class TestRefusals:
    """One sentence each, before any tensor is read."""

    @pytest.mark.parametrize(
        ("place", "words"),
        [
            ({"modules": "*k_proj", "weights": 0.5}, "no module matches modules '*k_proj'"),
            ({"layers": "9-12", "weights": 0.5}, "layers 9-12"),
            (
                {"modules": "lm_head", "layers": "0-4", "weights": 0.5},
                "no module matches modules 'lm_head', layers 0-4",
            ),
            ({"weights": [0.5, 0.2, 0.3]}, "got 3 for 2 adapters"),
            ({"curve": [[1, 0], [1, 0, 0]]}, "got 3 for 2 adapters"),
            ({"curve": [0.5]}, "at least two weights"),
            ({"curve": [0.5, 1], "weights": 1}, "without 'weights'"),
            ({"weights": "much"}, "must be a number"),
            ({"weights": "nan"}, "finite"),
            ({"layers": "3-1", "weights": 0.5}, "FIRST-LAST"),
            ({"layers": "middle", "weights": 0.5}, "FIRST-LAST"),
            ({"layers": "0-1", "options": {"density": 0.5}}, "unknown option of method 'exact' 'density'"),
        ],
    )
    def test_a_place_must_be_sound(self, pair: Pair, tmp_path: Path, place: dict[str, Any], words: str) -> None:
        with pytest.raises(PlanError) as caught:
            merge(pair[0], weights=[0.9], out=tmp_path / "out", places=[place])
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_a_value_that_the_method_refuses_at_a_place(self, pair: Pair) -> None:
        with refuses("method.share: density"):
            merge(pair[0], weights=[0.9], method="ties", form="dense", options={"density@*q_proj": 3})

    def test_an_override_that_changes_nothing_is_no_setting(self) -> None:
        override = make_override({"modules": "*q_proj"}, NAMES, list(MODULES))
        assert override.weights("model.layers.0.q_proj") is None
        assert override.entry() == {"modules": "*q_proj"}


def test_settings_are_parted_into_options_and_places() -> None:
    given = {"density": 0.5, "weights@*.q": 1, "curve@layers:0-3": [0, 1], "gain@layers:2,*.v": 2}
    assert split_settings(given) == (
        {"density": 0.5},
        [
            {"modules": "*.q", "weights": 1},
            {"layers": "0-3", "modules": "*", "curve": [0, 1]},
            {"layers": "2", "modules": "*.v", "options": {"gain": 2}},
        ],
    )


def test_the_manifest_tells_the_places(pair: Pair, tmp_path: Path) -> None:
    options = {"weights@*q_proj": 0.5, "curve@layers:0-4": [0, 1]}
    merge(pair[0], weights=[0.9], options=options, out=tmp_path / "out")
    plan = json.loads((tmp_path / "out" / "adaptermix.json").read_text())["plan"]
    assert plan["places"] == [
        {"modules": "*q_proj", "weights": [0.5, 0.5]},
        {"modules": "*", "layers": "0-4", "curve": [[0.0, 1.0], [1.0, 0.0]]},
    ]
    assert "options" not in plan


class TestFill:
    """An adapter that acts alone on a module."""

    Q, V, UPPER = "layers.0.q", "layers.0.v", "layers.1.q"

    def adapters(self, folder: Path) -> tuple[list[Path], dict[str, Tensor], dict[str, Tensor]]:
        """A task LoRA on q and v of two layers; an alignment LoRA on q with B = 0 above its layer 0."""
        task = write_lora(folder / "task", dict.fromkeys((self.Q, self.V, self.UPPER), (6, 5, 2)), seed=1)
        align = write_lora(folder / "align", dict.fromkeys((self.Q, self.UPPER), (6, 5, 2)), seed=2)
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "align" / WEIGHTS)
        tensors[key(self.UPPER, "B")].zero_()
        assert tensors[key(self.UPPER, "A")].abs().min() > 0
        save_file(tensors, folder / "align" / WEIGHTS, metadata={"format": "pt"})
        align[self.UPPER] = torch.zeros(6, 5, dtype=torch.float64)
        return [folder / "task", folder / "align"], task, align

    @pytest.mark.parametrize(("fill", "alone"), [("weight", 0.8), ("one", 1.0)])
    def test_where_the_other_is_absent_or_zero_it_weighs_its_weight_or_one(
        self, tmp_path: Path, fill: Any, alone: float
    ) -> None:
        paths, task, align = self.adapters(tmp_path)
        report = merge(paths, weights=[0.8, 0.2], fill=fill, out=tmp_path / "out")
        assert {module: found.weights for module, found in report.modules.items()} == {
            self.Q: (0.8, 0.2),
            self.V: (alone, 0.0),
            self.UPPER: (alone, 0.0),
        }
        got = adapter_deltas(tmp_path / "out")
        torch.testing.assert_close(got[self.Q], 0.8 * task[self.Q] + 0.2 * align[self.Q], rtol=1e-5, atol=1e-6)
        for module in (self.V, self.UPPER):
            torch.testing.assert_close(got[module], alone * task[module], rtol=1e-5, atol=1e-6)
            assert report.modules[module].sign_conflict == 0
            assert report.modules[module].rank == 2
        assert report.document()["modules"][self.V]["weights"] == (alone, 0.0)

    def test_a_zero_adapter_is_no_partner_in_a_mean(self, tmp_path: Path) -> None:
        """TIES divides by the survivors, so a zero one must neither count nor be named."""
        paths, task, _ = self.adapters(tmp_path)
        report = merge(
            paths, weights=[0.8, 0.2], fill="one", method="ties", options={"density": 1.0}, out=tmp_path / "out"
        )
        torch.testing.assert_close(adapter_deltas(tmp_path / "out")[self.UPPER], task[self.UPPER], rtol=1e-4, atol=1e-5)
        assert report.modules[self.UPPER].weights == (1.0, 0.0)

    @pytest.mark.parametrize("weight", [0.0, -0.5])
    def test_a_weight_of_zero_or_below_is_never_filled(self, tmp_path: Path, weight: float) -> None:
        paths, task, _ = self.adapters(tmp_path)
        report = merge(paths, weights=[weight, 1.0], fill="one", out=tmp_path / "out")
        assert report.modules[self.V].weights == (weight, 0.0)
        torch.testing.assert_close(
            adapter_deltas(tmp_path / "out")[self.V], weight * task[self.V], rtol=1e-5, atol=1e-6
        )

    def test_an_adapter_of_weight_zero_leaves_the_other_at_its_weight(self, tmp_path: Path) -> None:
        """Where both act, one of weight 0 is left out on purpose; the other is not alone."""
        paths, _, align = self.adapters(tmp_path)
        report = merge(paths, weights=[0.0, 0.2], fill="one", out=tmp_path / "out")
        assert report.modules[self.Q].weights == (0.0, 0.2)
        torch.testing.assert_close(adapter_deltas(tmp_path / "out")[self.Q], 0.2 * align[self.Q], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "method",
        sorted(
            name
            for name, cls in METHODS.items()
            if not (cls.statistics or cls.learner) and len(cls.roles) in (0, len(NAMES))
        ),
    )
    def test_a_module_at_which_nobody_acts_is_zero_for_every_method(self, tmp_path: Path, method: str) -> None:
        for alpha, name in zip((4, 8), NAMES, strict=True):  # parallel, since some methods give 0 for deltas at odds
            write_lora(tmp_path / name, {self.Q: (6, 5, 2), self.V: (6, 5, 2)}, alpha=alpha, seed=1)
        before = contents(tmp_path)
        options = {"weights@" + self.V: [0.0, 0.0]}
        report = merge([tmp_path / n for n in NAMES], weights=[0.5], method=method, options=options, max_residual=1.0)
        assert report.modules[self.V].norm == 0
        assert report.modules[self.Q].norm > 0
        assert contents(tmp_path) == before
