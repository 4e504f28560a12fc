"""What 4 or 8 bits keep of a delta, per strategy, on rows of real activations that had no part in it.

Goals: `calibrated` keeps at least .75 of the effect of deltas of 3 % of the weight's norm (mean over layers) and .3 at
1 %, 4 and 10 times what plain rounding keeps, with an error never above that of plain rounding. `residual` keeps .95
with a LoRA of at most a quarter of the delta's rank, or the rank is told. `auto` keeps at least .9 everywhere. `keep`
and `dequant-16` keep all of it within .001. With `--unseen` no module of `auto` gives predictions that are further from
those with its delta than predictions without it are.

Divergences (`--unseen`, language models) are means of KL(reference || other) over tokens, but for the first of each
text. The reference is the base in float32 whose one module holds what its codes stand for plus its delta; the other has
in that module what a strategy has written, or the codes of the base alone (`left out`).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

_SHOWN = ("kept", "error")
_REST = ("kept_rest", "error_rest")
_BATCH = 16


def deltas(weight: Tensor, relative: list[float], update: Any, size: int) -> Iterator[tuple[str, Tensor, int]]:
    """Yield random LoRAs of these relative norms, and what an adapter does to the weight, with their ranks."""
    generator = torch.Generator().manual_seed(0)
    for share in relative:
        b, a = (torch.randn(shape, generator=generator) for shape in ((len(weight), size), (size, weight.shape[1])))
        yield f"random {share:g}", (b @ a) * (share * weight.norm() / (b @ a).norm()), size
    if update is not None:
        yield "adapter", update.dense().float(), update.rank


def told(found: Any) -> dict[str, Any]:
    """Return what is reported of a result."""
    return {key: value for key, value in found.document().items() if value is not None}


def ways(wanted: Any, dtype: torch.dtype, strategies: list[str]) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield per strategy what is told of it, and the weight and the shift of the bias that it gives."""
    from adaptermix.baking.strategies import STRATEGIES, on_rows

    held = wanted.known.measured
    base = wanted.base.weight()
    whole = base + wanted.delta
    in_16 = whole.to(dtype).float()
    for title, weight in (("keep", whole), ("dequant-16", in_16)):
        yield title, told(on_rows(wanted.delta, weight - base, held)), (weight, None)

    def baked(title: str, found: Any, **more: Any) -> tuple[str, dict[str, Any], Any]:
        rank = 0 if found.lora is None else found.lora.rank
        written = (base + wanted.realised(found), found.shift)
        return title, told(wanted.measured(found, held)) | {"rank": rank} | more, written

    for title in (one for one in STRATEGIES if one in strategies):
        start = time.perf_counter()
        made = wanted.by(title)
        yield baked(title, made, seconds=time.perf_counter() - start)
    if "residual" in strategies:
        loose = replace(wanted, most=float("inf"))
        loose.made.update(wanted.made)
        del loose.made["residual"]  # what it has tried stays
        yield baked("residual, any error", loose.by("residual"))
    best = wanted.automatic()
    if best is None:
        yield "auto", told(on_rows(wanted.delta, in_16 - base, held)) | {"in 16 bits": 1.0}, (in_16, None)
    else:
        yield baked("auto", wanted.by(best), **{"in 16 bits": 0.0})


@contextmanager
def holding(module: nn.Linear, weight: Tensor, shift: Tensor | None) -> Iterator[None]:
    """Let a module have another weight, and a bias that is shifted."""
    before = module.weight.data, None if module.bias is None else module.bias.data
    module.weight.data = weight
    if shift is not None:
        module.bias.data = before[1] + shift
    try:
        yield
    finally:
        module.weight.data = before[0]
        if module.bias is not None:
            module.bias.data = before[1]


