"""What is said of models without building them, against what torch says of them."""

from __future__ import annotations

import json
from typing import Any

import open_clip
import pytest
import torch

from cliprd_core.model_size import ModelSize, UnknownSizeError, size_of_config, size_of_known_model
from cliprd_core.models import register_model_configs
from scripts.measure_models import count_parameters, measure_activations, saved_bytes
from scripts.write_known_models import SIZES_TARGET, measurable_models, measured_activations, render_sizes, size_record

PLAIN = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 2}
RESNET = {"image_size": 64, "layers": [2, 1, 1, 2], "width": 16, "patch_size": None}
TEXT = {"context_length": 16, "vocab_size": 300, "width": 48, "heads": 4, "layers": 2}


def config(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    return {"embed_dim": 40, "vision_cfg": {**PLAIN, **(vision or {})}, "text_cfg": {**TEXT, **(text or {})}, **top}


def counted(size: ModelSize) -> dict[str, int]:
    return {
        "image": size.image.num_parameters,
        "text": size.text.num_parameters,
        "other": size.num_other,
        "frozen": size.num_frozen,
    }


VARIANTS = [
    config(),
    config({"patch_size": 5, "image_size": [32, 40], "mlp_ratio": 3.3}, {"mlp_ratio": 2.5}),
    config({"ls_init_value": 0.1, "no_ln_pre": True}, {"ls_init_value": 0.1}, quick_gelu=True),
    config({"pos_embed_type": "sin_cos_2d", "pool_type": "avg", "final_ln_after_pool": True, "norm_kwargs": {"eps": 1e-5}}),
    config({"attentional_pool": True, "attn_pooler_queries": 6}),
    config({"attentional_pool": True, "width": 40, "head_width": 8}),
    config({"qk_norm": True, "scale_heads": True, "scale_fc": True}, {"scale_attn_inner": True, "scale_attn": True}),
    config({"block_type": "custom"}, {"scaled_cosine_attn": True}),
    config({"block_type": "default", "scale_fc": True}),
    config(RESNET),
    config(text={"embed_cls": True, "proj_bias": True}, custom_text=True, init_logit_bias=-10),
    config(text={"embed_cls": True, "proj_type": "none", "width": 40, "no_causal_mask": True, "pool_type": "last"}),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=range(len(VARIANTS)))
def test_parameters_are_counted_exactly(variant: dict[str, Any]) -> None:
    assert counted(size_of_config(variant)) == count_parameters(variant)


@pytest.mark.parametrize("name", ["ViT-S-16", "RN50x4", "ViT-H-14-quickgelu", "coca_ViT-B-32", "ViT-SO400M-16-SigLIP2-384"])
def test_parameters_of_known_models(name: str) -> None:
    register_model_configs()
    assert counted(size_of_known_model(name)) == count_parameters(open_clip.get_model_config(name))


def test_every_known_model_has_a_recorded_size_but_those_of_hugging_face() -> None:
    recorded = json.loads(SIZES_TARGET.read_text())
    assert list(recorded) == measurable_models(), "run scripts/write_known_models.py"
    assert all(record["activations"] for record in recorded.values()), "run scripts/write_known_models.py"
    assert size_of_known_model("ViT-B/16") == size_of_known_model("ViT-B-16")
    with pytest.raises(UnknownSizeError, match="roberta-ViT-B-32"):
        size_of_known_model("roberta-ViT-B-32")


@pytest.mark.parametrize("name", ["ViT-T-16", "MobileCLIP2-S0"])
def test_recorded_sizes_are_what_the_script_writes(name: str) -> None:
    """Measured by torch itself where arithmetic ends."""
    register_model_configs()
    (line,) = [line for line in SIZES_TARGET.read_text().splitlines() if line.startswith(f'  "{name}"')]
    record = size_record(name, None)
    record["activations"] = record["activations"] or measured_activations(name)
    assert line.rstrip(",") == render_sizes({name: record}).splitlines()[1]


def test_a_model_whose_activations_were_not_measured_has_parameters_all_the_same() -> None:
    record = size_record("ViT-T-16", None)
    size = ModelSize.of_record({**record, "activations": None})
    assert not size.has_activations
    assert size.num_parameters == ModelSize.of_record(record).num_parameters


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (config({"timm_model_name": "vit_tiny"}), "timm's `vit_tiny`"),
        (config(text={"hf_model_name": "roberta-base"}), "Hugging Face's `roberta-base`"),
        (config(multimodal_cfg={}), "captioning decoder"),
        (config({"norm_kwargs": {"elementwise_affine": False}}), "norm_kwargs"),
        (config({"patch_size": None}), "patch_size"),
        (config({**RESNET, "layers": [2, 2]}), "four numbers"),
        (config({**RESNET, "layers": [2, 2, 2, 10**18]}), "more than"),
    ],
)
def test_what_arithmetic_does_not_cover_is_said(variant: dict[str, Any], words: str) -> None:
    with pytest.raises(UnknownSizeError, match=words):
        size_of_config(variant)


@pytest.mark.parametrize("variant", [VARIANTS[index] for index in (0, 1, 2, 3)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_saved_activations_of_plain_towers_are_exact(variant: dict[str, Any], precision: str) -> None:
    size = size_of_config(variant)
    (measured,) = measure_activations(variant, (None if precision == "fp32" else torch.bfloat16,))
    for name, tower in (("image", size.image), ("text", size.text)):
        assert getattr(tower, precision).saved == pytest.approx(measured[name]["saved"], rel=0.02), name


@pytest.mark.parametrize("variant", [VARIANTS[index] for index in (4, 5, 6, 9, 10)])
def test_other_saved_activations_are_right_within_a_quarter(variant: dict[str, Any]) -> None:
    """Small towers: what isn't in the blocks weighs more than in real ones."""
    size = size_of_config(variant)
    for precision, measured in zip(("fp32", "bf16"), measure_activations(variant, (None, torch.bfloat16)), strict=True):
        for name, tower in (("image", size.image), ("text", size.text)):
            assert getattr(tower, precision).saved == pytest.approx(measured[name]["saved"], rel=0.25), (precision, name)


def test_arithmetic_counts_the_parameters_that_torch_counts_in_known_models() -> None:
    register_model_configs()
    num_compared = 0
    for name in measurable_models():
        try:
            size = size_of_config(open_clip.get_model_config(name))
        except UnknownSizeError:
            continue
        assert size == size_of_known_model(name), name
        num_compared += 1
    assert num_compared > 50


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_real_pass_of_vit_s_16_saves_what_is_said(batch_size: int) -> None:
    register_model_configs()
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-S-16"))
    size = size_of_config(open_clip.get_model_config("ViT-S-16"))
    images, tokens = torch.zeros(batch_size, 3, 224, 224), torch.zeros(batch_size, 77, dtype=torch.long)
    assert saved_bytes(model, lambda: model.encode_image(images)) == pytest.approx(batch_size * size.image.fp32.saved, rel=0.001)
    assert saved_bytes(model, lambda: model.encode_text(tokens)) == pytest.approx(batch_size * size.text.fp32.saved, rel=0.001)
