"""The selection and content of the files that are published from an output folder, which is only read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..adapters import AdapterMeta, open_adapter
from ..adapters.paths import check_stored_names
from ..errors import PublishError, as_line
from ..io.checkpoint_files import open_checkpoint, open_tensors
from ..io.files import MANIFEST
from ..io.json_types import JsonObject
from ..models.stack import ADAPTER, PROJECTION, STACK
from ..provenance import manifest as manifests
from .card import card, hub_id
from .content import CONFIG, README, content_of
from .header import score_files
from .licences import Parent, card_licence, check_identifier, choose, parents_of, with_licence
from .private import last_part, text_without_paths, without_paths
from .stack import check_stack, published_form
from .template import is_untouched

_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
_MODEL = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "config.json"),
    *("generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
    *("[0-9]_*/config.json", "[0-9]_*/model.safetensors"),
    *(f"residual/{CONFIG}", "residual/adapter_model.safetensors", f"residual/{MANIFEST}"),
)
_OF_KIND = {
    "adapter": (CONFIG, "adapter_model.safetensors", *_TOKENIZER),
    "checkpoint": (*_MODEL, *_TOKENIZER),
    "delta": ("delta.safetensors",),
    "stack": (
        *(STACK, PROJECTION, "config.json", f"{ADAPTER}/{CONFIG}", f"{ADAPTER}/adapter_model.safetensors"),
        *_TOKENIZER,
        *(f"base/{name}" for name in (*_MODEL, *_TOKENIZER)),
    ),
    "gguf": ("adapter.gguf",),
    "mlx": (CONFIG, "adapters.safetensors"),
}
_RECORDS = (
    *("history.jsonl", "results.json", "report.html"),
    *("weights.png", "languages.png", "parameters.png", "layers.png", "cost.png"),
)
_ALWAYS = (
    MANIFEST,
    README,
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "LICENCE",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
"""Names that a user may add to an output whose manifest lists its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The files to publish from a folder.

    Args:
        files: By name in the repository: the content if it differs from the file on disk, else the file.
        card: The model card.
        is_made: Whether the card is generated; an edited one is published unchanged.
        left_out: Names in the folder that are not published.
        manifest: The manifest as it is published; None for a folder without a manifest.
        chosen: The licence that the user chose, by `--license` or in an edited card.
        parents: The models that the output was made from.
        notes: Notes for the user.
    """

    files: Mapping[str, bytes | Path]
    card: str
    is_made: bool
    left_out: list[str]
    manifest: manifests.Manifest | None
    chosen: str | None
    parents: list[Parent]
    notes: list[str] = field(default_factory=list)

    def sizes(self) -> list[tuple[str, int]]:
        """Return name and bytes of each file."""
        return [
            (name, len(content) if isinstance(content, bytes) else content.stat().st_size)
            for name, content in self.files.items()
        ]

    def licensed(self) -> Published:
        """Return the same files with the licence in the card, if it is known, and with the card's hash.

        Raises:
            PublishError: the licence conflicts with one of the parents'.
        """
        licence, text = choose(self.chosen, self.parents), self.card
        if licence and card_licence(text) is None:
            text = with_licence(text, licence)
        files = dict(self.files) | {README: text.encode()}
        if self.manifest is not None:
            digest = hashlib.sha256(text.encode()).hexdigest()
            files[MANIFEST] = manifests.dump({**self.manifest, "card_sha256": digest})
        return replace(self, files=dict(sorted(files.items())), card=text)


def prepare(
    folder: Path,
    repo: str,
    *,
    base_id: str | None = None,
    encoder_id: str | None = None,
    licence: str | None = None,
) -> Published:
    """Return the files to publish from an output folder or from any PEFT adapter.

    Only files with known names are published, and if the manifest lists files, only those.

    Args:
        folder: The folder.
        repo: Repository, as owner/name.
        base_id: Id of the base model on the Hub, optionally with `@REVISION`; default the id in the folder.
        encoder_id: The same of the encoder of a stack.
        licence: The licence of the publication; default one that the licences of its parents allow.

    Raises:
        AdapterFormatError: the folder has no valid adapter.
        PublishError: a file is a link, the base model is a local folder, the card has local paths, or the licence
            conflicts with a parent's.
    """
    meta, document = _contents(folder)
    public = _public(folder, meta, document, base_id)
    chosen, left_out = _chosen(folder, document)
    made: dict[str, bytes] = {}
    if document.get("artifact") == "stack":
        form = published_form(folder, check_stack(folder), base_id=base_id, encoder_id=encoder_id)
        public["stack"], made[STACK] = form, manifests.dump(form)
    local = str(document.get("base", {}).get("id") or "") if isinstance(document.get("base"), Mapping) else ""
    files: dict[str, bytes | Path] = {}
    for name in chosen:
        path = folder / name
        files[name] = content_of(path, name, public, base=public["base"].get("id"), local=local, repo=repo)
    files |= made
    notes = []
    if not public["base"].get("id"):
        notes.append("warning: the card names no base model; name it with --base-id OWNER/NAME.")
    text, is_made = _card(folder, repo, document, public, pictures=[name for name in chosen if name.endswith(".png")])
    if is_made:
        files |= score_files(public, repo)
    else:
        added = f" except for a line with the licence {licence}" if licence and not card_licence(text) else ""
        notes.append(f"README.md was edited and is published unchanged{added}.")
        if base_id:
            notes.append(f"warning: --base-id does not change it: look that it names {base_id}.")
    return Published(
        files=files,
        card=text,
        is_made=is_made,
        left_out=left_out,
        manifest=public if (folder / MANIFEST).is_file() else None,
        chosen=_licence(folder / README, licence, card_licence(text)),
        parents=parents_of(document, base=_reference(public["base"]), encoder=encoder_id),
        notes=notes,
    ).licensed()


def _reference(base: manifests.Manifest) -> str | None:
    """Return the id of a base model on the Hub with its revision."""
    revision = base.get("revision")
    return f"{base['id']}@{revision}" if base.get("id") and revision else base.get("id")


def _licence(path: Path, option: str | None, written: str | None) -> str | None:
    """Return the licence that the user chose, by the option or in an edited card."""
    if option is None:
        return written
    check_identifier(option)
    if written not in (None, option):
        raise PublishError(
            f"--license is {option}, and {path} was edited and names {written}. Drop --license, or change the card.",
            code="push.license-two",
        )
    return option


def _contents(folder: Path) -> tuple[AdapterMeta | None, manifests.Manifest]:
    """Return an adapter's config, if the folder is an adapter, and its manifest or a substitute."""
    document = _manifest(folder)
    if document.get("artifact") == "checkpoint" and not (folder / CONFIG).exists():
        open_checkpoint(folder)
        return None, document
    if document.get("artifact") == "delta" and not (folder / CONFIG).exists():
        open_tensors(folder / "delta.safetensors")
        return None, document
    if document.get("artifact") == "stack" and not (folder / CONFIG).exists():
        return None, document
    if document.get("artifact") in ("gguf", "mlx"):
        return None, document
    source = open_adapter(folder)
    check_stored_names(source)
    meta = source.meta
    return meta, document or {"kind": "adapter", "plan": {}, "base": manifests.base_entry([meta])}


