"""What the settings of `merge` ask for: adapters, checkpoints, or what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adaptermix.errors import PlanError
from adaptermix.merging.request import is_checkpoint, merge_with_settings
from adaptermix.methods.exact import Exact
from adaptermix.options import MergeSettings

from ..factories import adapter_deltas, contents, load_base, write_lora
from ..refusals import refuses

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapters(tmp_path: Path) -> list[str]:
    for seed, name in enumerate(("task", "align")):
        write_lora(tmp_path / name, {Q: (32, 32, 2)}, seed=seed)
    return [str(tmp_path / "task"), str(tmp_path / "align")]


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> list[str]:
    """Two full checkpoints that differ from the base at one weight."""
    for seed, name in enumerate(("one", "two")):
        model = load_base(base)
        with torch.no_grad():
            noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(seed))
            model.get_submodule(Q).weight += 0.1 * noise
        model.save_pretrained(tmp_path / name)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def settings(adapters: list[str], out: Path, **more: Any) -> MergeSettings:
    return MergeSettings(**{"adapters": adapters, "out": str(out), "weights": [0.75], "device": "cpu"} | more)


def test_a_checkpoint_is_a_folder_with_weights_and_no_adapter(base: Path, adapters: list[str], tmp_path: Path) -> None:
    assert is_checkpoint(base)
    assert not is_checkpoint(adapters[0])
    assert not is_checkpoint(tmp_path / "nowhere")
    assert not is_checkpoint("org/name")
    (tmp_path / "task" / "model.safetensors").write_bytes(b"")
    assert not is_checkpoint(adapters[0])


def test_adapters_give_an_adapter(adapters: list[str], tmp_path: Path) -> None:
    place = {"modules": "*q_proj", "weights": 0.5}
    report = merge_with_settings(settings(adapters, tmp_path / "out", places=[place]))
    assert report.modules[Q].weights == (0.5, 0.5)
    one, two, got = (adapter_deltas(Path(path))[Q] for path in (*adapters, tmp_path / "out"))
    torch.testing.assert_close(got, 0.5 * one + 0.5 * two, rtol=1e-5, atol=1e-6)


def test_checkpoints_give_a_checkpoint(base: Path, tuned: list[str], tmp_path: Path) -> None:
    report = merge_with_settings(settings(tuned, tmp_path / "out", base=str(base)))
    start, one, two, got = (load_file(Path(p) / "model.safetensors") for p in (base, *tuned, tmp_path / "out"))
    name = f"{Q}.weight"
    expected = start[name] + 0.75 * (one[name] - start[name]) + 0.25 * (two[name] - start[name])
    torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6)
    assert report.document()["weights"] == [0.75, 0.25]


def test_a_dry_run_of_checkpoints_writes_nothing(base: Path, tuned: list[str], tmp_path: Path) -> None:
    before = contents(tmp_path)
    assert merge_with_settings(settings(tuned, tmp_path / "out", base=str(base), dry_run=True)).norm > 0
    assert contents(tmp_path) == before


def test_a_mixture_is_refused(base: Path, adapters: list[str], tuned: list[str], tmp_path: Path) -> None:
    for mixture in ([adapters[0], tuned[0]], [tuned[0], adapters[0]]):
        with refuses("merge.mixed-inputs"):
            merge_with_settings(settings(mixture, tmp_path / "out", base=str(base)))


def test_checkpoints_without_their_base_are_refused(tuned: list[str], tmp_path: Path) -> None:
    with refuses("checkpoint.needs-base"):
        merge_with_settings(settings(tuned, tmp_path / "out"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("places", [{"modules": "*q_proj", "weights": 0.5}]),
        ("fill", "one"),
        ("form", "dense"),
        ("rank", 4),
        ("keep", 0.5),
        ("max_residual", 0.5),
        ("saved", "average"),
        ("statistics", ["x.safetensors"]),
        ("allow_pickle", True),
        ("allow_base_mismatch", True),
        ("options", {"weights@*q_proj": 0.5}),
    ],
)
def test_what_only_adapters_have_is_refused_for_checkpoints(
    base: Path, tuned: list[str], tmp_path: Path, name: str, value: Any
) -> None:
    word = "weights@*q_proj" if name == "options" else name
    with pytest.raises(PlanError) as caught:
        merge_with_settings(settings(tuned, tmp_path / "out", base=str(base), **{name: value}))
    assert f"{word!r} is for adapters" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_input_is_replaced(base: Path, tuned: list[str], adapters: list[str]) -> None:
    for inputs, out in ((tuned, tuned[0]), (tuned, str(base)), (adapters, adapters[1])):
        before = contents(Path(out))
        with refuses("output.is-input"):
            merge_with_settings(settings(inputs, Path(out), base=str(base), overwrite=True))
        assert contents(Path(out)) == before


def learn(settings: MergeSettings, *, watch: object) -> MergeSettings:
    """The learner of a method in another package."""
    return settings


def test_a_method_names_the_function_that_learns_before_the_merge(
    adapters: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(adapters, tmp_path / "out", train=["rows.jsonl"])
    with refuses("gates.option: --train"):
        merge_with_settings(asked)
    monkeypatch.setattr(Exact, "learner", f"{__name__}:learn")
    assert merge_with_settings(asked) is asked