@torch.inference_mode()
def divergences(base: Any, module: nn.Linear, reference: Tensor, others: dict[str, Any], texts: list[str]) -> Any:
    """Return the mean divergence from the reference's predictions per token, but for the first of each text."""
    sums, count = dict.fromkeys(others, 0.0), 0
    for start in range(0, len(texts), _BATCH):
        batch = base.tokenizer(
            texts[start : start + _BATCH], padding=True, truncation=True, max_length=256, return_tensors="pt",
            padding_side="right",
        ).to(base.device)  # fmt: skip
        mask = batch["attention_mask"].bool()
        mask[:, 0] = False
        count += int(mask.sum())

        def predicted(written: Any, batch: Any = batch, mask: Tensor = mask) -> Tensor:
            with holding(module, *written):
                logits: Tensor = base.model(**batch).logits[mask].float().log_softmax(-1)
            return logits

        right = predicted((reference, None))
        for title, written in others.items():
            off = right.exp() * (right - predicted(written))
            sums[title] += float(off.sum(dtype=torch.float64))
    return {title: value / count for title, value in sums.items()}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per module, delta and strategy."""
    from adaptermix.adapters import open_adapter
    from adaptermix.adapters.paths import fitted
    from adaptermix.baking.activations import InputsOfModules, read_texts
    from adaptermix.baking.strategies import Insertion
    from adaptermix.models.base import load_base
    from adaptermix.models.formats import FORMATS
    from adaptermix.progress import SILENT

    base = load_base(arguments.base, device=arguments.device, dtype="float32")
    head = base.model.get_output_embeddings() if base.kind == "causal" else None
    linear = {name: m for name, m in base.model.named_modules() if type(m) is nn.Linear and m is not head}
    chosen = [name for name in linear if name.split(".pooler")[0] == name][:: arguments.every]
    if arguments.only:
        chosen = [name for name in linear if any(name.endswith(one) for one in arguments.only)]
    unseen = read_texts(arguments.unseen)[0] if arguments.unseen else []
    updates: Any = {}
    if arguments.adapter:
        updates = fitted(open_adapter(arguments.adapter), linear).read().updates
    texts, _ = read_texts(arguments.texts)
    inputs = InputsOfModules(base, texts, {name: name for name in chosen}, SILENT)
    for name in chosen:
        module = linear[name]
        weight = module.weight.detach().float()
        four = FORMATS[arguments.kind](weight)
        for delta_name, delta, rank in deltas(weight, arguments.relative, updates.get(name), arguments.rank):
            wanted = Insertion(
                base=four,
                delta=delta.to(weight.device),
                known=inputs.of(name),
                settle=None if module.bias is None else torch.Tensor.clone,
                rank=rank,
                least=0.9,
                most=arguments.error_at_most,
            )
            start = {"module": name, "delta": delta_name, "norm": float(delta.norm() / weight.norm()), "full": rank}
            found = list(ways(wanted, torch.bfloat16, arguments.strategies))
            written = {title: made for title, _, made in found} if unseen else {}
            others = {title: written[title] for title in ("requantize", "calibrated", "auto") if title in written}
            others |= {"left out": (four.weight(), None)} if unseen else {}
            off = divergences(base, module, four.weight() + wanted.delta, others, unseen) if unseen else {}
            for title, more, _ in found:
                own = {"divergence": off[title], "divergence left out": off["left out"]} if title in off else {}
                yield start | {"strategy": title} | more | own
                print(name, title, cell(more | own), file=sys.stderr, flush=True)  # noqa: T201


def summary(found: list[dict[str, Any]], naive: dict[tuple[str, str], float]) -> dict[str, Any]:
    """Return means over modules."""

    def mean(key: str) -> float | None:
        values = [row[key] for row in found if key in row]
        return sum(values) / len(values) if values else None

    overall = {
        "modules": len(found),
        "norm": mean("norm"),
        "kept": mean("kept"),
        "least kept": min(row["kept"] for row in found),
        "error": mean("error"),
        "kept_rest": mean("kept_rest"),
        "least kept_rest": min((row["kept_rest"] for row in found if "kept_rest" in row), default=None),
        "error_rest": mean("error_rest"),
        "divergence": mean("divergence"),
        "divergence left out": mean("divergence left out"),
        "worse than left out": sum(row["divergence"] > row["divergence left out"] for row in found)
        if all("divergence" in row for row in found)
        else None,
        "above plain rounding": max(row["error"] - naive[row["module"], row["delta"]] for row in found)
        if naive
        else None,
        "rank": mean("rank"),
        "largest rank": max((row["rank"] for row in found if "rank" in row), default=None),
        "rank is a quarter or less": sum(4 * row.get("rank", 0) <= row["full"] for row in found) / len(found),
        "in 16 bits": mean("in 16 bits"),
        "seconds": mean("seconds"),
    }
    return {key: value for key, value in overall.items() if value is not None}


def markdown(rows: list[dict[str, Any]], deltas: list[str], strategies: list[str]) -> str:
    """Return a table per module: kept and error, both without first tokens, and divergences if measured."""
    heads = [f"{delta}: {strategy}" for delta in deltas for strategy in strategies]
    lines = [f"| module | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    cells = {(row["module"], row["delta"], row["strategy"]): cell(row) for row in rows}
    for module in dict.fromkeys(row["module"] for row in rows):
        line = [cells.get((module, delta, strategy), "") for delta in deltas for strategy in strategies]
        lines.append(f"| {module} | {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any]) -> str:
    """Return what a table says of one module and strategy."""
    parts = [
        " / ".join(f"{row[key]:.3f}" for key in keys) for keys in (_SHOWN, _REST) if all(key in row for key in keys)
    ]
    if "divergence" in row:
        parts.append(f"KL {row['divergence']:.2e} of {row['divergence left out']:.2e}")
    return "; ".join(parts) + (" (16 bits)" if row.get("in 16 bits") else "")


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", help="one trained on it; beside random ones")
    parser.add_argument("--texts", nargs="+", required=True, help="calibration texts; a fifth is held out")
    parser.add_argument("--relative", type=float, nargs="*", default=[0.005, 0.01, 0.03, 0.1])
    parser.add_argument("--rank", type=int, default=16, help="of random deltas")
    parser.add_argument("--unseen", nargs="+", help="texts for divergences of predictions, other than --texts")
    parser.add_argument("--only", nargs="+", help="take modules whose names end so, instead of --every")
    parser.add_argument("--strategies", nargs="+", default=["requantize", "stochastic", "calibrated", "residual"])
    parser.add_argument("--kind", default="nf4", help="nf4, fp4 or int8")
    parser.add_argument("--every", type=int, default=1, help="take one module in as many")
    parser.add_argument("--error-at-most", type=float, default=0.5, help="for residual and auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", action="store_true", help="print every module too")
    parser.add_argument("--markdown", help="file for a table per module: plain rounding, calibrated and auto")
    arguments = parser.parse_args()
    rows = list(measure(arguments))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["delta"], row["strategy"]), []).append(row)
    naive = {(row["module"], row["delta"]): row["error"] for row in rows if row["strategy"] == "requantize"}
    table = [
        {"delta": delta, "strategy": strategy} | summary(found, naive) for (delta, strategy), found in groups.items()
    ]
    if arguments.markdown:
        names = list(dict.fromkeys(row["delta"] for row in rows))
        with open(arguments.markdown, "w", encoding="utf-8") as file:
            file.write(markdown(rows, names, ["requantize", "calibrated", "auto"]))
    print(json.dumps({"table": table} | ({"rows": rows} if arguments.rows else {})))  # noqa: T201


if __name__ == "__main__":
    main()
