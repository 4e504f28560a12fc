"""The model card, generated from the manifest only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..algebra import sign_conflict_by_chance
from ..io.markup import as_code, as_markdown, markdown_table
from ..provenance.kinds import KINDS
from ..provenance.manifest import START, Manifest
from .header import header, is_full
from .private import hub_id, last_part, without_paths
from .usage import use

__all__ = ["card", "hub_id"]


def _parent(entry: Mapping[str, object]) -> str:
    """Return the name of an input: the id with the revision of an input from the Hub."""
    path, revision = str(entry.get("path") or ""), entry.get("revision")
    if "@" in path or (entry.get("kind") == "checkpoint" and "/" in path and hub_id(path)):
        return f"{path}@{revision}" if revision else path
    return str(entry["name"])


def _inputs(document: Manifest) -> str:
    rows = [
        [_parent(entry), f"{entry['weight']:g}", as_code(entry["weights_sha256"][:12])]
        for entry in document.get("inputs", ())
        if entry.get("use") != START
    ]
    mean = bool(document.get("plan", {}).get("places"))
    title = "weight, mean over the places of the settings below" if mean else "weight"
    return "## Made from\n\n" + markdown_table(["adapter", title, "sha256"], rows).rstrip() if rows else ""


def _started_from(document: Manifest) -> str:
    names = [
        f"{as_code(entry['name'])} (sha256 {as_code(entry['weights_sha256'][:12])})"
        for entry in document.get("inputs", ())
        if entry.get("use") == START
    ]
    return f"Training started from the adapter {', '.join(names)}." if names else ""


def _fidelity(document: Manifest) -> str:
    fidelity = document.get("fidelity")
    if not fidelity:
        return ""
    if "kept" in fidelity:
        rest = ""
        if fidelity.get("kept_rest") is not None:
            rest = (
                f" Without the first token of each text: kept {fidelity['kept_rest']:.3f}, error "
                f"{fidelity['error_rest']:.3f}."
            )
        return (
            f"## Fidelity\n\nKept {fidelity['kept']:.3f} of the adapter's effect on outputs, error "
            f"{fidelity['error']:.3f} of it, measured on {as_markdown(fidelity['measured_on'])}, mean over "
            f"modules.{rest} Per module: `adaptermix.json`."
        )
    acting = sum(bool(entry.get("weight", 1)) for entry in document.get("inputs", ()))
    more = {
        "sign_conflict": f"mean share of sign conflicts {{:.1%}} ({sign_conflict_by_chance(acting):.0%} is chance)",
        "left_out_share": "share of the whole difference that is left out {:.2%}",
    }
    parts = [
        f"Norm of the {'merged ' if 'sign_conflict' in fidelity else ''}delta {fidelity['norm']:.4g}",
        f"lost to truncation{' and rounding' if fidelity.get('rounding') else ''} {fidelity['residual']:.2%} of it",
        *(text.format(fidelity[key]) for key, text in more.items() if key in fidelity),
    ]
    return f"## Fidelity\n\n{'; '.join(parts)}. Per module: `adaptermix.json`."


def _scores(document: Manifest) -> str:
    scores = document.get("scores")
    if not scores:
        return ""
    rows = [
        [name, f"{score['value']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}", str(score["n"])]
        for name, score in scores["scores"].items()
    ]
    task, metric, split = map(as_markdown, (scores["task"], scores["metric"], scores.get("split", "dev")))
    return (
        f"## Scores\n\n{task}, {metric} on {split}\n\n"
        + markdown_table(["language", "value", "95 % interval", "rows"], rows).rstrip()
    )


def _languages(document: Manifest) -> str:
    parts = []
    for role, names in document.get("languages", {}).items():
        if role == "supervised":
            parts.append(f"trained on the task in {', '.join(map(as_markdown, names))}")
        elif role == "aligned":
            parts.append(_aligned([str(name) for name in names], document))
        else:
            parts.append(f"{as_markdown(role)}: {', '.join(map(as_markdown, names))}")
    return f"Languages: {'; '.join(parts)}." if parts else ""


def _aligned(names: list[str], document: Manifest) -> str:
    """Return which languages were aligned with which, according to the training files."""
    files = [entry.get("languages") for entry in document.get("data", ()) if isinstance(entry, Mapping)]
    pairs = sorted(
        {tuple(pair) for pair in files if isinstance(pair, list) and len(pair) == 2 and set(pair) <= {*names}}
    )
    if not pairs or {name for pair in pairs for name in pair} != set(names):
        return f"aligned in {', '.join(map(as_markdown, names))}"
    if all("en" in pair for pair in pairs):
        return f"aligned with English in {', '.join(as_markdown(name) for name in names if name != 'en')}"
    return f"aligned in the pairs {', '.join(as_markdown('-'.join(pair)) for pair in pairs)}"


def _tested(document: Manifest) -> str:
    names = ", ".join(sorted({as_code(entry["name"]) for entry in document.get("tested", ())}))
    return f"Trained or chosen on data that were evaluated as test before: {names}." if names else ""


def card(
    document: Manifest,
    *,
    name: str,
    reference: str | None = None,
    base: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Return the README of an output adapter.

    Args:
        document: Its manifest.
        name: Title.
        reference: Location to load the adapter from; default the title.
        base: Id of the base model on the Hub; default the manifest's, unless that is a local folder.
        pictures: Names of pictures next to the card.
    """
    named = document.get("base", {}).get("id")
    base = base or hub_id(named)
    which = f"the base model {as_code(base)}" if base else "a base model that is not named here"
    if named and not base:
        which = f"a base model in the local folder {as_code(last_part(str(named)))}"
    what = KINDS.get(str(document.get("kind")), "a LoRA adapter")
    if (document.get("scores") or {}).get("split") == "pairs":
        what = what.replace("a dev set", "translation pairs without labels")
    if is_full(document):
        what = (
            "a full model that an adapter was written into"
            if document["kind"] == "bake"
            else "a full model that was merged"
        )
    if document.get("artifact") == "stack":
        what = "an encoder under a model (a stack)"
    if document.get("artifact") == "delta":
        what = "a merged delta as full matrices, to be added to the weights; it is not a PEFT adapter"
    settings = without_paths(document.get("plan", {}))
    plan = f"## Settings\n\n```json\n{json.dumps(settings, indent=2, default=str)}\n```" if settings else ""
    packages = ", ".join(
        f"{as_markdown(package)} {as_markdown(number)}" for package, number in document.get("versions", {}).items()
    )
    made = f" Made with adaptermix ({packages})." if packages else ""
    sections = [
        f"---\n{header(document, name=name, base=base)}---",
        f"# {as_markdown(name)}",
        f"This is {what}, for {which}.{made}",
        _started_from(document),
        _languages(document),
        _tested(document),
        use(document, base=base, reference=reference or name, folder=reference is None),
        _inputs(document),
        _fidelity(document),
        _scores(document),
        "\n".join(f"![{as_markdown(picture.removesuffix('.png'))}]({picture})" for picture in pictures),
        plan,
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
