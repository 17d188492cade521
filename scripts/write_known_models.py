"""Write what the API must know of the installed open_clip, which it must not load itself. Run this after an update of open_clip.

`cliprd_core/known_models.json`: models and pretrained tags, with our own model configs.
`cliprd_core/known_config_keys.json`: the keys of a model config's towers, each with the JSON kinds it may be and its default.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "cliprd_core" / "known_models.json"
KEYS_TARGET = ROOT / "cliprd_core" / "known_config_keys.json"
_KINDS = {int: "integer", float: "number", str: "string", bool: "boolean", dict: "object", tuple: "list", type(None): "null"}


def known_models() -> dict[str, list[str]]:
    """Model names with their sorted tags, sorted by name."""
    import open_clip

    own = [path.stem for path in (ROOT / "cliprd_core" / "model_configs").glob("*.json")]
    names = {*open_clip.list_models(), *own}
    return {name: sorted(open_clip.list_pretrained_tags_by_model(name)) for name in sorted(names)}


def render(models: dict[str, list[str]]) -> str:
    """One model a line, so that a change is easy to read."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(tags)}" for name, tags in models.items())
    return f"{{\n{lines}\n}}\n"


def known_config_keys() -> dict[str, dict[str, Any]]:
    """Of each tower, its keys as `{"kinds": [...], "default": ...}`."""
    import open_clip

    return {"vision_cfg": _keys_of(open_clip.CLIPVisionCfg), "text_cfg": _keys_of(open_clip.CLIPTextCfg)}


def _keys_of(config: type[Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {
        field.name: {
            "kinds": sorted({*_kinds_of(hints[field.name]), *(["null"] if field.default is None else [])}),
            "default": None if field.default is dataclasses.MISSING else field.default,
        }
        for field in dataclasses.fields(config)
    }


def _kinds_of(annotation: Any) -> set[str]:
    if typing.get_origin(annotation) is typing.Union:
        return {kind for member in typing.get_args(annotation) for kind in _kinds_of(member)}
    kind = _KINDS[typing.get_origin(annotation) or annotation]
    return {kind, "null"} if kind == "string" else {kind}  # open_clip's own configs write null where it declares a string


def render_keys(towers: dict[str, dict[str, Any]]) -> str:
    """One key a line, as `render`."""
    blocks = [
        f"  {json.dumps(tower)}: {{\n" + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in keys.items()) + "\n  }"
        for tower, keys in towers.items()
    ]
    return "{\n" + ",\n".join(blocks) + "\n}\n"


if __name__ == "__main__":
    TARGET.write_text(render(known_models()))
    KEYS_TARGET.write_text(render_keys(known_config_keys()))
