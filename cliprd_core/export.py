"""What a user takes away: the trained student in open_clip's `local-dir:` layout, loadable without this project.

`open_clip.create_model_and_transforms("local-dir:PATH")` and `open_clip.get_tokenizer("local-dir:PATH")` give the model, its
preprocessing and its tokenizer. Only the student is exported; the objective's scales and projections served training alone.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from cliprd_core.hashes import file_sha256
from cliprd_core.models import CONFIG_FILE, WEIGHTS_FILE, LoadedModel
from cliprd_core.run_dir import sync_directory


def export_model(loaded: LoadedModel, folder: Path) -> dict[str, str]:
    """Write the model into `folder`, replacing what is there once the new files are whole; returns the names of the files with their
    SHA-256, in hexadecimal.

    Weights are written bit for bit, in the type they have. A Hugging Face tokenizer's files go beside them, since open_clip looks
    for them in the folder.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / CONFIG_FILE).write_text(json.dumps(_config_content(loaded), indent=2) + "\n", encoding="utf-8")
    tensors = {name: value.detach().cpu().contiguous() for name, value in loaded.model.state_dict().items()}
    save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
    if loaded.config["text_cfg"].get("hf_tokenizer_name"):
        loaded.tokenizer.save_pretrained(str(temporary))  # type: ignore[attr-defined]  # open_clip's HFTokenizer
    hashes: dict[str, str] = {}
    for path in sorted(temporary.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        hashes[path.name] = file_sha256(path)
    sync_directory(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    sync_directory(folder.parent)
    return hashes


def _config_content(loaded: LoadedModel) -> dict[str, Any]:
    preprocess = loaded.preprocess
    return {
        "model_cfg": loaded.config,
        "preprocess_cfg": {
            "size": preprocess.image_size,
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": preprocess.interpolation,
            "resize_mode": preprocess.resize_mode,
        },
    }
