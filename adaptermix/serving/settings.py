"""Settings of the plugin, read from environment variables."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..adapters.lora_config import CONFIG
from ..errors import UsageError
from ..io.folders import cache_folder
from .names import is_name

ADAPTERS = "ADAPTERMIX_ADAPTERS"
LIMIT = "ADAPTERMIX_SERVING_GB"
_DEFAULT_GB = 20.0


@dataclass(frozen=True, kw_only=True)
class ServingSettings:
    """The adapters to serve, and the cache of their merges.

    Args:
        adapters: Folders of the registered adapters by name, or the folder that contains them.
        cache: Folder of the merges.
        limit: Most bytes of the merges.
    """

    adapters: Mapping[str, Path] | Path
    cache: Path
    limit: int

    def registered(self) -> Mapping[str, Path]:
        """Return the folders of the adapters by name.

        A folder of adapters is read at each call, so adapters can be added while the server runs. Its entries without
        an adapter, or whose names a request could not hold, are left out.

        Raises:
            OSError: the folder cannot be read.
        """
        if not isinstance(self.adapters, Path):
            return self.adapters
        return {path.name: path for path in self.adapters.iterdir() if is_name(path.name) and (path / CONFIG).is_file()}


def from_environment(environment: Mapping[str, str] = os.environ) -> ServingSettings | None:
    """Return the settings; None if no adapters are named.

    Args:
        environment: The environment variables. `ADAPTERMIX_ADAPTERS` is NAME=FOLDER,NAME=FOLDER,... or one folder whose
            subfolders are adapters, `ADAPTERMIX_SERVING_GB` the most gigabytes of merges on disk, and
            `ADAPTERMIX_CACHE` the folder of caches.

    Raises:
        UsageError: a variable has an invalid value.
    """
    text = environment.get(ADAPTERS)
    if not text:
        return None
    adapters = Path(text).absolute() if Path(text).is_dir() else _listed(text)
    return ServingSettings(adapters=adapters, cache=cache_folder(environment) / "serving", limit=_limit(environment))


def _listed(text: str) -> dict[str, Path]:
    adapters: dict[str, Path] = {}
    for entry in text.split(","):
        name, equals, folder = entry.strip().partition("=")
        path = Path(folder).expanduser().absolute()
        if not equals or not is_name(name) or name in adapters or not (path / CONFIG).is_file():
            raise UsageError(
                f"{ADAPTERS} must be a folder of adapters, or NAME=FOLDER,... with different names of letters, digits "
                f"and ._- and folders that contain {CONFIG}, got {entry!r}.",
                code="serving.adapters",
            )
        adapters[name] = path
    return adapters


def _limit(environment: Mapping[str, str]) -> int:
    text = environment.get(LIMIT) or str(_DEFAULT_GB)
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and size > 0):
        raise UsageError(f"{LIMIT} must be a positive number, got {text!r}.", code="serving.limit")
    return int(size * 1e9)