def _manifest(folder: Path) -> JsonObject:
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PublishError(
            f"{path} must be JSON: {as_line(error)}. Remove it to publish the folder without it.",
            code="push.manifest-json",
        ) from error
    if not isinstance(document, dict):
        raise _edited(path, "it is not a JSON object")
    return document


def _edited(path: Path, reason: object) -> PublishError:
    return PublishError(
        f"{path} must be as adaptermix wrote it, and a card cannot be made from it ({as_line(reason)}). Remove it to "
        "publish the folder without it.",
        code="push.manifest-edited",
    )


def _public(
    folder: Path, meta: AdapterMeta | None, document: manifests.Manifest, base_id: str | None
) -> dict[str, Any]:
    """Return the manifest as it is published: without local paths, and with the base model's id on the Hub."""
    entry = document.get("base", {})
    if not isinstance(entry, Mapping):
        raise _edited(folder / MANIFEST, "its base is not a JSON object")
    local = str(entry.get("id") or (meta.base if meta else None) or "")
    known = hub_id(local) if not (folder.parent / local).is_dir() else None
    name, _, revision = (base_id or known or "").partition("@")
    if meta and local and not name:
        raise PublishError(
            f"the base model must be named by its id on the Hub, and this adapter's is a local folder "
            f"({as_line(last_part(local))!r}), which nobody else can load. Give --base-id OWNER/NAME.",
            code="push.local-base",
        )
    base = dict(entry) | {"id": name or None}
    if base_id:
        base["revision"] = revision or (entry.get("revision") if known == name else None)
    cleaned = without_paths(
        {key: value for key, value in document.items() if key != "base"}, base=name or last_part(local), local=local
    )
    public: dict[str, Any] = _without_rows(cleaned)
    return public | {"base": base}


