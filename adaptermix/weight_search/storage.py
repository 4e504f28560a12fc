"""What searches take from optuna: where trials are kept, what proposes them, and what is proposed."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ..errors import OutputError
from .journal import open_journal
from .parameters import label
from .space import Choice, Interval, Parameter

_GP_UP_TO = 8
_STARTUP = 6
"""Trials that TPE and the Gaussian process propose at random, before they look at any."""
_UNSEEN = {"random": 1_000_000, "cmaes": 4, "tpe": 1, "gp": 1}
"""Further trials that a sampler proposes without having seen how they did: CMA-ES those of a generation."""
_PASSWORD = re.compile(
    r"(://[^:/@\s]*:)(\S*)(?=@)|([?&;](?:password|passwd|pwd|sslpassword|pass)=)([^&;#\s]*)", re.IGNORECASE
)
_LONGEST_FIRST = 2**20
"""Bytes of a journal's first line that are looked at; those of optuna are short."""


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


def is_number(found: object) -> bool:
    """Return whether something read from a storage is a finite number."""
    return isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)


def value_of(parameter: Parameter, value: Any) -> Any:
    """Return a value of a parameter.

    Raises:
        ValueError: it can have no such value.
    """
    if isinstance(parameter, Choice):
        is_one = value in [label(choice) for choice in parameter.values]
    else:
        is_one = is_number(value) and parameter.low <= value <= parameter.high
    if not is_one:
        raise ValueError(f"a parameter has the value {value!r}, which it cannot have")
    return value


def without_password(place: str | Path) -> str:
    """Return a place for a person: the password of a URL is hidden.

    Example:
        >>> without_password("postgresql://me:secret@host/db")
        'postgresql://me:***@host/db'
        >>> without_password("mysql://host/db?user=me&password=secret")
        'mysql://host/db?user=me&password=***'
    """
    return _PASSWORD.sub(lambda found: f"{found[1] or found[3]}***", str(place))


def hidden(place: str | Path, text: str) -> str:
    """Return a text of a driver without the passwords of a storage, decoded or not."""
    found = _PASSWORD.findall(str(place)) if "://" in str(place) else []
    secrets = {secret for _, user, _, named in found for secret in (user, unquote(user), named, unquote(named))}
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return without_password(text)


def _storage(place: str | Path) -> Any:
    from optuna.storages import JournalStorage, RDBStorage

    try:
        if "://" in str(place):
            return RDBStorage(str(place))
        path = Path(place)
        if path.exists() and not path.is_file() and not path.is_dir():  # a named pipe would be waited for
            raise ValueError("it is not a file")
        if path.exists():  # a file of something else is not to be changed
            _check_first_line(path)
        return JournalStorage(open_journal(path))
    except Exception as error:  # of many kinds: drivers, networks, permissions, files that are no journal
        raise _refused(place, error) from error


def _check_first_line(path: Path) -> None:
    with path.open("rb") as file:
        line = file.readline(_LONGEST_FIRST)
    if line.endswith(b"\n") and not (isinstance(found := json.loads(line), dict) and "op_code" in found):
        raise ValueError("its first line is not that of a journal")
    if line and not line.endswith(b"\n") and not b'{"op_code":'.startswith(line[:11]):
        raise ValueError("its first line is not that of a journal")


def _refused(place: str | Path, error: Exception) -> OutputError:
    reason = hidden(place, " ".join(str(error).split())[:200]) or type(error).__name__
    return OutputError(
        f"--storage must be a journal file of a search, or a database that can be reached, and "
        f"{without_password(place)} is not: {reason}. Give another one, or remove it."
    )


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
        storage = _storage(place)
        try:
            return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        except Exception as error:  # a journal is read here, whatever somebody has written into it
            raise _refused(place, error) from error


def has_no_trial(place: str | Path, name: str) -> bool:
    """Return whether a study has no trial, finished or not.

    Raises:
        OutputError: the storage cannot be reached.
    """
    return not open_study(place, name).get_trials(deepcopy=False)


def forget(place: str | Path, name: str) -> None:
    """Delete a study, if there is one of this name.

    Raises:
        OutputError: the storage cannot be reached.
    """
    import optuna

    with quiet(), suppress(KeyError):
        storage = _storage(place)
        try:
            optuna.delete_study(study_name=name, storage=storage)
        except KeyError:
            raise
        except Exception as error:
            raise _refused(place, error) from error
