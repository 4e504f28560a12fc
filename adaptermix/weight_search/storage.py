"""Thin wrapper around optuna: storages, studies, samplers and distributions."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from ..errors import OutputError
from .journal import open_journal
from .parameters import Choice, Interval, Parameter, Plain, Point, label

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial

StudyAddress = tuple[str | Path, str]
"""A journal file or the URL of a database, and the name of the study there."""

_GP_UP_TO = 8
_STARTUP = 6
"""Trials that TPE and the Gaussian process draw at random before they use results."""
_UNSEEN = {"random": 1_000_000, "cmaes": 4, "tpe": 1, "gp": 1}
"""Further trials that a sampler proposes without the results of the ones before; for CMA-ES one generation."""
_PASSWORD = re.compile(
    r"(://[^:/@\s]*:)(\S*)(?=@)"  # of a user
    r"|(?<![\w+.-])((?!(?:postgres|postgresql|mysql|mariadb|oracle|mssql)[+:])[a-z][a-z0-9+.-]*://)([^:/@\s]+)(?=@)"
    r"|([?&;][^=&;#\s]*(?:pass|pwd|token|key|secret|auth|cred|odbc_connect|%)[^=&;#\s]*=)([^&;#\s]*)",
    re.IGNORECASE,
)
"""Passwords in a URL: after the user; instead of the user where a service has no users; as a named value."""
_INNER = re.compile(r"(?:^|;)\s*PWD=([^;]*)", re.IGNORECASE)
"""The password of a connection string, which is a value in a URL itself."""
_PROXY_SECONDS = 10
"""Longest wait for the server of a `grpc://` storage."""
_PACKAGES = {"grpc": ("grpc", "grpcio protobuf"), "redis": ("redis", "redis"), "rediss": ("redis", "redis")}
"""Per scheme of a URL the module that optuna imports, and the packages to install."""
_LONGEST_FIRST = 2**20
"""Bytes of a journal's first line that are read; optuna's are short."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence optuna's log and its warnings about experimental features."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_sampler(name: str, seed: int) -> BaseSampler:
    """Return optuna's sampler of a name: `random`, `tpe`, `cmaes` or `gp`."""
    from optuna import samplers

    makers: dict[str, Callable[[], BaseSampler]] = {
        "random": lambda: samplers.RandomSampler(seed=seed),
        "tpe": lambda: samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=_STARTUP),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed),
        "gp": lambda: samplers.GPSampler(seed=seed, n_startup_trials=_STARTUP),
    }
    with quiet():
        return makers[name]()


def proposed_together(sampler: str, count: int) -> int:
    """Return how many trials to ask for at once without changing the proposals, after `count` proposals."""
    return max(_UNSEEN[sampler], _STARTUP - count)


def fitting_sampler(parameters: Iterable[Parameter]) -> str:
    """Return the sampler that `auto` means: gp for a few numbers, else tpe."""
    every = list(parameters)
    few = len(every) <= _GP_UP_TO and all(isinstance(parameter, Interval) for parameter in every)
    return "gp" if few else "tpe"


def distribution(parameter: Parameter) -> BaseDistribution:
    """Return the optuna distribution of a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(parameter, Choice):
        return CategoricalDistribution([label(value) for value in parameter.values])
    kind = IntDistribution if parameter.whole else FloatDistribution
    return kind(parameter.low, parameter.high, log=parameter.log)


def is_number(value: object) -> bool:
    """Return whether a value read from a storage is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def value_of(parameter: Parameter, stored: Plain) -> Plain:
    """Return the value of a parameter that optuna stored.

    Raises:
        ValueError: the parameter cannot have this value.
    """
    if isinstance(parameter, Choice):
        for value in parameter.values:
            if label(value) == stored:
                return value
    elif is_number(stored) and parameter.low <= stored <= parameter.high:
        return stored
    raise ValueError(f"a parameter has the value {stored!r}, which it cannot have")


def without_password(location: str | Path) -> str:
    """Return a storage location for messages, with the password of a URL hidden.

    Example:
        >>> without_password("postgresql://me:secret@host/db")
        'postgresql://me:***@host/db'
        >>> without_password("mysql://host/db?user=me&password=secret")
        'mysql://host/db?user=me&password=***'
        >>> without_password("grpc://secret@host:13000")
        'grpc://***@host:13000'
    """
    return _PASSWORD.sub(lambda match: f"{match[1] or match[3] or match[5]}***", str(location))


def hidden(location: str | Path, text: str) -> str:
    """Return a driver's message without the passwords of a storage, decoded or not."""
    matches = _PASSWORD.findall(str(location)) if "://" in str(location) else []
    values = {value for match in matches for value in match[1::2]}
    values |= {inner for value in values for inner in _INNER.findall(unquote(value))}
    secrets = values | {unquote(value) for value in values}
    for secret in sorted(secrets - {""}, key=len, reverse=True):
        text = text.replace(secret, "***")
    return without_password(text)


