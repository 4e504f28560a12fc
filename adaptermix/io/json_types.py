"""Types of JSON documents."""

from __future__ import annotations

JsonValue = object
"""A value of a JSON document: checked where it is read."""

JsonObject = dict[str, JsonValue]
"""A JSON object."""
