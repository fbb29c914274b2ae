"""Nested settings by dotted key: {"model": {"size": "S/2"}} is {"model.size": "S/2"}."""

from __future__ import annotations

from typing import Any

Flat = dict[str, Any]  # dotted key -> value


def flatten(values: Any, prefix: str = "") -> Flat:
    """The leaves of nested mappings, by dotted key; an empty mapping is none."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        path: leaf
        for key, value in values.items()
        for path, leaf in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def nest(flat: Flat) -> dict[str, Any]:
    """The inverse of `flatten`."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *above, key = path.split(".")
        node = nested
        for part in above:
            node = node.setdefault(part, {})
        node[key] = value
    return nested
