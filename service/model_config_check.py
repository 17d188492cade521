"""What can be known of an open_clip model config without building the model: its towers' keys, their kinds, and sizes that fit each other.

`cliprd_core/known_config_keys.json` holds the keys; `scripts/write_known_models.py` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from service.problems import FieldProblem, closest

_POSITIVE = frozenset({"layers", "width", "head_width", "patch_size", "image_size", "context_length", "vocab_size", "heads"})
_KINDS: dict[str, Any] = {"integer": int, "number": int | float, "string": str, "boolean": bool, "object": dict, "list": list}


def model_config_problems(field: str, config: dict[str, Any]) -> list[FieldProblem]:
    """Keys that open_clip's towers don't have, values of the wrong kind, and sizes that no model can have."""
    problems: list[FieldProblem] = []
    for tower, known in _config_keys().items():
        given: dict[str, Any] = config[tower]
        found = [
            FieldProblem(field=f"{field}.{tower}.{key}", problem=problem, remedy=remedy)
            for key, value in given.items()
            for problem, remedy in _key_problems(key, value, known)
        ]
        problems += found or _head_problems(f"{field}.{tower}", given, known)
    return problems


@cache
def _config_keys() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(files("cliprd_core").joinpath("known_config_keys.json").read_text())
    return loaded


def _key_problems(key: str, value: Any, known: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if key not in known:
        near = closest(key, known, count=1)
        yield "there is no such field", f"Did you mean `{near[0]}`? Otherwise remove it." if near else "Remove it."
        return
    if key == "patch_size" and value is None:
        return  # as open_clip's own ResNet configs have it
    kinds = known[key]["kinds"]
    if not any(_is_kind(value, kind) for kind in kinds):
        yield "is of the wrong type", f"Its type is: {' or '.join(kinds)}."
        return
    sizes = value if isinstance(value, list) else [value]
    if key == "image_size" and isinstance(value, list) and len(value) != 2:
        yield f"is a list of {len(value)}, but an image has a height and a width", "Give [HEIGHT, WIDTH], or one number for a square image."
    elif key == "layers" and isinstance(value, list) and len(value) != 4:
        yield f"is a list of {len(value)}, but a ResNet has four stages", "Give the blocks of all four, or one number for a transformer."
    elif key in _POSITIVE and not all(_is_kind(size, "integer") and size > 0 for size in sizes):
        yield "must be above 0", "Use whole numbers of 1 or more."


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return value is None if kind == "null" else isinstance(value, _KINDS[kind])


def _head_problems(field: str, given: dict[str, Any], known: dict[str, Any]) -> list[FieldProblem]:
    """A transformer's heads share its width evenly; ResNets and towers of timm and Hugging Face have rules of their own."""
    values = {key: given.get(key, about["default"]) for key, about in known.items()}
    divisor = "head_width" if "head_width" in known else "heads"
    is_other = values.get("timm_model_name") or values.get("hf_model_name") or isinstance(values["layers"], list)
    if is_other or divisor not in given or values["width"] % values[divisor] == 0:
        return []
    problem = f"is {values['width']}, which is no multiple of `{divisor}` ({values[divisor]})"
    return [FieldProblem(field=f"{field}.width", problem=problem, remedy=f"Change `width` or `{divisor}`.")]
