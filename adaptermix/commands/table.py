"""The commands, one record each: the command line, recipes and the Python functions are made from these.

To add a command: a class of options in `adaptermix.options`, a function of these options that returns a report with
`document()`, a record here, and a function in `adaptermix.cli` that shows the report. Records name classes and
functions by text, so that `adaptermix --help` does not import them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..provenance.kinds import KINDS
from .record import CONTINUES, WITH_RESUME, Command

if TYPE_CHECKING:
    # The types of the commands as Python functions, which `function_of` makes from the records below.
    from .. import analysis, baking, evaluation, merge_statistics, options, weight_search
    from ..merging.extract_report import ExtractReport
    from ..publish.export_report import ExportReport
    from ..publish.hub import PushReport
    from ..training.report import TrainReport
    from .page_report import PageReport
    from .signature import typed
    from .verification import Verification

    bake = typed(options.BakeSettings, baking.BakeReport)
    compare_systems = typed(options.CompareSettings, evaluation.Systems)
    evaluate = typed(options.EvaluateSettings, evaluation.Evaluation)
    export = typed(options.ExportSettings, ExportReport)
    extract = typed(options.ExtractSettings, ExtractReport)
    inspect = typed(options.InspectSettings, analysis.Inspection)
    predict = typed(options.PredictSettings, evaluation.Prediction)
    push = typed(options.PushSettings, PushReport)
    report = typed(options.ReportSettings, PageReport)
    retrieve = typed(options.RetrieveSettings, evaluation.Retrieval)
    search = typed(options.SearchSettings, weight_search.SearchResult)
    spectrum = typed(options.SpectrumSettings, analysis.SpectrumReport)
    statistics = typed(options.StatisticsSettings, merge_statistics.StatisticsReport)
    train_align = typed(options.AlignSettings, TrainReport)
    train_fusion = typed(options.FusionSettings, TrainReport)
    train_joint = typed(options.JointSettings, TrainReport)
    train_stack = typed(options.StackSettings, TrainReport)
    train_task = typed(options.TaskSettings, TrainReport)
    verify = typed(options.VerifySettings, Verification)

_ALL = (
    Command(
        name="train-align",
        summary="Train a stand-alone alignment LoRA at a middle layer.",
        options="AlignSettings",
        makes="an alignment LoRA: it draws translations together in a middle layer",
        function="train_align",
        run="training.least_squares:train_align",
        show="show_training:show_align",
        in_processes=True,
        notes="Example: adaptermix train-align --base MODEL --pairs de-en.tsv tr-en.tsv --out align",
        after_interrupt=WITH_RESUME,
    ),
    Command(
        name="train-task",
        summary="Train a task LoRA.",
        options="TaskSettings",
        makes="a task LoRA",
        function="train_task",
        run="training.task:train_task",
        show="show_training:show",
        in_processes=True,
        notes="Example: adaptermix train-task --base MODEL --task slots --train en.train.tsv --out task",
        after_interrupt=WITH_RESUME,
    ),
    Command(
        name="train-joint",
        summary="Train one LoRA for a task and for alignment.",
        options="JointSettings",
        makes="a LoRA trained for a task and for alignment",
        function="train_joint",
        run="training.joint:train_joint",
        show="show_training:show",
        in_processes=True,
        notes="Example: adaptermix train-joint --base MODEL --task slots --train en.train.tsv --pairs de-en.tsv "
        "--out joint",
        after_interrupt=WITH_RESUME,
    ),
    Command(
        name="train-fusion",
        summary="Train a LoRA that fuses each text with its source.",
        options="FusionSettings",
        makes="a LoRA that fuses each text with its source in another language",
        function="train_fusion",
        run="training.fusion:train_fusion",
        show="show_training:show",
        in_processes=True,
        notes="Example: adaptermix train-fusion --base MODEL --task classify --train jv.csv --source en.csv "
        "--out fused",
        after_interrupt=WITH_RESUME,
    ),
    Command(
        name="train-stack",
        summary="Put a multilingual encoder under a model, or teach such a stack a task.",
        options="StackSettings",
        function="train_stack",
        run="training.stack:train_stack",
        show="show_training:show",
        in_processes=True,
        makes="an encoder under a model (a stack)",
        notes="Example: adaptermix train-stack --encoder ENCODER --base MODEL --texts en.txt --out stack\n\n"
        "Example: adaptermix train-stack --base stack --teacher teacher --task nli --train en.tsv --out s2\n\n"
        "Example: adaptermix train-stack --encoder ENCODER --base MODEL --mode replace --task translate "
        "--train de-en.tsv --out stack",
        after_interrupt=WITH_RESUME,
    ),
    Command(
        name="merge",
        summary="Merge adapters: files in, one adapter out, no base model.",
        options="MergeSettings",
        makes="a weighted merge of LoRA adapters",
        run="merging.request:merge_with_settings",
        show="show_adapters:show_merge",
        hidden=("places",),
        notes="Example: adaptermix merge task align --weights 0.9 --out merged   (0.9 of the first, 0.1 of the second)",
    ),
    Command(
        name="bake",
        summary="Write adapters into their base model, in 16, 8 or 4 bits.",
        options="BakeSettings",
        function="bake",
        run="baking:bake",
        show="show_bake:show",
        notes="Example: adaptermix bake --base MODEL --adapter task --out merged   (one rounding, in the base's "
        "dtype)\n\nExample: adaptermix bake --base MODEL --adapter task --quantize nf4 --calibration texts.txt "
        "--out merged-nf4",
        after_interrupt="The same command continues a calibrated bake; other bakes start again from the beginning.",
    ),
    Command(
        name="methods",
        summary="List the merge methods with their options.",
        options="MethodsSettings",
        show="show_adapters:list_methods",
        in_recipes=False,
        notes="Example: adaptermix methods ties   (the formula, the options, the paper)",
    ),
    Command(
        name="extract",
        summary="Turn the difference between two checkpoints into a LoRA.",
        options="ExtractSettings",
        makes="the difference between a tuned model and its base, as a LoRA",
        function="extract",
        run="merging.extract_adapter:extract",
        takes_fields=True,
        show="show_adapters:show_extract",
        notes="Embeddings and heads are left out unless a glob names them; their share of the difference is shown.\n\n"
        "Example: adaptermix extract --base BASE --tuned TUNED --rank 64 --out adapter",
    ),
    Command(
        name="statistics",
        summary="Measure an adapter on data, for the merge methods fisher and regmean.",
        options="StatisticsSettings",
        function="statistics",
        run="merge_statistics:statistics",
        show="show_adapters:show_statistics",
        notes="One file for each adapter, for `merge --method regmean` or `fisher`.\n\n"
        "Example: adaptermix statistics task --base MODEL --data texts.txt --out task.safetensors\n\n"
        "Example: adaptermix statistics task --base MODEL --task classify --data en.csv --method fisher --out "
        "task.safetensors",
    ),
    Command(
        name="search",
        summary="Find the merge weight of two adapters on dev data, or on pairs.",
        options="SearchSettings",
        makes="a weighted merge of LoRA adapters, its weights chosen on a dev set",
        function="search",
        run="weight_search:search",
        plan="weight_search:search_dry",
        show="show_search:show",
        notes="Example: adaptermix search task align --base MODEL --task slots --dev de.valid.conll nl.valid.conll "
        "--out merged\n\nExample: adaptermix search task align style --base MODEL --task slots "
        "--dev de.valid.conll --trials 40 --space free --groups 3 --out merged\n\nExample, without labels: adaptermix "
        "search task align --base MODEL --task classify --objective agreement --pairs de-en.tsv nl-en.tsv --grid "
        "0.25,0.5,0.75,1 --space both --out merged\n\nFor settings of training see 'adaptermix tune --help'.",
        after_interrupt=CONTINUES,
    ),
    Command(
        name="tune",
        summary="Find settings of training on dev data: a search over a recipe.",
        options="TuneSettings",
        show="show_search:tune",
        in_recipes=False,
        notes="The recipe is run for every combination of values, or for --trials of them; its last step, search, "
        "evaluate or retrieve, gives the score, and steps that candidates share are run once. The same call continues "
        "where it stopped. `adaptermix search RECIPE` does the same.\n\nExample: adaptermix tune recipe.yaml "
        "base=MODEL --vary train-align.temperature=0.05,0.1 train-align.layer=6,9 --out tuned\n\nExample: adaptermix "
        "tune recipe.yaml base=MODEL --vary train-align.temperature=0.02:2:log train-align.layer=6:12 "
        "train-align.rank=8,16,32 --trials 24 --prune --out tuned",
        after_interrupt=CONTINUES,
    ),
    Command(
        name="evaluate",
        summary="Score a base model or an adapter per language.",
        options="EvaluateSettings",
        function="evaluate",
        run="evaluation:evaluate",
        show="show_scores:show_evaluation",
        notes="Example: adaptermix evaluate --base MODEL --adapter task --task slots --data de.test.conll "
        "nl.test.conll",
    ),
    Command(
        name="predict",
        summary="Show the answers of adapters to your own texts, side by side.",
        options="PredictSettings",
        function="predict",
        run="evaluation.predict:predict",
        show="show_scores:show_prediction",
        in_recipes=False,
        notes="Example: adaptermix predict 'wake me at six' 'is it cold' --base MODEL --adapter task merged",
    ),
    Command(
        name="compare",
        summary="Put systems side by side: scores, differences, share of a gap closed.",
        options="CompareSettings",
        function="compare_systems",
        run="evaluation:compare_systems",
        show="show_scores:show_comparison",
        notes="Example: adaptermix compare 'task=runs/*/task.jsonl' 'joint=runs/*/joint.jsonl' "
        "'merged=runs/*/merged.jsonl' --task slots --data de.test.conll nl.test.conll --baseline task --ceiling joint",
    ),
    Command(
        name="retrieve",
        summary="Measure translation retrieval per layer and direction.",
        options="RetrieveSettings",
        function="retrieve",
        run="evaluation:retrieve",
        show="show_scores:show_retrieval",
        notes="Example: adaptermix retrieve --base MODEL --adapter align --data deu-eng.tsv --rows 500:",
    ),
    Command(
        name="inspect",
        summary="Show the contents of adapters, and how they interfere.",
        options="InspectSettings",
        function="inspect",
        run="analysis:inspect",
        takes_fields=True,
        show="show_analysis:show_inspection",
        notes="Adapters are named after their folders; a second 'task' becomes 'task#2'.\n\n"
        "Overlap is the mean squared cosine of the principal angles between the subspaces of two deltas: left where "
        "they write (columns of B), right what they read (rows of A). Sign conflicts are counted on at most 16,384 "
        "entries drawn over each module; independent adapters have 50%.\n\n"
        "Example: adaptermix inspect task align --plot interference.png",
    ),
    Command(
        name="spectrum",
        summary="Compare singular values of models with a base, per layer and module.",
        options="SpectrumSettings",
        function="spectrum",
        run="analysis:spectrum",
        takes_fields=True,
        show="show_analysis:show_spectrum",
        notes="With one MODEL, cells are 'norm of the singular values of the base -> of the model (distance d)'; "
        "several make one table in the form of the MT continued-pretraining paper. With an adapter as MODEL the base "
        "is compared with base and adapter together; if all are adapters, their deltas are compared.\n\n"
        "Singular values are computed in float64, by an SVD up to a shorter side of 1024, beyond that from the Gram "
        "matrix.\n\n"
        "Give the models before the options that take several values.\n\n"
        "Example: adaptermix spectrum BASE TUNED --layers 0-11 --modules q_proj k_proj --csv scaling.csv\n\n"
        "Example: adaptermix spectrum mbart-large-50 mbart-m2m mbart-m2o --layers 'encoder.*' --table scaling.md",
    ),
    Command(
        name="report",
        summary="Write an HTML page on one run, or on several side by side.",
        options="ReportSettings",
        function="report",
        run="commands.report:report",
        show="show_analysis:show_report",
        in_recipes=False,
        notes="A folder is an output of a command, or holds several. Files with a document of --json, such as those of "
        "`evaluate` and `inspect`, are read too. The page needs no network.\n\n"
        "Example: adaptermix report merged searched task.json --out report.html",
    ),
    Command(
        name="export",
        summary="Write an adapter for vLLM, SGLang, TensorRT-LLM, llama.cpp or MLX.",
        options="ExportSettings",
        makes="a LoRA adapter in the form of an inference engine",
        function="export",
        run="publish.export:export",
        show="show_adapters:show_export",
        notes="Every module gets one rank and scale 1, since these engines ignore rank_pattern and alpha_pattern. An "
        "adapter with parts that the engine cannot serve is refused; see docs/serving.md.\n\n"
        "Example: adaptermix export merged --for vllm --out merged-vllm",
    ),
    Command(
        name="verify",
        summary="Rebuild an output from its manifest, and compare.",
        options="VerifySettings",
        function="verify",
        run="commands.verify:verify",
        show="show_verify:show",
        in_recipes=False,
        notes="The manifest records the command, its options, and hashes of its inputs. The output is rebuilt in a "
        "temporary folder (TMPDIR). Exit code 0: the same; 1: different, or not to be rebuilt.\n\n"
        "Example: adaptermix verify merged\n\n"
        "Example: adaptermix verify merged --inputs   (only hash the inputs)",
    ),
    Command(
        name="push",
        summary="Publish an adapter with its model card.",
        options="PushSettings",
        function="push",
        run="publish.hub:push",
        show="show_adapters:show_push",
        notes="Example: adaptermix push merged me/slots-merged --dry-run",
    ),
    Command(
        name="run",
        summary="Run a recipe: a chain of commands from YAML.",
        options="RunSettings",
        show="run_recipes:run",
        in_recipes=False,
        in_processes=True,
        notes="KEY is a variable of the recipe, or COMMAND.SETTING.\n\n"
        "Example: adaptermix run recipes/quickstart.yaml out=my-run train-align.temperature=0.2",
        after_interrupt=WITH_RESUME,
    ),
    Command(
        name="recipe",
        summary="List, show or copy the recipes of adaptermix.",
        options="RecipeSettings",
        show="show_recipes:recipe",
        in_recipes=False,
        notes="Example: adaptermix recipe ls\n\nExample: adaptermix recipe cp quickstart my.yaml",
    ),
    Command(
        name="demo",
        summary="Train, merge, search and test on a small real model, in minutes.",
        options="DemoSettings",
        run="demo.run:run_demo",
        show="show_demo:show",
        in_recipes=False,
        notes="Example: adaptermix demo --out demo-out   (the same command continues after Ctrl-C)",
        after_interrupt=CONTINUES,
    ),
    Command(
        name="demo-inputs",
        summary="Make what the demo needs: a small real base model and small parallel data.",
        options="DemoInputsSettings",
        run="demo.inputs:demo_inputs",
        show=None,
    ),
)
COMMANDS = {command.name: command for command in _ALL}
"""All commands by name, in the order of `adaptermix --help`."""
KINDS.update({command.name: command.makes for command in _ALL if command.makes})
