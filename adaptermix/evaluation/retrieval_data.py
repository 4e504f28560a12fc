"""What `retrieve` compares: texts, directions, groups of languages, and the system that embeds the candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..adapters import AdapterSource, open_adapter
from ..adapters.lora_config import CONFIG
from ..errors import PlanError, UsageError
from ..models.base import model_origins
from ..models.pretrained import load_config
from ..options import RetrieveSettings
from ..provenance.manifest import Origin, origin
from ..tasks.data import read_parallel
from ..tasks.data.languages import split_pair
from ..tasks.data.parallel import ParallelText
from .score import known_languages


def language_of(key: str) -> str:
    """Return the language of a list of sentences; see `ParallelText`."""
    return key.rpartition(":")[2]


def directions_of(settings: RetrieveSettings) -> ParallelText:
    """Return the texts, with the directions to the requested languages only.

    Raises:
        DataError: a file is missing or damaged.
        PlanError: a language is not one of the data.
    """
    parallel = read_parallel(settings.data, rows=settings.rows)
    if not settings.to:
        return parallel
    chosen = known_languages(settings.to, _languages(parallel), option="to")
    return replace(parallel, directions=[each for each in parallel.directions if language_of(each[2]) in chosen])


def _languages(parallel: ParallelText) -> list[str]:
    return list(dict.fromkeys(map(language_of, parallel.texts)))


def groups_of(settings: RetrieveSettings, parallel: ParallelText) -> dict[str, list[str]]:
    """Return the languages of each group of `NAME=LANG,LANG` arguments.

    Raises:
        UsageError: an argument has another form, or a name occurs twice.
        PlanError: a language is not one of the data, or no direction is from or to a group.
    """
    groups: dict[str, list[str]] = {}
    for argument in settings.groups:
        name, _, codes = argument.partition("=")
        if not name or not codes or name in groups:
            raise UsageError(
                f"a group must be given once, as NAME=LANG,LANG, such as near=de,nl, got {argument!r}.",
                code="retrieve.group",
            )
        groups[name] = known_languages(codes.split(","), _languages(parallel), option="groups")
    measured = {language for name, _, _ in parallel.directions for language in split_pair(name)}
    for name, languages in groups.items():
        if not measured & set(languages):
            raise PlanError(
                f"--groups {name} must have a language that is measured ({', '.join(sorted(measured))}), and has "
                f"{', '.join(languages)}. Drop the group, or name more languages in --to.",
                code="retrieve.empty-group",
            )
    return groups


def sides_of(parallel: ParallelText, *sides: int) -> dict[str, list[str]]:
    """Return the texts that are queries (1) or candidates (2) of a direction."""
    used = {direction[side] for direction in parallel.directions for side in sides}
    return {key: rows for key, rows in parallel.texts.items() if key in used}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The system that embeds the candidates, if it is another than that of the queries.

    Args:
        model: Its model, if that is not the base model of the queries.
        sources: Its adapters.
    """

    model: str | None = None
    sources: tuple[AdapterSource, ...] = ()

    def origins(self) -> list[Origin]:
        """Return the folders whose manifests name the data that the system has seen."""
        return [*map(origin, self.sources), *(model_origins(self.model) if self.model else [])]


def open_candidates(settings: RetrieveSettings) -> Candidates:
    """Return the system of `candidates_from`: an adapter of the base model, that model alone, or another model.

    Raises:
        AdapterFormatError: the adapter is damaged.
        ModelError: there is no such model.
        PlanError: the other model has another number of layers or another width.
    """
    reference = settings.candidates_from
    if reference is None or reference == settings.base:
        return Candidates()
    if (Path(reference) / CONFIG).is_file():
        return Candidates(sources=(open_adapter(Path(reference)),))
    ours, theirs = (_shape(model) for model in (settings.base, reference))
    if ours != theirs:
        raise PlanError(
            "--candidates-from must have the layers and the width of the base model, since vectors of equal layers are "
            f"compared; found {theirs[0]} layers of width {theirs[1]}, and {ours[0]} of width {ours[1]}.",
            code="retrieve.candidates-shape",
        )
    return Candidates(model=reference)


def _shape(reference: str) -> tuple[int, int]:
    """Return the number of blocks and the width of a model, from its configuration."""
    config = load_config(reference).get_text_config()
    return int(config.num_hidden_layers), int(config.hidden_size)
