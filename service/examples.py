"""Specs that the API's documentation shows. The first one runs as it is where the service was started in a checkout."""

from __future__ import annotations

from typing import Any

_EMOJI_DATA: dict[str, Any] = {
    "train": [{"type": "webdataset", "shards": "examples/emoji/train/{00000..00001}.tar"}],
    "validation": [{"type": "webdataset", "shards": "examples/emoji/val/00000.tar"}],
}
_PAPER_DATA: dict[str, Any] = {
    "train": [
        {"type": "webdataset", "shards": "/data/cc3m/{00000..00331}.tar"},
        {"type": "csv", "path": "/data/cc12m/train.tsv", "image_root": "/data/cc12m"},
    ]
}
_PAPER_EVALUATION: dict[str, Any] = {"zero_shot": ["/data/wds_imagenet1k"], "retrieval": ["/data/wds_flickr30k"]}
_TEACHER: dict[str, Any] = {"model": "ViT-B-16", "pretrained": "laion400m_e32"}

QUICK_SPEC: dict[str, Any] = {
    "name": "quick start",
    "labels": {"example": "emoji"},
    "recipe": "clip",
    "student": {
        "config": {
            "embed_dim": 256,
            "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 128, "layers": 6, "head_width": 32},
            "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 4},
        }
    },
    "data": _EMOJI_DATA,
    "training": {"epochs": 2, "global_batch_size": 128, "warmup_steps": 5, "checkpoint_every_steps": 10, "log_every_steps": 1},
    "evaluation": {"retrieval": ["examples/emoji/wds/emoji_twemoji_retrieval"]},
}
"""A student of 8.4 million parameters, trained for 30 steps on a CPU."""

EXAMPLES: dict[str, Any] = {
    "quick": {"summary": "Runs as it is: plain CLIP on the emoji example", "value": QUICK_SPEC},
    "clip": {
        "summary": "Recipe `clip`: a student alone, no teacher",
        "value": {
            "name": "ViT-T/16 alone",
            "recipe": "clip",
            "student": {"model": "ViT-T-16"},
            "data": _PAPER_DATA,
            "evaluation": _PAPER_EVALUATION,
        },
    },
    "clip_kd": {
        "summary": "Recipe `clip_kd` (arXiv 2307.12732)",
        "value": {
            "name": "ViT-T/16 by CLIP-KD",
            "recipe": "clip_kd",
            "teacher": _TEACHER,
            "student": {"model": "ViT-T-16"},
            "data": _PAPER_DATA,
            "evaluation": _PAPER_EVALUATION,
        },
    },
    "clip_rd": {
        "summary": "Recipe `clip_rd` (arXiv 2603.25383), two GPUs",
        "value": {
            "name": "ViT-T/16 by CLIP-RD",
            "recipe": "clip_rd",
            "teacher": _TEACHER,
            "student": {"model": "ViT-T-16"},
            "data": _PAPER_DATA,
            "evaluation": _PAPER_EVALUATION,
            "resources": {"num_processes": 2, "device": "cuda"},
        },
    },
    "clip_rd_from_job": {
        "summary": "Recipe `clip_rd`, the teacher being another job's result: this one waits for it",
        "value": {
            "name": "emoji student",
            "recipe": "clip_rd",
            "teacher": {"job": "9b2f4c1e-6d0a-4f57-8a53-3f1f0f6f7a11"},
            "student": QUICK_SPEC["student"],
            "data": _EMOJI_DATA,
            "training": QUICK_SPEC["training"],
        },
    },
}