def _open_storage(location: str | Path) -> BaseStorage:
    from optuna.storages import JournalStorage

    if "://" in str(location):
        return _open_url(str(location))
    path = Path(location)
    if path.exists() and not path.is_file() and not path.is_dir():  # Opening a named pipe would block.
        raise ValueError("it is not a file")
    if path.exists():  # A file of another kind must not be changed.
        _check_first_line(path)
    return JournalStorage(open_journal(path))


def _open_url(url: str) -> BaseStorage:
    """Open optuna's proxy of a storage (`grpc://HOST:PORT`), a journal in Redis (`redis://`), or a database."""
    from optuna.storages import GrpcStorageProxy, JournalStorage, RDBStorage
    from optuna.storages.journal import JournalRedisBackend

    parts = urlsplit(url)
    if parts.scheme == "grpc" and (not parts.hostname or not parts.port or parts.path.strip("/")):
        raise ValueError("its form must be grpc://HOST:PORT")
    module, packages = _PACKAGES.get(parts.scheme, ("optuna", ""))
    if find_spec(module) is None:
        raise ValueError(f"it needs other packages: pip install {packages}")
    if parts.scheme == "grpc":
        proxy = GrpcStorageProxy(host=str(parts.hostname), port=int(parts.port or 0))
        proxy.wait_server_ready(timeout=_PROXY_SECONDS)
        return proxy
    if parts.scheme in ("redis", "rediss"):
        return JournalStorage(JournalRedisBackend(url))
    return RDBStorage(url)


def _check_first_line(path: Path) -> None:
    with path.open("rb") as file:
        line = file.readline(_LONGEST_FIRST)
    if line.endswith(b"\n"):
        is_journal = isinstance(entry := json.loads(line), dict) and "op_code" in entry
    else:  # The line is empty or was cut off.
        is_journal = b'{"op_code":'.startswith(line[:11])
    if not is_journal:
        raise ValueError("its first line is not that of a journal")


@contextmanager
def _reachable(location: str | Path) -> Iterator[None]:
    """Turn errors of a storage (of drivers, networks, permissions, forged journals) into one sentence."""
    try:
        with quiet():
            yield
    except Exception as error:
        reason = hidden(location, " ".join(str(error).split())[:200].rstrip(".")) or type(error).__name__
        raise OutputError(
            f"--storage must be a journal file of a search, or a database that can be reached, and "
            f"{without_password(location)} is not: {reason}. Give another one, or remove it.",
            code="storage.unreachable",
        ) from error


def open_study(address: StudyAddress) -> Study:
    """Open or create a study that maximizes its value.

    Raises:
        OutputError: the storage cannot be reached.
    """
    import optuna

    location, name = address
    with _reachable(location):
        storage = _open_storage(location)
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)


def forget(address: StudyAddress) -> None:
    """Delete a study if it exists.

    Raises:
        OutputError: the storage cannot be reached.
    """
    import optuna

    location, name = address
    with _reachable(location):
        storage = _open_storage(location)
        with suppress(KeyError):
            optuna.delete_study(study_name=name, storage=storage)


def median_trial(others: Sequence[Mapping[int, float]], *, fewest: int, after: int, maximize: bool) -> OptunaTrial:
    """Return an optuna trial in memory that `should_prune` if it is worse than the median of others.

    Args:
        others: Values of the others by step.
        fewest: Fewest values of others at a step for the trial to be pruned there.
        after: Step up to which the trial is not pruned.
        maximize: Whether higher values are better.
    """
    from optuna import create_study
    from optuna.pruners import MedianPruner
    from optuna.trial import create_trial

    with quiet():
        pruner = MedianPruner(n_startup_trials=fewest, n_warmup_steps=after + 1, n_min_trials=fewest)
        study = create_study(direction="maximize" if maximize else "minimize", pruner=pruner)
        for values in others:  # The pruner counts only complete trials; their final value has no part in the rule.
            study.add_trial(create_trial(value=0.0, intermediate_values=dict(values)))
        return study.ask()


class StudyTrials:
    """The trials of one study, whose parameters are known.

    Raises:
        OutputError: the storage cannot be reached.
    """

    def __init__(self, address: StudyAddress, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = parameters
        self._study = open_study(address)
        self._distributions = {key: distribution(parameter) for key, parameter in parameters.items()}

    def _trials(self, *states: str) -> list[FrozenTrial]:
        """Return optuna's trials that are in one of the states, or all."""
        from optuna.trial import TrialState

        members = tuple(TrialState[state] for state in states) or None
        return list(self._study.get_trials(deepcopy=False, states=members))

    def _fail(self, number: int) -> None:
        from optuna.trial import TrialState

        self._study.tell(number, state=TrialState.FAIL)

    def _enqueue(self, point: Point, *, skip_if_exists: bool = False) -> None:
        with quiet():
            self._study.enqueue_trial(dict(point), skip_if_exists=skip_if_exists)

    def _point(self, trial: FrozenTrial) -> Point:
        """Return the parameters of a trial.

        Raises:
            LookupError, ValueError: the storage holds others.
        """
        return {key: value_of(parameter, trial.params[key]) for key, parameter in self._parameters.items()}
