"""The kinds of output that a manifest can name, in the words of the model card.

This module does not import torch, since the records of the commands, which `adaptermix --help` reads, fill the table.
"""

from __future__ import annotations

KINDS: dict[str, str] = {}
"""Description of an output in its card, by the `kind` of its manifest: the name of the command that made it."""
