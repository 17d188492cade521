"""Write cliprd_core/known_models.json: the models and pretrained tags of the installed open_clip, and our own model configs.

The API checks specs against it, since it must not load open_clip itself. Run this after an update of open_clip.
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "cliprd_core" / "known_models.json"


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


if __name__ == "__main__":
    TARGET.write_text(render(known_models()))
