"""Write what the API must know of the installed open_clip, which it must not load itself. Run this after an update of open_clip.

`cliprd_core/known_models.json`: models and pretrained tags, with our own model configs.
`cliprd_core/known_config_keys.json`: the keys of a model config's towers, each with the JSON kinds it may be and its default.
`cliprd_core/known_model_sizes.json`: how large each model is, but for those with a text tower of Hugging Face's, whose size its files
tell. To measure activations takes long (half a minute a model), so those that the file has are kept: delete it to measure all again.
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
SIZES_TARGET = ROOT / "cliprd_core" / "known_model_sizes.json"
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


def measurable_models() -> list[str]:
    """The known models whose size can be told without downloading anything."""
    import open_clip

    from cliprd_core.models import register_model_configs

    register_model_configs()
    return [name for name in known_models() if not open_clip.get_model_config(name)["text_cfg"].get("hf_model_name")]


def size_record(name: str, measured: dict[str, Any] | None) -> dict[str, Any]:
    """As `cliprd_core.model_size.ModelSize` reads it. Parameters are counted by torch; activations are those that arithmetic tells,
    or else the `measured` ones."""
    import open_clip

    from scripts.measure_models import count_parameters

    config = open_clip.get_model_config(name)
    size = config["vision_cfg"].get("image_size", 224)
    return {
        "embed_dim": config["embed_dim"],
        "image_size": size[0] if isinstance(size, list) else size,
        "parameters": count_parameters(config),
        "activations": _told_activations(config) or measured,
    }


def measured_activations(name: str) -> dict[str, dict[str, dict[str, int]]]:
    """By precision and tower, bytes of one more image or caption."""
    import open_clip
    import torch

    from scripts.measure_models import measure_activations

    fp32, bf16 = measure_activations(open_clip.get_model_config(name), (None, torch.bfloat16))
    return {"fp32": fp32, "bf16": bf16}


def _told_activations(config: dict[str, Any]) -> dict[str, dict[str, dict[str, int]]] | None:
    """The same by arithmetic, where that covers the config."""
    from cliprd_core.model_size import UnknownSizeError, size_of_config

    try:
        size = size_of_config(config)
    except UnknownSizeError:
        return None
    towers = {"image": size.image, "text": size.text}
    return {
        precision: {name: dataclasses.asdict(getattr(tower, precision)) for name, tower in towers.items()} for precision in ("fp32", "bf16")
    }


def render_sizes(sizes: dict[str, dict[str, Any]]) -> str:
    """One model a line, as `render`."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(size)}" for name, size in sizes.items())
    return f"{{\n{lines}\n}}\n"


def write_sizes() -> None:
    """Count all models, and measure those whose activations the file lacks, or has as null; it may be interrupted at any time."""
    known = json.loads(SIZES_TARGET.read_text()) if SIZES_TARGET.exists() else {}
    sizes = {name: size_record(name, known.get(name, {}).get("activations")) for name in measurable_models()}
    for name, size in sizes.items():
        if size["activations"] is None:
            size["activations"] = measured_activations(name)
        SIZES_TARGET.write_text(render_sizes(sizes))


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
    write_sizes()
