"""Options of publishing, of looking into adapters and models, and of the demo."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from ..errors import InvalidValueError
from .base import Placed, Settings, Written, refuse
from .fields import Device, Files, Positive, StorageDtype
from .registries import ENGINES, one_of
from .roles import ADAPTER, MODEL, OTHER, Argument, Flag, Panel, Reads, Role, Writes


class PushSettings(Settings):
    """Publish an output folder on the Hub."""

    folder: Annotated[str, Reads(ADAPTER, or_model=True), Argument("DIR")] = Field(
        description="output folder of adaptermix, or any PEFT adapter"
    )
    repo: Annotated[str, Argument("REPO")] = Field(description="repository, as owner/name")
    base_id: str | None = Field(None, description="base model on the Hub, OWNER/NAME[@REVISION]; needed if it is local")
    encoder_id: str | None = Field(
        None, description="encoder of a stack on the Hub, OWNER/NAME[@REVISION]; needed if it is local"
    )
    license: str | None = Field(
        None, description="licence as the Hub spells it, such as apache-2.0; default: one that all parents allow"
    )
    private: bool = Field(False, description="make the repository private; one that is public is refused")
    revision: str | None = Field(None, description="branch to push to")
    create_pr: bool = Field(False, description="open a pull request in an existing repository")
    tag: str | None = Field(None, description="tag for the commit, such as v1.0; it must be new")
    message: str = Field("Upload adapter", description="commit message")
    dry_run: Annotated[bool, Role.HANDLING] = Field(
        False, description="show the card and list the files; write nothing, no network"
    )


class ExportSettings(Written):
    """Write an adapter in the form that an inference engine reads, and prove that its deltas are the same."""

    folder: Annotated[str, Reads(ADAPTER), Argument("DIR")] = Field(description="adapter folder")
    engine: Annotated[str, one_of(ENGINES), Flag("--for")] = Field(description="inference engine")
    base: Annotated[str | None, Reads(MODEL)] = Field(
        None,
        description="base model, where it is not the one that the adapter names, and for adapters that start from base "
        "weights (PiSSA, OLoRA)",
    )
    dtype: StorageDtype = Field("float32", description="storage dtype of the factors")


class VerifySettings(Settings):
    """Rebuild an output from its manifest, and compare the two."""

    output: Annotated[str, Reads(OTHER), Argument("DIR")] = Field(
        description="output folder of adaptermix, or a file of `adaptermix statistics`"
    )
    inputs: bool = Field(False, description="only hash the inputs again, and name those that changed or are missing")
    tolerance: float | None = Field(
        None,
        ge=0,
        description="largest relative difference of a module's delta that counts as the same; default 0 (the same "
        "bytes) on a CPU, 0.001 on a GPU",
    )
    device: Annotated[Device | None, Role.MACHINE] = Field(
        None, description="where to rebuild: auto, cpu, cuda or cuda:N; default as in the request"
    )
    moved: Annotated[dict[str, str], Flag(metavar="OLD=NEW...")] = Field(
        {}, description="inputs that moved: the old path as in the request, or a folder of it, and the new one"
    )


class ReportSettings(Settings):
    """Write one HTML page on outputs: adapters and weights, data, scores with intervals, pictures."""

    folders: Annotated[Files, Reads(OTHER), Argument("DIR...")] = Field(
        description="output folders of adaptermix, folders of several, or files with a document of --json"
    )
    out: Annotated[str, Writes("out", is_main=True)] = Field("report.html", description="HTML file for the page")
    overwrite: Annotated[bool, Role.HANDLING] = Field(False, description="replace an existing page of this toolkit")


class InspectSettings(Settings):
    """Look into adapters: norms, ranks and shares per layer and module; how every two of them interfere."""

    adapters: Annotated[Files, Reads(ADAPTER), Argument("ADAPTER...")] = Field(
        description="adapter folders, or folders of stacks"
    )
    plot: Annotated[str | None, Writes("plot")] = Field(
        None, description="PNG file for heatmaps over layers and module kinds"
    )


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class SpectrumSettings(Settings):
    """Compare the singular values of models with those of a base, per layer and module: how far weights were scaled."""

    model_a: Annotated[str, Reads(MODEL), Argument("BASE")] = Field(
        description="the base: checkpoint or adapter, folder or Hub id[@REVISION]"
    )
    model_b: Annotated[Files, BeforeValidator(_listed), Reads(MODEL), Argument("MODEL...")] = Field(
        description="the other models, or adapters of the base"
    )
    layers: Annotated[list[str], Flag(metavar="N...")] = Field(
        [], description="blocks: numbers, ranges such as 8-11, or globs such as 'encoder.*'"
    )
    modules: Annotated[list[str], Flag(metavar="GLOB...")] = Field(
        [], description="globs over module paths or kinds; default all inside the blocks"
    )
    include: Annotated[list[str], Flag(metavar="GLOB...")] = Field(
        [], description="globs of modules to take besides, such as embeddings and heads"
    )
    exclude: Annotated[list[str], Flag(metavar="GLOB...")] = Field([], description="globs of modules to leave out")
    csv: Annotated[str | None, Writes("csv")] = Field(
        None, description="file for a table with one row per model and module"
    )
    table: Annotated[str | None, Writes("table")] = Field(
        None, description="file for the table of layers and models by K, Q, V, Out, FC1 and FC2: .md or .csv"
    )
    device: Annotated[Device, Role.MACHINE] = Field("auto", description="auto, cpu, cuda or cuda:N")


class RunSettings(Settings):
    """Run a recipe: a chain of commands from YAML."""

    recipe: Annotated[str, Reads(OTHER), Argument("RECIPE")] = Field(description="the YAML file")
    overrides: Annotated[dict[str, object], Argument("[KEY=VALUE...]")] = Field(
        {}, description="values of variables of the recipe, or of its settings as COMMAND.SETTING"
    )
    dry_run: Annotated[bool, Role.HANDLING] = Field(
        False, description="check the recipe and all data files that it reads, and show its steps; run nothing"
    )
    resume: Annotated[bool, Role.HANDLING] = Field(
        False, description="take existing outputs, and continue interrupted training"
    )


class RecipeSettings(Settings):
    """List the recipes of adaptermix, show one, copy one to start from, or print the JSON schema for editors."""

    action: Annotated[Literal["ls", "cat", "cp", "schema"], Argument("ls|cat|cp|schema")] = Field(
        description="ls: list; cat: print; cp: copy to a file; schema: print the JSON schema of recipes"
    )
    name: Annotated[str | None, Argument("[NAME]")] = Field(None, description="name of a recipe, for cat and cp")
    out: Annotated[str | None, Writes("recipe"), Argument("[FILE]")] = Field(
        None, description="new file, for cp, or a folder for it; default the present folder"
    )

    @model_validator(mode="after")
    def _check_action(self) -> RecipeSettings:
        refuse(
            (
                self.action in ("cat", "cp") and not self.name,
                f"recipe.no-name: {self.action} needs the NAME of a recipe; `adaptermix recipe ls` lists them",
            ),
            (
                self.action in ("ls", "schema") and bool(self.name),
                f"recipe.name: {self.action} takes no NAME: drop it",
            ),
            (self.action != "cp" and bool(self.out), "recipe.file: FILE is the copy that cp writes: drop it"),
        )
        return self


class TuneSettings(Settings):
    """Find settings of a recipe on dev data."""

    panel = Panel.SEARCH
    is_long: ClassVar[bool] = True

    recipe: Annotated[str, Reads(OTHER), Argument("RECIPE")] = Field(description="the YAML file")
    overrides: Annotated[dict[str, object], Argument("[KEY=VALUE...]")] = Field(
        {}, description="values that all candidates share, as for `run`"
    )
    vary: Annotated[dict[str, str], Field(min_length=1), Flag(metavar="KEY=V[,V...]|LOW:HIGH[:log]...")] = Field(
        description="values to try, such as train-align.temperature=0.05,0.1 train-align.layer=6,9; with --trials also "
        "ranges, train-align.temperature=0.02:2:log train-align.layer=6:12 (whole numbers where both ends are)"
    )
    trials: Annotated[Positive | None, Role.COMMON] = Field(
        None, description="candidates that a sampler proposes, each once, instead of all combinations"
    )
    sampler: Literal["auto", "random", "tpe", "cmaes", "gp"] = Field(
        "auto", description="sampler of candidates (optuna): gp for up to 8 ranges, else tpe, also with --prune"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the sampler")
    prune: Annotated[bool, Role.COMMON] = Field(
        False,
        description="stop candidates early whose training is behind the median of four or more earlier ones on dev "
        "data: the accuracy of train-align's dev_pairs, which no temperature changes, or the dev loss of the task; "
        "only training of equal layer, batch size and steps is compared",
    )
    out: Annotated[str, Writes(is_main=True), Panel.RUN] = Field(
        description="folder of all candidates; the same call continues where it stopped"
    )
    dry_run: Annotated[bool, Role.HANDLING, Role.COMMON] = Field(
        False, description="check every candidate and show them; run nothing"
    )


DemoTask = Literal["intents", "slots"]


class DemoInputsSettings(Settings):
    """Make what the demo needs: a small real base model and small parallel data."""

    out: Annotated[str, Writes(is_main=True)] = Field(
        description="folder for the data files, and for a link to the base model"
    )
    task: DemoTask = Field("intents", description="which demo: intents (multilingual-e5-small), slots (SmolLM2)")
    task_rows: Positive | None = Field(None, description="training rows per task language; default those of the demo")
    dev_rows: Positive | None = Field(None, description="dev rows per language; default those of the demo")
    test_rows: Positive | None = Field(None, description="test rows per language; default those of the demo")
    pairs: Positive | None = Field(None, description="pairs per alignment language; default those of the demo")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the draw")


class DemoSettings(Placed):
    """Run the main job on a small real model: train both adapters, find the weight, score every language."""

    out: Annotated[str, Writes(is_main=True)] = Field("demo-out", description="folder for everything the demo makes")
    task: DemoTask = Field(
        "intents", description="intents: sort commands, with multilingual-e5-small; slots: read them out, with SmolLM2"
    )
    base: Annotated[str | None, Reads(MODEL)] = Field(None, description="another base model")
    data: Annotated[str | None, Reads(OTHER)] = Field(
        None, description="folder with xsid/ and tatoeba/, for --task slots; default the demo's own data"
    )
    fresh: bool = Field(False, description="start again instead of continuing an earlier run")

    @model_validator(mode="after")
    def _check_data(self) -> DemoSettings:
        if self.data and self.task != "slots":
            raise InvalidValueError("--data is for --task slots: add it, or drop --data", code="demo.data-task")
        return self
