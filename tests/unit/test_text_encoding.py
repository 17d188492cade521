"""Text features without the padding: equal to open_clip's own, in features and in every gradient, and only where they can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from cliprd_core import text_encoding
from cliprd_core.data.batch import Batch
from cliprd_core.models import ClipModel, register_model_configs
from cliprd_core.stopping import StopRequest
from cliprd_core.text_encoding import can_trim, encode_text
from cliprd_core.trainer import Outcome, train
from tests.tiny import tiny_config, tiny_spec, write_shards, write_teacher

CPU = torch.device("cpu")
CONTEXT_LENGTH = 20
VOCAB_SIZE = 100
END_OF_TEXT = VOCAB_SIZE - 1
EOS_ID = 7
CUSTOM_BLOCKS = {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}
LENGTHS = [3, 20, 5, 11, 3, 2, 20, 9]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_model(*, custom: bool = False, **text: Any) -> Any:
    """open_clip's model of two layers per modality, in fp64, in training mode."""
    config = tiny_config(width=32, embed_dim=16, context_length=CONTEXT_LENGTH, layers=2)
    config["text_cfg"] |= {"vocab_size": VOCAB_SIZE, **text}
    torch.manual_seed(0)
    return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config).double()


def make_tokens(lengths: list[int], *, end: int = END_OF_TEXT) -> Tensor:
    """Random captions of so many tokens, with other random ids, not padding, behind the end: nothing there may matter."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(10, END_OF_TEXT, (len(lengths), CONTEXT_LENGTH), generator=generator)
    for row, length in enumerate(lengths):
        tokens[row, length - 1] = end
        tokens[row, length:] = 0 if row % 2 else tokens[row, length:]
    return tokens


@pytest.fixture
def tower_tokens(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes (captions, tokens) of what has gone through causal towers; groups cost next to nothing, so that there are several."""
    seen: list[tuple[int, ...]] = []
    forward: Callable[..., Tensor] = open_clip.transformer.Transformer.forward

    def record(self: nn.Module, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None:  # not an image tower
            seen.append(tuple(x.shape[:2]))
        return forward(self, x, attn_mask)

    monkeypatch.setattr(open_clip.transformer.Transformer, "forward", record)
    monkeypatch.setattr(text_encoding, "CPU_GROUP_COST", 5)
    monkeypatch.setattr(text_encoding, "GPU_GROUP_COST", 5)
    return seen


def gradients(model: ClipModel, features: Tensor) -> dict[str, Tensor]:
    """Of an arbitrary smooth function of the features, with respect to every parameter that has one."""
    model.zero_grad()
    weights = torch.arange(1, features.numel() + 1, device=features.device, dtype=features.dtype).view_as(features) / features.numel()
    torch.autograd.backward((features * weights).sin().sum())
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("lengths", [LENGTHS, [6], [20], [20, 20, 20], [1, 20]])
@pytest.mark.parametrize("pool", ["argmax", "eos"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"custom": True},
        {"custom": True, "proj_bias": True, "ls_init_value": 0.1},
        {"custom": True, "width": 16, "proj_type": "none"},
        CUSTOM_BLOCKS,
    ],
    ids=["CLIP", "CustomTextCLIP", "linear projection and layer scale", "no projection", "custom blocks"],
)
def test_features_and_all_gradients_are_the_full_contexts(
    config: dict[str, Any], pool: str, lengths: list[int], tower_tokens: list[tuple[int, ...]]
) -> None:
    model = make_model(pool_type=pool, eos_id=EOS_ID, **config)
    assert can_trim(model)
    tokens = make_tokens(lengths, end=END_OF_TEXT if pool == "argmax" else EOS_ID)
    expected = model.encode_text(tokens)
    expected_gradients = gradients(model, expected)
    tower_tokens.clear()
    features = encode_text(model, tokens, CPU)
    assert sum(num_captions * length for num_captions, length in tower_tokens) <= sum(lengths) + 5 * len(tower_tokens)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)
    found_gradients = gradients(model, features)
    assert found_gradients.keys() == expected_gradients.keys()
    names = {name.removeprefix("text.") for name in expected_gradients}
    assert {"positional_embedding", "token_embedding.weight", "ln_final.weight", "transformer.resblocks.0.attn.in_proj_weight"} <= names
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=0, atol=1e-10 * max(1.0, float(gradient.abs().max())))


