"""What 4 bits keep of a delta, per strategy, on rows of real activations that had no part in it.

Goals: `calibrated` keeps at least .75 of the effect of deltas of 3 % of the weight's norm (mean over layers) and .3 at
1 %, 4 and 10 times what plain rounding keeps, with an error never above that of plain rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def deltas(weight: Tensor, relative: list[float], update: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield random LoRAs of rank 16 of these relative norms, and what an adapter does to the weight."""
    generator = torch.Generator().manual_seed(0)
    for share in relative:
        b, a = torch.randn(len(weight), 16, generator=generator), torch.randn(16, weight.shape[1], generator=generator)
        yield f"random {share:g}", (b @ a) * (share * weight.norm() / (b @ a).norm())
    if update is not None:
        yield "adapter", update.dense().float()


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one row per module, delta and strategy."""
    from adaptermix.adapters import open_adapter
    from adaptermix.adapters.paths import fitted
    from adaptermix.baking.activations import known_inputs, read_texts
    from adaptermix.baking.grid import FORMATS
    from adaptermix.baking.strategies import STRATEGIES, Wanted
    from adaptermix.models import load_base
    from adaptermix.progress import SILENT

    base = load_base(arguments.base, device=arguments.device, dtype="float32")
    head = base.model.get_output_embeddings() if base.kind == "causal" else None
    linear = {name: m for name, m in base.model.named_modules() if type(m) is nn.Linear and m is not head}
    chosen = [name for name in linear if name.split(".pooler")[0] == name][:: arguments.every]
    updates: Any = {}
    if arguments.adapter:
        source = fitted(open_adapter(arguments.adapter), linear)
        updates = source.read().updates
    rows = []
    texts, _ = read_texts(arguments.texts)
    for name, known in known_inputs(base, texts, {name: name for name in chosen}, SILENT):
        module = linear[name]
        weight = module.weight.detach().float()
        four = FORMATS[arguments.kind](weight)
        for delta_name, delta in deltas(weight, arguments.relative, updates.get(name)):
            settle = None if module.bias is None else torch.Tensor.clone
            wanted = Wanted(base=four, delta=delta.to(weight.device), known=known, settle=settle)
            for title, strategy in STRATEGIES.items():
                start = time.perf_counter()
                baked = strategy(wanted)
                found = wanted.measured(baked, known.held)
                rows.append(
                    {
                        "module": name,
                        "delta": delta_name,
                        "norm": float(delta.norm() / weight.norm()),
                        "strategy": title,
                        "kept": found.kept,
                        "error": found.error,
                        "codes changed": found.codes_changed,
                        "seconds": time.perf_counter() - start,
                    }
                )
        print(name, file=sys.stderr, flush=True)  # noqa: T201
    return rows


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapter", help="one trained on it; beside random ones")
    parser.add_argument("--texts", nargs="+", required=True, help="calibration texts; a fifth is held out")
    parser.add_argument("--relative", type=float, nargs="+", default=[0.005, 0.01, 0.03, 0.1])
    parser.add_argument("--kind", default="nf4")
    parser.add_argument("--every", type=int, default=1, help="take one module in as many")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", action="store_true", help="print every module too")
    arguments = parser.parse_args()
    rows = measure(arguments)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["delta"], row["strategy"]), []).append(row)
    naive = {(row["module"], row["delta"]): row["error"] for row in rows if row["strategy"] == "requantize"}
    table = [
        {
            "delta": delta,
            "strategy": strategy,
            "modules": len(found),
            "norm": sum(row["norm"] for row in found) / len(found),
            "kept": sum(row["kept"] for row in found) / len(found),
            "least kept": min(row["kept"] for row in found),
            "error": sum(row["error"] for row in found) / len(found),
            "above plain rounding": max(row["error"] - naive[row["module"], delta] for row in found),
            "seconds": sum(row["seconds"] for row in found) / len(found),
        }
        for (delta, strategy), found in groups.items()
    ]
    print(json.dumps({"table": table} | ({"rows": rows} if arguments.rows else {})))  # noqa: T201


if __name__ == "__main__":
    main()
