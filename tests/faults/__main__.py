"""Count faults: commands that are stopped, disks that are full, and hostile inputs.

scripts/faults --kills 9 --full 6 --limits 3 --hostile 12
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .commands import COMMANDS, bench_of, write_all
from .hostile import TARGETS, HostileInputs
from .processes import preload
from .trials import disk_faults, limit_faults, stop_faults


def _count(name: str, trials: Iterable[list[str]]) -> int:
    """Print how many trials went wrong, with what went wrong, and return the number."""
    results = list(trials)
    wrong = [result for result in results if result]
    print(f"{name}: {len(wrong)} of {len(results)} wrong", flush=True)  # noqa: T201  (the report)
    for result in wrong:
        print("  " + "\n  ".join(result), flush=True)  # noqa: T201  (the report)
    return len(wrong)


def main() -> int:
    """Run the trials and return the exit code: 1 if any went wrong."""
    parser = argparse.ArgumentParser(prog="scripts/faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="signals per command, at random moments and operations")
    parser.add_argument("--full", type=int, default=0, help="full disks per command")
    parser.add_argument("--limits", type=int, default=0, help="limits of memory and of open files per command")
    parser.add_argument("--disk", help="folder on a small disk, such as a tmpfs, which --full fills")
    parser.add_argument("--hostile", type=int, default=0, help="damaged inputs per kind")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and damages")
    parser.add_argument("--only", nargs="*", help="names of commands, or of kinds of inputs")
    options = parser.parse_args()
    preload()
    wrong = 0
    with tempfile.TemporaryDirectory(dir=options.disk) as temporary:
        folder = Path(temporary) / "commands"
        folder.mkdir()
        write_all(folder)
        chosen = [name for name in COMMANDS if not options.only or name in options.only]
        for name in chosen if options.kills or options.full or options.limits else ():
            bench = bench_of(name, folder)
            kinds = {
                "signals": stop_faults(bench, options.kills, options.seed),
                "full disks": disk_faults(bench, options.full, fill=options.disk is not None),
                "limits": limit_faults(options.limits, options.seed),
            }
            wrong += sum(
                _count(f"{name}, {kind}", map(bench.trial, faults)) for kind, faults in kinds.items() if faults
            )
        hostile = HostileInputs(folder)
        for name in [name for name in TARGETS if not options.only or name in options.only] if options.hostile else ():
            seeds = range(options.seed, options.seed + options.hostile)
            wrong += _count(name, (hostile.trial(name, seed) for seed in seeds))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
