"""What 4 or 8 bits keep of a delta, per strategy, on rows of real activations that had no part in it.

Goals: `calibrated` keeps at least .75 of the effect of deltas of 3 % of the weight's norm (mean over layers) and .3 at
1 %, 4 and 10 times what plain rounding keeps, with an error never above that of plain rounding. `residual` keeps .95
with a LoRA of at most a quarter of the delta's rank, or the rank is told. `auto` keeps at least .9 everywhere. `keep`
and `dequant-16` keep all of it within .001.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

RANK = 16
_SHOWN = ("kept", "error")


def deltas(weight: Tensor, relative: list[float], update: Any) -> Iterator[tuple[str, Tensor, int]]:
    """Yield random LoRAs of these relative norms, and what an adapter does to the weight, with their ranks."""
    generator = torch.Generator().manual_seed(0)
    for share in relative:
        b, a = (torch.randn(shape, generator=generator) for shape in ((len(weight), RANK), (RANK, weight.shape[1])))
        yield f"random {share:g}", (b @ a) * (share * weight.norm() / (b @ a).norm()), RANK
    if update is not None:
        yield "adapter", update.dense().float(), update.rank


def ways(wanted: Any, dtype: torch.dtype) -> Iterator[tuple[str, float, float, dict[str, Any]]]:
    """Yield per strategy: kept, error, and what else is told."""
    from adaptermix.baking.fidelity import fidelity
    from adaptermix.baking.strategies import STRATEGIES

    held = wanted.known.held
    whole = wanted.base.weight() + wanted.delta
    for title, form in (("keep", torch.float32), ("dequant-16", dtype)):
        realised = wanted.delta if title == "keep" else whole.to(form).float() - wanted.base.weight()
        found = fidelity(wanted.delta, realised, held.moment)
        yield title, found.kept, found.error, {}
    for title in STRATEGIES:
        start = time.perf_counter()
        baked = wanted.by(title)
        seconds = time.perf_counter() - start
        found = wanted.measured(baked, held)
        rank = 0 if baked.beside is None else baked.beside.rank
        more = {"seconds": seconds, "codes changed": found.codes_changed, "rank": rank}
        yield title, found.kept, found.error, more
    loose = replace(wanted, most=float("inf"))
    loose.made.update(wanted.made)
    del loose.made["residual"]  # what it has tried stays
    baked = loose.by("residual")
    found = wanted.measured(baked, held)
    rank = 0 if baked.beside is None else baked.beside.rank
    yield "residual, any error", found.kept, found.error, {"rank": rank}
    best = wanted.automatic()
    found = fidelity(wanted.delta, whole.to(dtype).float() - wanted.base.weight(), held.moment)
    found = found if best is None else wanted.measured(wanted.by(best), held)
    yield "auto", found.kept, found.error, {"in 16 bits": float(best is None)}


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per module, delta and strategy."""
    from adaptermix.adapters import open_adapter
    from adaptermix.adapters.paths import fitted
    from adaptermix.baking.activations import InputsOfModules, read_texts
    from adaptermix.baking.grid import FORMATS
    from adaptermix.baking.strategies import Wanted
    from adaptermix.models import load_base
    from adaptermix.progress import SILENT

    base = load_base(arguments.base, device=arguments.device, dtype="float32")
    head = base.model.get_output_embeddings() if base.kind == "causal" else None
    linear = {name: m for name, m in base.model.named_modules() if type(m) is nn.Linear and m is not head}
    chosen = [name for name in linear if name.split(".pooler")[0] == name][:: arguments.every]
    updates: Any = {}
    if arguments.adapter:
        updates = fitted(open_adapter(arguments.adapter), linear).read().updates
    texts, _ = read_texts(arguments.texts)
    inputs = InputsOfModules(base, texts, {name: name for name in chosen}, SILENT)
    for name in chosen:
        module = linear[name]
        weight = module.weight.detach().float()
        four = FORMATS[arguments.kind](weight)
        for delta_name, delta, rank in deltas(weight, arguments.relative, updates.get(name)):
            wanted = Wanted(
                base=four,
                delta=delta.to(weight.device),
                known=inputs.of(name),
                settle=None if module.bias is None else torch.Tensor.clone,
                rank=rank,
                least=0.9,
                most=arguments.error_at_most,
            )
            start = {"module": name, "delta": delta_name, "norm": float(delta.norm() / weight.norm()), "full": rank}
            for title, kept, error, more in ways(wanted, torch.bfloat16):
                yield start | {"strategy": title, "kept": kept, "error": error} | more
        print(name, file=sys.stderr, flush=True)  # noqa: T201


def summary(found: list[dict[str, Any]], naive: dict[tuple[str, str], float]) -> dict[str, Any]:
    """Return means over modules."""

    def mean(key: str) -> float | None:
        values = [row[key] for row in found if key in row]
        return sum(values) / len(values) if values else None

    told = {
        "modules": len(found),
        "norm": mean("norm"),
        "kept": mean("kept"),
        "least kept": min(row["kept"] for row in found),
        "error": mean("error"),
        "above plain rounding": max(row["error"] - naive[row["module"], row["delta"]] for row in found),
        "rank": mean("rank"),
        "largest rank": max((row["rank"] for row in found if "rank" in row), default=None),
        "rank is a quarter or less": sum(4 * row.get("rank", 0) <= row["full"] for row in found) / len(found),
        "in 16 bits": mean("in 16 bits"),
        "seconds": mean("seconds"),
    }
    return {key: value for key, value in told.items() if value is not None}


def markdown(rows: list[dict[str, Any]], deltas: list[str], strategies: list[str]) -> str:
    """Return a table of kept and error per module."""
    heads = [f"{delta}: {strategy}" for delta in deltas for strategy in strategies]
    lines = [f"| module | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    told = {(row["module"], row["delta"], row["strategy"]): [f"{row[key]:.3f}" for key in _SHOWN] for row in rows}
    for module in dict.fromkeys(row["module"] for row in rows):
        cells = [told.get((module, delta, strategy)) for delta in deltas for strategy in strategies]
        lines.append(f"| {module} | " + " | ".join("" if cell is None else " / ".join(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", help="one trained on it; beside random ones")
    parser.add_argument("--texts", nargs="+", required=True, help="calibration texts; a fifth is held out")
    parser.add_argument("--relative", type=float, nargs="*", default=[0.005, 0.01, 0.03, 0.1])
    parser.add_argument("--kind", default="nf4", help="nf4, fp4 or int8")
    parser.add_argument("--every", type=int, default=1, help="take one module in as many")
    parser.add_argument("--error-at-most", type=float, default=0.5, help="for residual and auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", action="store_true", help="print every module too")
    parser.add_argument(
        "--markdown", help="file for a table per module: kept and error of plain rounding and calibrated"
    )
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
            file.write(markdown(rows, names, ["requantize", "calibrated"]))
    print(json.dumps({"table": table} | ({"rows": rows} if arguments.rows else {})))  # noqa: T201


if __name__ == "__main__":
    main()
