"""What must not leave a machine: local paths in documents that are published, and passwords in addresses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_LANGUAGE = re.compile(r"([A-Za-z]{2,3}(?:[-_][A-Za-z]{2,4})*=)(.+)", re.DOTALL)
_PASSWORD = re.compile(r"(?<=://)(?:[^:/@\s]*:\S*|[^/@\s]*)@")
_NAMED_PASSWORD = re.compile(r"([?&;](?:password|passwd|pwd|sslpassword|pass|token)=)[^&;#\s]*", re.IGNORECASE)
_DATABASE = re.compile(r"(?<=:///)/?[^\s'\"<>?]*(?=[\s'\"<>?]|$)")
"""The file in the address of a database: `sqlite:////home/me/x.db`."""
_MODELS = {"base", "model", "model_a", "model_b", "tuned", "source_encoder", "fusion_encoder", "id"}
_MODELS |= {"_name_or_path", "name_or_path", "base_model_name_or_path"}
"""Entries that name a model: a Hub id stays, a folder does not."""
_FILES = {"adapter", "adapters", "against", "beside", "calibration", "candidates", "csv", "data", "dev", "dev_pairs"}
_FILES |= {"dev_source", "document", "folder", "markdown", "on_top_of", "out", "pairs", "path", "plot", "predictions"}
_FILES |= {"source", "sources", "start_from", "statistics", "storage", "systems", "texts", "train"}
_FILES |= {"tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file"}
"""Entries that name files or folders, of which only the last part of the path is published."""
_TEXTS = {"labels", "languages", "options", "targets", "template"}
"""Entries whose values are no paths, whatever they begin with."""
_ROOTS = {"home", "Users", "root", "tmp", "mnt", "media", "data", "var", "opt", "scratch", "private", "Volumes", "srv"}


def hub_id(base: object) -> str | None:
    """Return the base model's id if it can be one on the Hub; a local path is not, and would make the card invalid."""
    if not isinstance(base, str) or not _HUB_ID.fullmatch(base) or Path(base).exists():
        return None
    return base


def is_local(value: str) -> bool:
    """Return whether a text is written as a path of a machine: absolute, or from a home or the current folder."""
    return (
        value.startswith(("/", "~", "./", "../", ".\\", "..\\", "file:")) or bool(PureWindowsPath(value).drive)
    ) and "\n" not in value


def last_part(path: str) -> str:
    """Return the last part of a path of any system; a language before it stays (`de=/data/x.tsv` gives `de=x.tsv`)."""
    if given := _LANGUAGE.fullmatch(path):
        return given[1] + last_part(given[2])
    if path.startswith("hf:"):
        return path
    plain = path.removeprefix("file://").rstrip("/\\")
    if PurePosixPath(plain).parent.name in ("home", "Users") or plain == str(Path.home()):
        return "folder"  # the last part is the name of a person
    name = PureWindowsPath(plain).name if "\\" in plain or PureWindowsPath(plain).drive else PurePosixPath(plain).name
    return name if name not in ("", "~", ".", "..") else "folder"


def without_paths(value: Any, *, base: str | None = None, local: str | None = None, key: str = "") -> Any:
    """Return a JSON value with local paths cut to their last part, and passwords left out of addresses.

    Args:
        value: The value.
        base: Id to write in the place of the local base model.
        local: The local base model, as the document names it.
        key: The entry that holds the value.
    """
    if isinstance(value, Mapping):
        return {
            text_without_paths(name): without_paths(
                entry, base=base, local=local, key=key if key in _TEXTS else str(name)
            )
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_paths(entry, base=base, local=local, key=key) for entry in value]
    if not isinstance(value, str):
        return value
    if local and base and value.partition("@")[0] == local:
        return base
    given = _LANGUAGE.fullmatch(value)
    is_model = key in _MODELS and not hub_id(value.partition("@")[0])
    is_file = (key in _FILES and "://" not in value) or (key not in _TEXTS and is_local(given[2] if given else value))
    return last_part(value) if value and (is_model or is_file) else text_without_paths(value)


def text_without_paths(text: str) -> str:
    """Return a text in which absolute paths of this or another machine are cut to their last part."""
    found = _absolute().sub(lambda match: last_part(match[0]), text)
    found = _DATABASE.sub(lambda match: last_part(match[0]), found)
    return _NAMED_PASSWORD.sub(r"\1***", _PASSWORD.sub("", found))


def _absolute() -> re.Pattern[str]:
    """Return what finds absolute paths inside a text: those of four parts, or in folders that a root has."""
    try:
        roots = _ROOTS | {name for name in os.listdir("/") if name.isidentifier()}
    except OSError:
        roots = _ROOTS
    home = re.escape(str(Path.home()))
    names = "|".join(sorted(map(re.escape, roots)))
    rest = r"""[^\s'"<>|*?`,;:()\[\]{}]*"""
    deep = r"(?:/[A-Za-z_][\w.-]*){3}"
    windows = rf"\b[A-Za-z]:[\\/]{rest}|(?<!\S)\\\\\w{rest}"
    return re.compile(rf"(?<![\w.:/<+-])(?:file://)?(?:{home}|~|\$HOME|/(?:{names})|{deep})/{rest}|{windows}")
