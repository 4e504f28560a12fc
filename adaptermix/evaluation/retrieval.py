"""Margin-based translation retrieval (xsim), per layer and direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..adapters import open_adapter
from ..data import read_parallel
from ..models import BaseModel, backbone, load_base, note_other_base
from ..pooling import masked_mean
from ..progress import SILENT, Watcher
from ..settings import RetrieveSettings
from .acting import acting

_CHUNK = 1024


def margin_neighbours(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], *, k: int = 4) -> Int[Tensor, " n"]:
    r"""Return for each row of x the row of y with the largest ratio margin among its k nearest.

    $score(i, c) = \cos(x_i, y_c) / (\frac{1}{2}(\overline{\cos}_k(x_i) + \overline{\cos}_k(y_c)))$, where the means are
    over the k nearest neighbours in the other set. Only the k forward neighbours are candidates, as in LASER's xsim.

    Args:
        x: Queries.
        y: Candidates.
        k: Neighbours; cut to what there is.

    Shapes: x [n d], y [m d]; returns n indices below m.
    Reference: Artetxe and Schwenk, Margin-based Parallel Corpus Mining, ACL 2019, arXiv 1811.01136, section 3.
    """
    x, y = (torch.nn.functional.normalize(z.float(), dim=1) for z in (x, y))
    forward = [(part @ y.T).topk(min(k, len(y)), dim=1) for part in torch.split(x, _CHUNK)]
    near = torch.cat([top.values for top in forward])
    candidates = torch.cat([top.indices for top in forward])
    back = torch.cat([(part @ x.T).topk(min(k, len(x)), dim=1).values.mean(1) for part in torch.split(y, _CHUNK)])
    margin = near / ((near.mean(1, keepdim=True) + back[candidates]) / 2)
    return candidates.gather(1, margin.argmax(1, keepdim=True)).squeeze(1)


def accuracy(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"], *, k: int = 4) -> float:
    """Return the share of rows of x whose retrieved row of y has the same number."""
    right = margin_neighbours(x, y, k=k).cpu() == torch.arange(len(x))
    return float(right.double().mean())


@torch.inference_mode()
def embed(
    base: BaseModel, texts: Sequence[str], *, batch_size: int, max_length: int, watch: Watcher = SILENT, label: str = ""
) -> Float[Tensor, "layers n d"]:
    """Return mean-pooled hidden states of every layer, in float32 on the CPU.

    Layer numbers are those of hidden states: 0 is the embeddings, n the last block (after the model's final norm).

    Shapes: [n+1 sentences width].
    """
    encoded = [base.tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in texts]
    order = sorted(range(len(texts)), key=lambda row: len(encoded[row]))
    pooled: Tensor | None = None
    body = backbone(base)
    with watch.track(label or "embed", len(texts)) as advance:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = base.tokenizer.pad(
                {"input_ids": [encoded[row] for row in rows]}, padding_side="right", return_tensors="pt"
            ).to(base.device)
            extra = {"use_cache": False} if base.kind == "causal" else {}
            states = body(**batch, output_hidden_states=True, **extra).hidden_states
            means = torch.stack([masked_mean(state, batch["attention_mask"]) for state in states]).cpu()
            if pooled is None:
                pooled = torch.empty(len(states), len(texts), means.shape[-1])
            pooled[:, rows] = means
            advance(len(rows), "")
    if pooled is None:
        raise ValueError("at least one text is needed")
    return pooled


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """Accuracy per layer and direction.

    Args:
        layers: For each layer (0 is the embeddings) the accuracy per direction, such as `de-en`.
        n: Sentences per direction.
    """

    layers: tuple[Mapping[str, float], ...]
    n: Mapping[str, int]

    def mean(self, layer: int) -> float:
        """Return the mean over directions at a layer."""
        values = self.layers[layer].values()
        return sum(values) / len(values)

    def headline(self) -> float:
        """Return the mean over directions and even layers, embeddings left out, as in the mid-align paper."""
        even = range(2, len(self.layers), 2) if len(self.layers) > 2 else range(1, len(self.layers))
        return sum(self.mean(layer) for layer in even) / len(even)

    def document(self) -> dict[str, Any]:
        """Return the JSON document of `adaptermix retrieve`."""
        layers = {
            str(number): {"mean": self.mean(number), "directions": dict(directions)}
            for number, directions in enumerate(self.layers)
        }
        return {"layers": layers, "headline": self.headline(), "n": dict(self.n)}


def retrieve_with(base: BaseModel, settings: RetrieveSettings, *, watch: Watcher = SILENT) -> Retrieval:
    """Measure retrieval with a loaded model, as it is (with whatever is attached to it)."""
    parallel = read_parallel(settings.data, rows=settings.rows)
    last_use = {key: i for i, (_, one, two) in enumerate(parallel.directions) for key in (one, two)}
    embedded: dict[str, Tensor] = {}
    layers: list[dict[str, float]] = [{} for _ in range(base.layers + 1)]
    counts = {}
    for number, (name, one, two) in enumerate(parallel.directions):
        for key in (one, two):
            if key not in embedded:
                embedded[key] = embed(
                    base,
                    parallel.texts[key],
                    batch_size=settings.batch_size,
                    max_length=settings.max_length,
                    watch=watch,
                    label=f"embed {key}",
                )
        for layer, results in enumerate(layers):
            results[name] = accuracy(embedded[one][layer], embedded[two][layer], k=settings.neighbours)
        counts[name] = len(parallel.texts[one])
        for key in (one, two):
            if last_use[key] == number:
                embedded.pop(key, None)
    return Retrieval(layers=tuple(layers), n=counts)


def retrieve(settings: RetrieveSettings, *, watch: Watcher = SILENT) -> Retrieval:
    """Measure translation retrieval of a base model, with an adapter or without.

    Raises:
        AdapterMixError: the model, the adapter or a data file does not do; see `load_base`, `open_adapter`,
            `read_parallel`.
    """
    sources = [open_adapter(Path(settings.adapter))] if settings.adapter else []
    read_parallel(settings.data, rows=settings.rows)  # refuse bad data before a model is loaded
    base = load_base(settings.base, device=settings.device, dtype=settings.dtype)
    note_other_base(base, sources, watch)
    with acting(base, sources):
        return retrieve_with(base, settings, watch=watch)
