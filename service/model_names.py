"""Which models and pretrained weights open_clip knows, without loading it.

`cliprd_core/known_models.json` holds them, as `{model: [tag, …]}`; `scripts/write_known_models.py` writes it.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

from service.data_files import is_file
from service.problems import FieldProblem, closest

LOCAL_DIR_PREFIX = "local-dir:"
CHECKPOINT_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".safetensors"})


@cache
def known_models() -> dict[str, list[str]]:
    """Every model name, with the tags of its pretrained weights."""
    loaded: dict[str, list[str]] = json.loads(files("cliprd_core").joinpath("known_models.json").read_text())
    return loaded


def is_checkpoint_file(pretrained: str, data_root: Path) -> bool:
    """Whether `pretrained` means a file, not a tag: by its separator, its suffix, or because there is such a file."""
    path = Path(pretrained)
    return "/" in pretrained or path.suffix.lower() in CHECKPOINT_SUFFIXES or is_file(data_root / path)


def check_model_name(field: str, model: str) -> list[FieldProblem]:
    """Whether open_clip knows the model; as open_clip itself does, a `/` in a name is read as `-`."""
    if _plain(model) in known_models():
        return []
    near = closest(_plain(model), known_models())
    hint = f"Did you mean {_listed(near)}? " if near else ""
    remedy = f"{hint}A model of your own is given as `config`, or as `local-dir:PATH`."
    return [FieldProblem(field=field, problem=f"open_clip knows no model `{model}`", remedy=remedy)]


def check_pretrained_tag(field: str, model: str, tag: str) -> list[FieldProblem]:
    """Whether open_clip has these weights for a model that it knows; it compares tags without regard to case and to `-` or `_`."""
    tags = known_models()[_plain(model)]
    if tag.lower().replace("-", "_") in {one.lower().replace("-", "_") for one in tags}:
        return []
    near = closest(tag, tags) or tags[:5]
    hint = f"Use one of {_listed(near)}" if near else "There are no weights to download for this model"
    remedy = f"{hint}, or the path of a checkpoint file."
    return [FieldProblem(field=field, problem=f"open_clip has no weights `{tag}` for {_plain(model)}", remedy=remedy)]


def is_known(model: str) -> bool:
    """Whether open_clip knows a model of this name."""
    return _plain(model) in known_models()


def _plain(model: str) -> str:
    return model.replace("/", "-")


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
