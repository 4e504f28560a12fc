"""The whole alignment in closed form against brute force: sentences one at a time, refits, least squares on rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from adaptermix import load_adapter, train_align
from adaptermix.training.closed_form import LAYER_PENALTIES, MAP_PENALTIES

from .test_closed_form import settings_for, tiny, write_pairs

RANK = 5
MODULES = {"llama": "model.layers.1.mlp.down_proj", "bert": "encoder.layer.1.output.dense"}
Read = list[tuple[Tensor, Tensor]]


def solved(x: Tensor, y: Tensor, weights: Tensor, penalty: float) -> Tensor:
    """Ridge as least squares on more rows."""
    root, wide = weights.sqrt()[:, None], x.shape[1]
    left = torch.cat([root * x, math.sqrt(penalty) * torch.eye(wide, dtype=x.dtype)])
    return torch.linalg.lstsq(left, torch.cat([root * y, y.new_zeros(wide, y.shape[1])])).solution


def affine(x: Tensor, y: Tensor, weights: Tensor, penalty: float) -> Any:
    center, offset = ((weights[:, None] * side).sum(0) / weights.sum() for side in (x, y))
    matrix = solved(x - center, y - offset, weights, penalty)
    return lambda states: (states - center) @ matrix + offset


def squares(missed: Tensor, weights: Tensor) -> float:
    return float((weights[:, None] * missed.square()).sum())


def read(base: Path, kind: str, texts: list[str]) -> Read:
    """States after block 2 of each text, and the inputs of the layer that writes them, over the scale of its norm."""
    model = (AutoModel if kind == "bert" else AutoModelForCausalLM).from_pretrained(base).eval()
    tokenizer, seen, found = AutoTokenizer.from_pretrained(base), {}, []
    model.get_submodule(MODULES[kind]).register_forward_hook(lambda _m, inputs, _o: seen.update(z=inputs[0][0]))
    if kind == "bert":
        norm = model.get_submodule("encoder.layer.1.output.LayerNorm")
        assert torch.equal(norm.weight, torch.ones(32))
        norm.register_forward_hook(lambda _m, inputs, _o: seen.update(v=inputs[0][0]))
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
        scale = seen["v"].double().std(-1, correction=0, keepdim=True) if kind == "bert" else 1.0
        found.append((states.double(), seen["z"].double() / scale))
    return found


def of_tokens(found: Read, weights: list[float], groups: list[int], edge: int) -> tuple[Tensor, Tensor]:
    """Weight and fold of each token: its share of its sentence, and as much as the sentence for what heads read."""
    own, folds = [], []
    for (states, _), weight, group in zip(found, weights, groups, strict=True):
        shares = torch.full((len(states),), 1 / len(states), dtype=torch.float64)
        shares[edge] += 1
        own.append(weight * shares)
        folds.append(torch.full((len(states),), group % 2))
    return torch.cat(own), torch.cat(folds)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_update_is_that_of_brute_force(kind: str, tmp_path: Path) -> None:
    base = tiny(tmp_path, kind)
    lines = Path(write_pairs(tmp_path, "jv-en.tsv", 24, 0)).read_text().splitlines()
    (tmp_path / "su-en.tsv").write_text("".join(f"y {line}\n" for line in lines[:10]))
    dev = write_pairs(tmp_path, "dev.tsv", 8, 1)
    files = [str(tmp_path / f"{code}-en.tsv") for code in ("jv", "su")]
    report: Any = train_align(settings_for(base, tmp_path, pairs=files, dev_pairs=[f"jv-en={dev}"], rank=RANK))

    pairs = [line.split("\t") for line in lines] + [f"y {line}".split("\t") for line in lines[:10]]
    weights = [17 / 24] * 24 + [17 / 10] * 10  # both languages weigh the same
    texts = list(dict.fromkeys(target for _, target in pairs))
    group = [*range(len(texts)), *(texts.index(target) for _, target in pairs)]
    weight = [sum(w for w, (_, own) in zip(weights, pairs, strict=True) if own == text) for text in texts] + weights
    found = read(base, kind, texts + [source for source, _ in pairs])
    edge = -1 if kind == "llama" else 0
    pooled = torch.stack([torch.stack([states.mean(0), states[edge]]) for states, _ in found])
    spread = pooled.var(0, correction=0).mean(0).sqrt()
    x, y = (pooled / spread).flatten(0, 1), ((pooled[group] - pooled) / spread).flatten(0, 1)
    groups, rows = (torch.tensor(own).repeat_interleave(2) for own in (group, weight))
    rows = rows.double()

    centred = x - (rows[:, None] * x).sum(0) / rows.sum()
    scale = squares(centred, rows) / x.shape[1]
    shares = {}
    for penalty in MAP_PENALTIES:
        missed = torch.zeros_like(y)
        for own in groups.unique():
            rest = groups != own
            missed[~rest] = y[~rest] - affine(x[rest], y[rest], rows[rest], penalty * scale)(x[~rest])
        shares[penalty] = 1 - squares(missed, rows) / squares(y, rows)
    chosen = max(shares, key=lambda penalty: shares[penalty])
    found_map = report.objective["map"]
    assert found_map == {"penalty": chosen, "explained_left_out": pytest.approx(shares[chosen], rel=1e-4)}

    wanted_of = affine(x, y, rows, chosen * scale)
    z, t = torch.cat([inputs for _, inputs in found]), torch.cat([wanted_of(states / spread) for states, _ in found])
    tokens, fold = of_tokens(found, weight, group, edge)

    def ridge(here: Tensor, penalty: float) -> tuple[Tensor, float]:
        absolute = penalty * squares(z[here], tokens[here]) / z.shape[1]
        return solved(z[here], t[here], tokens[here], absolute), absolute

    layer = {}
    for penalty in LAYER_PENALTIES:
        error = sum(
            squares((t - z @ ridge(fold != own, penalty)[0])[fold == own], tokens[fold == own]) for own in (0, 1)
        )
        layer[penalty] = 1 - error / squares(t, tokens)
    best = max(layer, key=lambda penalty: layer[penalty])
    update = report.objective["layer_update"]
    assert (update["rank"], update["penalty"]) == (RANK, best)
    assert update["explained_left_out"] == pytest.approx(layer[best], rel=1e-4)
    assert update["explained_left_out_with_bias"] > update["explained_left_out"] - 0.01

    solution, absolute = ridge(fold >= 0, best)
    fitted = (
        torch.cat([tokens.sqrt()[:, None] * z, math.sqrt(absolute) * torch.eye(z.shape[1], dtype=z.dtype)]) @ solution
    )
    leading = torch.linalg.svd(fitted, full_matrices=False)[2][:RANK]
    # of the norm behind BERT's layer the gain is 1, and long displacements are shrunk
    back = spread if kind == "llama" else spread / (1 + 0.1 * spread.square())
    delta = back[:, None] * (solution @ leading.T @ leading).T
    got = load_adapter(tmp_path / "out").updates[MODULES[kind]].dense().double()
    assert float((got - delta).norm()) <= 1e-4 * float(delta.norm())
