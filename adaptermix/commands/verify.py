"""Rebuild an output from its manifest, and compare the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import AdapterMixError, ConfigError, as_line
from ..io.files import MANIFEST
from ..io.temporary import temporary_folder
from ..options import Settings, VerifySettings
from ..options.roles import Reads, Writes, marks_of
from ..progress import SILENT, Watcher
from ..provenance.differences import Comparison, differences
from ..provenance.manifest import origin_of, versions
from .record import Command
from .request import inputs_of, is_recorded, left_out
from .table import COMMANDS
from .verification import InputChange, Verification

ON_GPU = 1e-3
"""Default tolerance on a GPU, which adds numbers in another order from run to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """The entry `request` of a manifest, checked: the record of the command, its options, and its inputs."""

    command: Command
    settings: Settings
    inputs: Sequence[Mapping[str, object]]


def verify(settings: VerifySettings, *, watch: Watcher = SILENT) -> Verification:
    """Rebuild an output in a temporary folder and compare it with the output; or only hash its inputs again.

    The output is not rebuilt if an input is missing or has changed.

    Raises:
        ConfigError: there is no manifest, or it does not record the command.
    """
    output = Path(settings.output)
    document, how = _manifest_of(output), Comparison(moved=settings.moved)
    with temporary_folder() as folder:
        copy = folder / output.resolve().name
        request = _request_of(document, copy, settings, how)
        how = replace(how, tolerance=_tolerance(request.settings, settings))
        result = Verification(
            output=output,
            command=request.command.name,
            tolerance=how.tolerance,
            versions=_changed_versions(document),
            inputs=_changed_inputs(request, how),
        )
        for path in _without_hash(request):
            watch.note(f"{path} was not hashed, since it was not on disk: whether it changed is not known")
        if settings.inputs or result.inputs:
            return result
        try:
            request.command.call(request.settings, watch=watch)
        except AdapterMixError as error:
            return replace(result, failure=str(error))
        return replace(result, is_rebuilt=True, differences=differences(output, copy, how))


def _manifest_of(output: Path) -> Mapping[str, object]:
    """Return the manifest of an output folder, or of a file of statistics."""
    document: Mapping[str, object] = {}
    if output.is_dir():
        document = origin_of(output).manifest
    elif output.is_file() and output.suffix == ".safetensors":
        from ..io.checkpoint_files import open_tensors
        from ..merging.statistics import document_of

        document = document_of(open_tensors(output))
    if not document:
        raise ConfigError(
            f"an output that adaptermix wrote is needed, and {output} has no manifest ({MANIFEST}). Give the folder of "
            "an output, or a file of statistics.",
            code="verify.no-manifest",
        )
    return document


def _request_of(document: Mapping[str, object], copy: Path, verified: VerifySettings, how: Comparison) -> _Request:
    """Return the request of a manifest, with the copy as its output.

    Raises:
        ConfigError: it is missing or not valid. Users edit manifests, and some come from other people.
    """
    request = document.get("request")
    request = request if isinstance(request, Mapping) else {}
    command = COMMANDS.get(str(request.get("command")))
    options, inputs = request.get("settings"), request.get("inputs")
    if command is None or not (isinstance(options, Mapping) and isinstance(inputs, list)):
        raise ConfigError(
            f"{verified.output} must record the command that made it (entry 'request' of its manifest), and does not. "
            "Earlier versions and other programs do not write it. Make the output again.",
            code="verify.no-request",
        )
    schema = command.schema()
    values = {
        name: _renamed(value, how) if name in marks_of(schema, Reads) else value for name, value in options.items()
    }
    if verified.device and "device" in schema.model_fields:
        values["device"] = verified.device
    if document.get("tested") and "allow_tested" in schema.model_fields:
        values["allow_tested"] = True
    try:
        refused = sorted(left_out(schema) & options.keys()) if is_recorded(schema) else [command.name]
        if refused:
            raise ValueError(f"{', '.join(refused)} cannot be in it")
        settings = schema(**values, **{_output_option(schema): str(copy)})
    except ValueError as error:
        raise ConfigError(
            f"the entry 'request' of the manifest of {verified.output} must be the options of a command that writes an "
            f"output, and is not: {as_line(error)}. Make the output again.",
            code="verify.request",
        ) from error
    return _Request(command=command, settings=settings, inputs=[each for each in inputs if isinstance(each, Mapping)])


def _output_option(schema: type[Settings]) -> str:
    return next(name for name, mark in marks_of(schema, Writes).items() if mark.is_main)


def _renamed(value: object, how: Comparison) -> object:
    if isinstance(value, list):
        return [_renamed(item, how) for item in value]
    return how.renamed(value) if isinstance(value, str) else value


def _changed_versions(document: Mapping[str, object]) -> dict[str, tuple[str | None, str | None]]:
    before, now = document.get("versions"), versions()
    was = {str(name): str(text) for name, text in before.items()} if isinstance(before, Mapping) else {}
    return {name: (was.get(name), now.get(name)) for name in sorted({*was, *now}) if was.get(name) != now.get(name)}


def _changed_inputs(request: _Request, how: Comparison) -> list[InputChange]:
    """Return the inputs that are missing, changed, or new."""
    before = {(str(each.get("option")), how.renamed(_path(each))): _hashes(each) for each in request.inputs}
    after = {(str(each.get("option")), _path(each)): _hashes(each) for each in inputs_of(request.settings)}
    changes = []
    for option, path in sorted({*before, *after}):
        first, second = before.get((option, path)), after.get((option, path))
        if first in ({}, second):  # an input without a hash may have changed; `verify` notes that
            continue
        text = "new" if first is None else "changed" if second else "missing"
        changes.append(InputChange(option=option, path=path, text=text))
    return changes


def _without_hash(request: _Request) -> list[str]:
    return [_path(each) for each in request.inputs if not _hashes(each)]


def _path(entry: Mapping[str, object]) -> str:
    return str(entry.get("path", entry.get("model")))


def _hashes(entry: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in entry.items() if name not in ("option", "path", "model")}


def _tolerance(settings: Settings, verified: VerifySettings) -> float:
    if verified.tolerance is not None:
        return verified.tolerance
    device = getattr(settings, "device", "cpu")
    if device == "cpu":
        return 0.0
    from ..models.devices import pick_device  # imports torch

    return 0.0 if pick_device(device).type == "cpu" else ON_GPU