def test_what_the_groups_are(tower_tokens: list[tuple[int, ...]]) -> None:
    encode_text(make_model(), make_tokens(LENGTHS), CPU)
    assert tower_tokens == [(3, 3), (1, 5), (2, 11), (2, 20)]


@pytest.mark.parametrize("pool", ["argmax", "eos"])
def test_the_first_of_several_end_of_text_tokens_counts_and_none_means_the_first_token(pool: str) -> None:
    """As open_clip reads them; Hugging Face tokenizers pad with the end-of-text token."""
    model = make_model(pool_type=pool, eos_id=EOS_ID)
    end = END_OF_TEXT if pool == "argmax" else EOS_ID
    tokens = make_tokens([4, 6, 9], end=end)
    tokens[0, 4:] = end
    tokens[2, 8] = 1  # with `eos`, there is none left
    torch.testing.assert_close(encode_text(model, tokens, CPU), model.encode_text(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_checkpointing", [False, True])
@pytest.mark.parametrize("is_batch_first", [False, True])
def test_other_ways_through_the_transformer(is_batch_first: bool, is_checkpointing: bool, tower_tokens: list[tuple[int, ...]]) -> None:
    model = make_model()
    model.transformer.batch_first = is_batch_first
    for block in model.transformer.resblocks:
        block.attn.batch_first = is_batch_first
    model.set_grad_checkpointing(is_checkpointing)
    tokens = make_tokens(LENGTHS)
    expected = model.encode_text(tokens)
    expected_gradients = gradients(model, expected)
    features = encode_text(model, tokens, CPU)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients(model, features), expected_gradients, rtol=0, atol=1e-10)


def test_without_gradients_in_evaluation_mode() -> None:
    """Where torch's attention takes another path."""
    model = make_model().float().eval()
    tokens = make_tokens(LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(encode_text(model, tokens, CPU), model.encode_text(tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_under_autocast(device: str, tower_tokens: list[tuple[int, ...]]) -> None:
    """Features and gradients round to bf16 with and without padding; neither is further from fp32 than the other."""
    model = make_model().float().to(device)
    tokens = make_tokens(LENGTHS)
    exact = model.encode_text(tokens.to(device))
    with torch.autocast(device, dtype=torch.bfloat16):
        full = model.encode_text(tokens.to(device))
        tower_tokens.clear()
        trimmed = encode_text(model, tokens, torch.device(device))
    assert trimmed.dtype == full.dtype == torch.bfloat16
    assert len(tower_tokens) > 1, "in several groups"

    def error(found: Tensor, expected: Tensor) -> float:
        return float(((found - expected).norm() / expected.norm()).detach())

    assert 0 < error(full, exact) < 0.02
    assert error(trimmed, exact) < 2 * error(full, exact)
    of_exact, of_full, of_trimmed = (gradients(model, features.float()) for features in (exact, full, trimmed))
    for name, gradient in of_exact.items():
        assert error(of_trimmed[name], gradient) < 2 * error(of_full[name], gradient) < 0.1, name


class OtherBlock(nn.Module):
    """Mixes positions in a way that is not open_clip's."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return x + x.mean(dim=1, keepdim=True)

    def get_weight_dtype(self) -> torch.dtype:
        return torch.float64


def with_other_block() -> ClipModel:
    model = make_model()
    model.transformer.resblocks[0] = OtherBlock()
    return model


def with_dropout() -> ClipModel:
    model = make_model()
    model.ln_final = nn.Sequential(model.ln_final, nn.Dropout(0.3))
    return model


def with_attention_dropout() -> ClipModel:
    model = make_model()
    model.transformer.resblocks[1].attn.dropout = 0.1
    return model


class SubclassedCLIP(open_clip.CLIP):  # type: ignore[misc]
    """May do anything with its texts."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_model(custom=True, no_causal_mask=True),
        lambda: make_model(no_causal_mask=True, pool_type="last"),
        lambda: make_model(pool_type="last"),
        lambda: make_model(pool_type="first"),
        lambda: make_model(custom=True, embed_cls=True, pool_type="argmax"),
        lambda: make_model(custom=True, output_tokens=True),
        with_other_block,
        with_dropout,
        with_attention_dropout,
        lambda: SubclassedCLIP(**tiny_config()),
        nn.Identity,
    ],
    ids=[
        "no mask",
        "SigLIP",
        "last",
        "first",
        "class token",
        "tokens too",
        "other block",
        "dropout",
        "attention dropout",
        "subclass",
        "other",
    ],
)
def test_towers_that_must_have_all_tokens(make: Callable[[], Any]) -> None:
    assert not can_trim(make())


@pytest.mark.parametrize("make", [with_other_block, with_dropout, lambda: make_model(custom=True, no_causal_mask=True)])
def test_these_get_all_tokens(make: Callable[[], ClipModel]) -> None:
    model, tokens = make(), make_tokens(LENGTHS)
    torch.manual_seed(3)
    expected = model.encode_text(tokens)
    torch.manual_seed(3)
    assert encode_text(model, tokens, CPU).equal(expected)


def test_dropout_matters_in_training_alone(tower_tokens: list[tuple[int, ...]]) -> None:
    model, tokens = with_dropout().eval(), make_tokens(LENGTHS)
    assert can_trim(model)
    torch.testing.assert_close(encode_text(model, tokens, CPU), model.encode_text(tokens), rtol=0, atol=1e-12)
    assert len(tower_tokens) > 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ViT-T-16", True), ("ViT-B-16", True), ("ViT-L-14-quickgelu", True), ("PE-Core-T-16-384", True), ("ViT-B-16-SigLIP", False)],
)
def test_named_models(name: str, expected: bool) -> None:
    register_model_configs()
    config = open_clip.get_model_config(name)
    assert config is not None
    config["vision_cfg"] = tiny_config()["vision_cfg"]  # of no interest, and slow to build
    model_class = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        assert can_trim(model_class(**config)) is expected


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_no_text_of_a_run_goes_through_with_its_padding(
    micro_batch_size: int | None, tower_tokens: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """Student, teacher and evaluation, which have 16 and 20 tokens of context, on captions of at most 9 tokens."""
    shards = write_shards(tmp_path / "shards", 16)
    spec = tiny_spec(
        shards,
        teacher=write_teacher(tmp_path / "teacher", tiny_config(context_length=CONTEXT_LENGTH)),
        data={"validation": [{"type": "webdataset", "shards": shards}]},
        training={"epochs": 1, "warmup_steps": 0, "micro_batch_size": micro_batch_size},
    )
    assert train(spec, tmp_path / "run", StopRequest()) is Outcome.FINISHED
    assert sum(num_captions for num_captions, _ in tower_tokens) == 16 * (3 if micro_batch_size is None else 4)
    assert {length for _, length in tower_tokens} <= {8, 9}


def test_the_host_knows_the_lengths_before_the_device_is_asked() -> None:
    """A step never waits for the device, so a batch's tokens stay on the host when its images go."""
    tokens = make_tokens([3, 4])
    batch = Batch(
        sample_indices=torch.arange(2),
        view=0,
        student_pixels=torch.zeros(2, 4, 4, 3, dtype=torch.uint8),
        student_tokens=tokens,
        teacher_pixels=(torch.ones(2, 4, 4, 3, dtype=torch.uint8), None),
        teacher_tokens=(None, tokens),
    )
    moved = batch.to(torch.device("meta"))
    assert moved.student_pixels.is_meta
    assert [images is not None and images.is_meta for images in moved.teacher_pixels] == [True, False]
    assert moved.student_tokens is tokens
    assert moved.teacher_tokens[1] is tokens
