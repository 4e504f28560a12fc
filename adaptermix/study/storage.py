"""What searches take from optuna: where trials are kept, what proposes them, and what is proposed."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..errors import OutputError
from .space import Choice, Interval, Parameter
from .vary import label

_GP_UP_TO = 8
_STARTUP = 6
"""Trials that TPE and the Gaussian process propose at random, before they look at any."""
_UNSEEN = {"random": 1_000_000, "cmaes": 4, "tpe": 1, "gp": 1}
"""Further trials that a sampler proposes without having seen how they did: CMA-ES those of a generation."""
_PASSWORD = re.compile(r"(://[^:/@]+):[^@]*@")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep optuna from telling what it does, and that parts of it are experimental."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_sampler(name: str, seed: int) -> Any:
    """Return optuna's sampler of a name: `random`, `tpe`, `cmaes` or `gp`."""
    from optuna import samplers

    makers: dict[str, Callable[[], Any]] = {
        "random": lambda: samplers.RandomSampler(seed=seed),
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=_STARTUP),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed),
        "gp": lambda: samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP),
    }
    with quiet():
        return makers[name]()


def proposed_together(sampler: str, begun: int) -> int:
    """Return how many trials to ask a sampler for at once so that it proposes what it would one at a time.

    Args:
        sampler: Its name.
        begun: Trials that it has proposed.
    """
    return max(_UNSEEN[sampler], _STARTUP - begun)


def fitting_sampler(parameters: Iterable[Parameter]) -> str:
    """Return the sampler that `auto` stands for: gp for a few numbers, else tpe."""
    found = list(parameters)
    few = len(found) <= _GP_UP_TO and all(isinstance(parameter, Interval) for parameter in found)
    return "gp" if few else "tpe"


def distribution(parameter: Parameter) -> Any:
    """Return optuna's form of a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(parameter, Choice):
        return CategoricalDistribution([label(value) for value in parameter.values])
    kind = IntDistribution if parameter.whole else FloatDistribution
    return kind(parameter.low, parameter.high, log=parameter.log)


def without_password(place: str | Path) -> str:
    """Return a place for a person: the password of a URL is hidden.

    Example:
        >>> without_password("postgresql://me:secret@host/db")
        'postgresql://me:***@host/db'
    """
    return _PASSWORD.sub(r"\1:***@", str(place))


def _storage(place: str | Path) -> Any:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        if "://" in str(place):
            return RDBStorage(str(place))
        path = Path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():  # optuna would find out later, in words of its own
            with path.open(encoding="utf-8") as file:
                json.loads(file.readline() or "{}")
        return JournalStorage(JournalFileBackend(str(path)))
    except Exception as error:  # of many kinds: drivers, networks, permissions, files that are no journal
        reason = without_password(" ".join(str(error).split())[:200])
        raise OutputError(
            f"--storage must be a journal file of a search, or a database that can be reached, and "
            f"{without_password(place)} is not: {reason}"
        ) from error


def open_study(place: str | Path, name: str) -> Any:
    """Open a study, or begin it; what it is to find is the greatest value.

    Args:
        place: Journal file, or the URL of a database.
        name: Name of the study.

    Raises:
        OutputError: the storage cannot be reached.
    """
    import optuna

    with quiet():
        return optuna.create_study(storage=_storage(place), study_name=name, direction="maximize", load_if_exists=True)


def forget(place: str | Path, name: str) -> None:
    """Delete a study, if there is one of this name.

    Raises:
        OutputError: the storage cannot be reached.
    """
    import optuna

    with quiet(), suppress(KeyError):
        optuna.delete_study(study_name=name, storage=_storage(place))
