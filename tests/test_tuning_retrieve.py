"""A search over a recipe that ends in retrieval."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptermix.commands.judge import run_judge
from adaptermix.options import RetrieveSettings
from adaptermix.tuning import tune
from tests.training.data import COLOURS


def test_a_candidate_is_scored_by_its_retrieval(causal: Path, tmp_path: Path) -> None:
    """The score is the mean over directions and even layers, worked out here from the accuracies."""
    pairs = str(tmp_path / "de-en.tsv")
    words = [*COLOURS, *COLOURS.values()]
    Path(pairs).write_text("".join(f"{a}\t{a if n % 2 else words[n - 1]}\n" for n, a in enumerate(words)))
    (tmp_path / "recipe.yaml").write_text(
        "version: 1\nvariables: {out: unset}\nsteps:\n"
        f"  - retrieve: {{base: '{causal}', data: ['{pairs}'], device: cpu, dtype: float32}}\n"
    )
    found = tune(tmp_path / "recipe.yaml", {"retrieve.rows": [":12", ":6"]}, out=tmp_path / "tuned")
    settings = RetrieveSettings(base=str(causal), data=[pairs], device="cpu", dtype="float32", split="dev")
    document = run_judge(settings)
    layers = document["layers"]
    even = [layers[number]["directions"] for number in ("2", "4")]
    mean = sum(value for directions in even for value in directions.values()) / 4
    assert found.candidates[0].value == pytest.approx(mean)
    assert document["resamples"][0] == pytest.approx(mean, abs=1e-6)  # rounded to 6 digits
    assert document["units"] == 12
    first = found.candidates[0]
    assert first.low < mean < first.high
    assert list(first.resamples) == document["resamples"]
    # resamples are means of the same draws over rows: within their range, around the score
    drawn = document["resamples"][1:]
    assert min(drawn) < mean < max(drawn)
    assert sum(drawn) / len(drawn) == pytest.approx(mean, abs=0.02)
    assert len(found.candidates) == 2
