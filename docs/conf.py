"""Settings of the documentation site; `scripts/docs` builds it."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

project = "adaptermix"
extensions = ["myst_parser"]
html_theme = "furo"
exclude_patterns = ["build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_static_path: list[str] = []
html_title = "adaptermix"


def link_to_repository(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Turn links to files outside of docs/ into plain names, since the site does not have these files."""
    source[0] = re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:recipes|scripts|benchmarks|tests)/[^)]*\)", r"\1", source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the events."""
    app.connect("source-read", link_to_repository)
    return {"parallel_read_safe": True}
