"""Layers of settings, from YAML files and `key=value` words, and what a reader is told where they do not fit.

The text of OmegaConf's errors speaks of its own types; most mistakes are therefore found before the merge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.base import Container
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from bench import registry
from bench.dotted import flatten
from bench.errors import UserError

USED = ("model", "data", "recipe", "eval")  # groups that start from a file
GROUPS = (*USED, "use", "budget", "trainer", "paths")

Layer = tuple[str, dict[str, Any]]  # (source, for the reader; values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a file. Raises: UserError if it is no YAML of `key: value` lines."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{path}: {_missing(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except (OmegaConfBaseException, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}.")
    return values  # type: ignore[return-value]


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as nested settings. Raises: UserError for a word that is none, or a key given twice."""
    for text in overrides:
        if "=" not in text[1:]:
            raise UserError(f"'{text}' is not an override. Write key=value, for example model.size=S/2.")
        key, _, value = text.partition("=")
        if "" in key.split("."):
            raise UserError(
                f"command line: '{key}' is not a setting, as a part of it is empty. Write single dots, such as "
                "model.size=S/2."
            )
        try:
            OmegaConf.to_container(OmegaConf.from_dotlist([text]), throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise UserError(f"command line: {_missing(error)}") from None
        except (yaml.YAMLError, OmegaConfBaseException):
            raise UserError(
                f"command line: {key} is {value}, which cannot be read. Close its brackets and quotes, as in [1, 2]."
            ) from None
    keys = [text.partition("=")[0] for text in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"command line: {key} is given {keys.count(key)} times. Give it once.")
    return OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))  # type: ignore[return-value]


def _missing(error: MissingMandatoryValue) -> str:
    return f"{error.full_key or error.key} is ???, which is no value. Give one, or leave the setting out."


def merge(node: Any, values: Any, source: str, prefix: str = "") -> Any:
    """`values` of `source` over a structured node; `prefix` is the dotted key of the node.

    Raises: UserError naming source and key of what does not fit.
    """
    _require_form(node, values, source, prefix)
    try:
        return OmegaConf.merge(node, values)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {_explain(error, prefix)}") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: {error}") from None


def _require_form(node: Any, values: Any, source: str, key: str) -> None:
    """Raises: UserError for an unknown setting, one value for a group of settings, or a list where there is none."""
    if node is None or key in ("seed", "tracking"):  # of any type here; their own checks follow
        return
    if values is None and node._is_optional() and key not in GROUPS:
        return
    shown = f"{source}: {key} is {'null' if values is None else repr(values)}"
    if OmegaConf.is_dict(node):
        _require_group(node, values, source, key, shown)
    elif isinstance(node, Container):
        _require_list(node, values, key, shown)
    elif values is None or isinstance(values, (dict, list)):
        such = "" if node._is_none() else f", such as {key}={_word(node._value())}"
        raise UserError(f"{shown}; give one value{such}.")


def _require_group(node: Any, values: Any, source: str, key: str, shown: str) -> None:
    """Settings by name, each of its own form."""
    group = OmegaConf.structured(node._metadata.ref_type) if node._is_none() else node  # eval.sampler may be null
    if not isinstance(values, dict):
        leaves = flatten(OmegaConf.to_container(group))
        first, value = next((leaf for leaf in leaves.items() if leaf[1] is not None), (next(iter(leaves)), "..."))
        named = f", or a file by use.{key}={values}" if isinstance(values, str) and key in USED else ""
        raise UserError(
            f"{shown}, but it is a group of settings. Give one, such as {key}.{first}={_word(value)}{named}."
        )
    for name, value in values.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in group:
            known = [str(own) for own in group]
            raise UserError(f"{source}: {path} is not a setting. {registry.nearest(str(name), known)}")
        _require_form(group._get_node(name), value, source, path)


def _require_list(node: Any, values: Any, key: str, shown: str) -> None:
    """A list of values, or as many numbers as a tuple of a fixed length has."""
    fixed = not OmegaConf.is_list(node) and ... not in get_args(node._metadata.ref_type)
    length = len([*node]) if fixed else None
    elements = values if isinstance(values, (list, tuple)) else [{}]
    wrong = (str, dict, list) if length else (dict, list)
    if length in (None, len(elements)) and not any(isinstance(element, wrong) for element in elements):
        return
    one = isinstance(values, (str, int, float)) and not length  # it may have been meant as the only element
    example = [values] if one or node._is_none() else [*node]
    raise UserError(
        f"{shown}; give a list of {f'{length} numbers' if length else 'values'}, such as {key}={_word(example)}."
    )


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _explain(error: OmegaConfBaseException, prefix: str) -> str:
    key = ".".join(part for part in (prefix, error.full_key or "") if part)
    text = (error.msg or str(error)).splitlines()[0].rstrip(".")
    return f"{key}: {text}." if key else f"{text}."


def origin_of(message: str, layers: Sequence[Layer], named: str = "") -> str:
    """The last source that sets the key a message starts with ('sampler.name ...'), for the reader to open.

    A budget that nobody sets is missing in the file that the user named.
    """
    key = message.split(maxsplit=1)[0]
    setting = [source for source, values in layers if any(f".{path}".endswith(f".{key}") for path in flatten(values))]
    return setting[-1] if setting else named if named and key == "budget" else layers[-1][0]
