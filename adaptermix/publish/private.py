"""Removal of private data from published documents: local paths, and passwords in addresses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..options import all_settings
from ..options.roles import MODEL, Reads, Writes, marks_of

_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_LANGUAGE = re.compile(r"([A-Za-z]{2,3}(?:[-_][A-Za-z]{2,4})*=)(.+)", re.DOTALL)
_PASSWORD = re.compile(r"(?<=://)(?:[^:/@\s]*:\S*|[^/@\s]*)@")
_NAMED_PASSWORD = re.compile(
    r"([?&;][^=&;#\s]*(?:pass|pwd|token|key|secret|auth|cred|odbc_connect|%)[^=&;#\s]*=)[^&;#\s]*", re.IGNORECASE
)
_DATABASE = re.compile(r"(?<=:///)/?[^\s'\"<>?]*(?=[\s'\"<>?]|$)")
"""The file in the address of a database: `sqlite:////home/me/x.db`."""
_MODEL_ENTRIES = {"model", "id", "fusion_encoder", "_name_or_path", "name_or_path", "base_model_name_or_path"}
"""Entries other than options that name a model: Hub ids are published, folders are not."""
_FILE_ENTRIES = {"path", "sources", "storage", "tokenizer_file", "special_tokens_map_file", "vocab_file", "merges_file"}
"""Entries other than options that name files or folders; only the last part of the path is published."""
_CACHED = re.compile(
    r".*[/\\]models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]+)[/\\]?"
)
"""A model's folder in the cache of huggingface_hub."""
_TEXTS = {"labels", "languages", "options", "targets", "template"}
"""Entries whose values are never paths, even if they look like one."""
_ROOTS = {"home", "Users", "root", "tmp", "mnt", "media", "data", "var", "opt", "scratch", "private", "Volumes", "srv"}


@cache
def _entries() -> tuple[set[str], set[str]]:
    """Return the entries that name models, and those that name files or folders; both include options of commands."""
    models, files = set(_MODEL_ENTRIES), set(_FILE_ENTRIES)
    for schema in all_settings():
        files |= {*marks_of(schema, Writes)}
        for name, mark in marks_of(schema, Reads).items():
            (models if mark.use == MODEL else files).add(name)
    return models, files


def hub_id(base: object) -> str | None:
    """Return the base model's id if it is a valid Hub id; a local path would make the card invalid."""
    if not isinstance(base, str) or not _HUB_ID.fullmatch(base) or Path(base).exists():
        return None
    return base


def is_local(value: str) -> bool:
    """Return whether a text is a local path: absolute, or relative to the home or current folder."""
    return (
        value.startswith(("/", "~", "./", "../", ".\\", "..\\", "file:")) or bool(PureWindowsPath(value).drive)
    ) and "\n" not in value


def last_part(path: str) -> str:
    """Return the last part of a Posix or Windows path; a language prefix stays (`de=/data/x.tsv` gives `de=x.tsv`).

    Of a model in the cache of huggingface_hub, which has a public name, that name with its revision is returned.
    """
    if match := _LANGUAGE.fullmatch(path):
        return match[1] + last_part(match[2])
    if path.startswith("hf:"):
        return path
    if match := _CACHED.fullmatch(path):
        return f"{match['owner']}/{match['name']}@{match['revision']}"
    plain = path.removeprefix("file://").rstrip("/\\")
    if PurePosixPath(plain).parent.name in ("home", "Users") or plain == str(Path.home()):
        return "folder"  # the last part is a user name
    name = PureWindowsPath(plain).name if "\\" in plain or PureWindowsPath(plain).drive else PurePosixPath(plain).name
    return name if name not in ("", "~", ".", "..") else "folder"


def without_paths(value: Any, *, base: str | None = None, local: str | None = None, key: str = "") -> Any:
    """Return a JSON value with local paths reduced to their last part, and without passwords in addresses.

    Args:
        value: The value.
        base: Id to replace the local base model with.
        local: The local base model, as written in the document.
        key: The entry that contains the value.
    """
    if isinstance(value, Mapping):
        # The path of an input that is a checkpoint may be an id on the Hub.
        other = {"path": "model"} if value.get("kind") == "checkpoint" else {}
        return {
            text_without_paths(name): without_paths(
                entry, base=base, local=local, key=key if key in _TEXTS else other.get(name, str(name))
            )
            for name, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_paths(entry, base=base, local=local, key=key) for entry in value]
    if not isinstance(value, str):
        return value
    if local and base and value.partition("@")[0] == local:
        return base
    match = _LANGUAGE.fullmatch(value)
    models, files = _entries()
    is_model = key in models and not hub_id(value.partition("@")[0])
    is_file = (key in files and "://" not in value) or (key not in _TEXTS and is_local(match[2] if match else value))
    return last_part(value) if value and (is_model or is_file) else text_without_paths(value)


def text_without_paths(text: str) -> str:
    """Return a text with absolute paths reduced to their last part."""
    result = _absolute().sub(lambda match: last_part(match[0]), text)
    result = _DATABASE.sub(lambda match: last_part(match[0]), result)
    return _NAMED_PASSWORD.sub(r"\1***", _PASSWORD.sub("", result))


def _absolute() -> re.Pattern[str]:
    """Return a pattern for absolute paths inside a text: those of four parts, or in a usual root folder."""
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