def _without_rows(value: Any) -> Any:
    """Return a manifest without the names of sets of row hashes, which would confirm a guess of a private row."""
    if isinstance(value, Mapping):
        return {key: _without_rows(item) for key, item in value.items() if key != "row_hashes"}
    return [_without_rows(item) for item in value] if isinstance(value, list) else value


def _chosen(folder: Path, document: manifests.Manifest) -> tuple[list[str], list[str]]:
    """Return the names of the files to publish, and of those left out.

    Raises:
        PublishError: a file is a link, or is in a linked folder.
    """
    listed = document.get("files")
    named = {str(name) for name in listed} if isinstance(listed, list | dict) else None
    kind = str(document.get("artifact")) if document.get("artifact") in _OF_KIND else "adapter"
    records = _RECORDS if (folder / MANIFEST).exists() else ()
    patterns = (*_ALWAYS, *_OF_KIND[kind], *records)
    chosen: list[str] = []
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_allowed = any(fnmatchcase(name, one) and name.count("/") == one.count("/") for one in patterns)
        is_listed = named is None or name in named or name in _ALWAYS
        if path.is_symlink():
            if is_allowed or path.is_dir():
                raise PublishError(
                    f"{path} is a symbolic link, and links are not published. Put the file itself there, or remove it.",
                    code="push.link",
                )
            left_out.append(name)
        elif path.is_file():
            (chosen if is_allowed and is_listed else left_out).append(name)
    return chosen, left_out


def _card(
    folder: Path, repo: str, document: manifests.Manifest, public: manifests.Manifest, *, pictures: list[str]
) -> tuple[str, bool]:
    """Return the card to publish, and whether it is generated; an edited one is published unchanged."""
    path = folder / README
    if path.is_file():
        kept = path.read_bytes()
        is_ours = hashlib.sha256(kept).hexdigest() == document.get("card_sha256")
        text = kept.decode(errors="replace")
        if not is_ours and not is_untouched(text):
            _check_card(path, text)
            return text, False
    try:
        base = public["base"].get("id")
        return card(public, name=repo.split("/")[1], reference=repo, base=base, pictures=pictures), True
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _edited(folder / MANIFEST, f"{type(error).__name__}: {error}") from error


def _check_card(path: Path, text: str) -> None:
    for number, line in enumerate(text.splitlines(), start=1):
        if text_without_paths(line) != line:
            raise PublishError(
                f"{path}:{number} names a path of this machine, and was edited, so it is not replaced. Take the path "
                "out, or remove README.md to have a new one made.",
                code="push.card-path",
            )
