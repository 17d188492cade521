"""Arithmetic on the towers of open_clip's configs: ViT, ModifiedResNet, text transformer.

Counts of parameters are exact. Bytes of activations are those of torch's fused attention, which keeps no attention matrix: `saved`, what
a forward pass keeps for the backward pass, is exact for plain blocks in fp32 and in bf16 with layer normalisation in fp32, as CUDA's
autocast has it; `working`, the most that is alive at once without gradients, is rough. The tests compare both with torch.

Letters: w width, m width of the MLP, T tokens, E `embed_dim`, b bytes of a number in the type that products are computed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NORM_BYTES = 4
"""Of a number that goes into a layer normalisation: fp32 at any precision."""
_INDEX_BYTES = 8


class UnknownSizeError(ValueError):
    """The size can't be told from the config; the message says why, without naming the model."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one image or caption."""

    saved: int  # kept by a forward pass for the backward pass
    working: int  # the most alive at once in a forward pass without gradients


@dataclass(frozen=True)
class Tower:
    """One tower, and the activations of one more input at both precisions, None where they are not known; fp16 takes as much as bf16."""

    num_parameters: int
    fp32: Activations | None
    bf16: Activations | None


@dataclass(frozen=True)
class _Blocks:
    """The residual attention blocks of one tower."""

    width: int
    mlp_width: int
    num_heads: int
    num_layers: int
    is_custom: bool
    has_layer_scale: bool
    has_quick_gelu: bool
    options: frozenset[str]  # those of `_CUSTOM_OPTIONS` that are on

    @classmethod
    def of(cls, config: Mapping[str, Any], *, width: int, num_heads: int, has_quick_gelu: bool) -> _Blocks:
        if set(config.get("norm_kwargs") or {}) - {"eps"}:
            raise UnknownSizeError("`norm_kwargs` changes its layer normalisation")
        options = frozenset(name for name in _CUSTOM_OPTIONS if config.get(name))
        block_type = config.get("block_type") or ("custom" if options else "default")
        return cls(
            width=width,
            mlp_width=int(width * config.get("mlp_ratio", 4.0)),
            num_heads=num_heads,
            num_layers=config.get("layers", 12),
            is_custom=block_type == "custom",
            has_layer_scale=config.get("ls_init_value") is not None,
            has_quick_gelu=has_quick_gelu,
            options=options if block_type == "custom" else frozenset(),
        )

    @property
    def num_parameters(self) -> int:
        w, m = self.width, self.mlp_width
        attention = _linear(w, 3 * w) + _linear(w, w)
        mlp = _linear(w, m) + _linear(m, w)
        scales = 2 * w if self.has_layer_scale else 0
        extra = {
            "qk_norm": 2 * _norm(w // self.num_heads),
            "scaled_cosine_attn": self.num_heads,
            "scale_heads": self.num_heads,
            "scale_attn_inner": _norm(w),
            "scale_attn": _norm(w),
            "scale_fc": _norm(m),
        }
        return self.num_layers * (2 * _norm(w) + attention + mlp + scales + sum(extra[name] for name in self.options))

    def saved(self, num_tokens: int, b: int) -> int:
        w, m = self.width, self.mlp_width
        norms = 2 * (_NORM_BYTES * w + 8)  # input, mean and deviation
        attention = b * 5 * w + 4 * self.num_heads  # input, queries, keys, values, output; the softmax's logarithm
        mlp = b * (w + (3 if self.has_quick_gelu else 2) * m)
        scales = b * 2 * w if self.has_layer_scale else 0
        extra = {
            "qk_norm": 2 * (_NORM_BYTES + b) * w,
            "scaled_cosine_attn": 0,  # no pass of open_clip's gets through it
            "scale_heads": b * w,
            "scale_attn_inner": (_NORM_BYTES + b) * w,
            "scale_attn": _NORM_BYTES * w,
            "scale_fc": (_NORM_BYTES + b) * m,
        }
        return self.num_layers * num_tokens * (norms + attention + mlp + scales + sum(extra[name] for name in self.options))

    def working(self, num_tokens: int, b: int) -> int:
        """At the MLP: its wide tensors, and the narrow ones that are held around it."""
        num_wide = 3 if self.has_quick_gelu else 2
        normalised = (_NORM_BYTES + b) * self.mlp_width if "scale_fc" in self.options else 0
        return num_tokens * (b * (4 * self.width + num_wide * self.mlp_width) + normalised)


_CUSTOM_OPTIONS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


def image_tower(config: Mapping[str, Any], embed_dim: int, *, has_quick_gelu: bool) -> tuple[Tower, int]:
    """The tower of a `vision_cfg`, and how many of its parameters are never trained.

    Raises:
        UnknownSizeError: it is timm's.
    """
    if config.get("timm_model_name"):
        raise UnknownSizeError(f"its image tower is timm's `{config['timm_model_name']}`, which is not counted from a config")
    if isinstance(config.get("layers", 12), list):
        return _resnet(config, embed_dim), 0
    return _vit(config, embed_dim, has_quick_gelu=has_quick_gelu)


def _vit(config: Mapping[str, Any], embed_dim: int, *, has_quick_gelu: bool) -> tuple[Tower, int]:
    w, patch_size = config.get("width", 768), config.get("patch_size", 16)
    if patch_size is None:
        raise UnknownSizeError("`vision_cfg.patch_size` is null")
    height, width = _height_and_width(config)
    num_patches = (height // patch_size) * (width // patch_size)
    num_tokens = num_patches + 1
    blocks = _Blocks.of(config, width=w, num_heads=max(1, w // config.get("head_width", 64)), has_quick_gelu=has_quick_gelu)
    positions = num_tokens * w
    has_pool = bool(config.get("attentional_pool"))
    num_queries = config.get("attn_pooler_queries", 256)
    pooled_width = embed_dim if has_pool else w
    num_parameters = (
        3 * patch_size**2 * w
        + w
        + positions
        + (0 if config.get("no_ln_pre") else _norm(w))
        + blocks.num_parameters
        + (_pooler_parameters(w, embed_dim, num_queries) if has_pool else 0)
        + _norm(pooled_width)
        + pooled_width * embed_dim
    )
    kept_tokens = 1 + max(1, int(num_patches * (1 - dropped))) if (dropped := config.get("patch_dropout", 0.0)) else num_tokens

    def activations(b: int) -> Activations:
        image = 3 * height * width * b
        norm_before = 0 if config.get("no_ln_pre") else kept_tokens * (_NORM_BYTES * w + 8)
        if has_pool:
            head = kept_tokens * (_NORM_BYTES + b) * w + kept_tokens * b * 2 * embed_dim + num_queries * (_NORM_BYTES + 4 * b) * embed_dim
        elif config.get("final_ln_after_pool"):
            head = (_NORM_BYTES + b) * w + 8
        else:
            head = kept_tokens * ((_NORM_BYTES + b) * w + 8)
        working = max(blocks.working(num_tokens, b), num_queries * (_NORM_BYTES + 5 * b) * embed_dim if has_pool else 0)
        return Activations(image + norm_before + blocks.saved(kept_tokens, b) + head, working)

    num_frozen = positions if config.get("pos_embed_type") == "sin_cos_2d" else 0
    return Tower(num_parameters, activations(4), activations(2)), num_frozen


def _pooler_parameters(width: int, embed_dim: int, num_queries: int) -> int:
    """Attentional pooling: `num_queries` learned queries over the tokens."""
    projections = 3 * embed_dim**2 if width == embed_dim else embed_dim**2 + 2 * embed_dim * width
    return num_queries * embed_dim + projections + 3 * embed_dim + _linear(embed_dim, embed_dim) + _norm(embed_dim) + _norm(width)


def _resnet(config: Mapping[str, Any], embed_dim: int) -> Tower:
    w, layers = config.get("width", 768), config["layers"]
    if len(layers) != 4:
        raise UnknownSizeError("`vision_cfg.layers` of a ResNet has four numbers")
    height, width = _height_and_width(config)
    side = height // 2
    num_parameters = _conv(3, w // 2, 3) + _conv(w // 2, w // 2, 3) + _conv(w // 2, w, 3)
    numbers = 3 * height * width + side**2 * 2 * (w // 2 + w // 2 + w)  # saved: each convolution's output, before and after its activation
    side //= 2
    numbers += side**2 * w
    channels = w
    for stage, num_blocks in enumerate(layers):
        planes = w * 2**stage
        first = _bottleneck(channels, planes, side, stride=2 if stage else 1)
        channels, side = 4 * planes, side // (2 if stage else 1)
        other = _bottleneck(channels, planes, side, stride=1)
        num_parameters += first[0] + (num_blocks - 1) * other[0]
        numbers += first[1] + (num_blocks - 1) * other[1]
    num_tokens, pooled = (height // 32) ** 2 + 1, w * 32
    num_parameters += num_tokens * pooled + 3 * _linear(pooled, pooled) + _linear(pooled, embed_dim)
    numbers += num_tokens * pooled * 5  # input, queries, keys, values, output
    working = 4 * w * (height // 2) ** 2

    def activations(b: int) -> Activations:
        return Activations(numbers * b, working * b)

    return Tower(num_parameters, activations(4), activations(2))


def _bottleneck(channels: int, planes: int, side: int, *, stride: int) -> tuple[int, int]:
    """Parameters, and the numbers that a pass saves, of one block whose input is (channels, side, side)."""
    num_parameters = _conv(channels, planes, 1) + _conv(planes, planes, 3) + _conv(planes, 4 * planes, 1)
    out = side // stride
    numbers = side**2 * 4 * planes + out**2 * 2 * 4 * planes
    if stride > 1:
        numbers += out**2 * planes
    if stride > 1 or channels != 4 * planes:
        num_parameters += _conv(channels, 4 * planes, 1)
        numbers += out**2 * (channels + 4 * planes)
    return num_parameters, numbers


def text_tower(config: Mapping[str, Any], embed_dim: int, *, has_quick_gelu: bool, is_custom: bool) -> Tower:
    """The tower of a `text_cfg`; `is_custom`: the model has `custom_text`.

    Raises:
        UnknownSizeError: it is Hugging Face's.
    """
    if config.get("hf_model_name"):
        raise UnknownSizeError(f"its text tower is Hugging Face's `{config['hf_model_name']}`, which only its own files describe")
    w, heads = config.get("width", 512), config.get("heads", 8)
    blocks = _Blocks.of(config, width=w, num_heads=heads, has_quick_gelu=has_quick_gelu)
    has_class_token = bool(config.get("embed_cls"))
    num_tokens = config.get("context_length", 77) + has_class_token
    has_projection = config.get("proj_type", "linear") != "none"
    num_parameters = (
        config.get("vocab_size", 49408) * w
        + (w if has_class_token and is_custom else 0)
        + num_tokens * w
        + blocks.num_parameters
        + _norm(w)
        + (w * embed_dim + (embed_dim if config.get("proj_bias") else 0) if has_projection else 0)
    )

    def activations(b: int) -> Activations:
        head = num_tokens * (_NORM_BYTES * w + 8) + b * w + 2 * _INDEX_BYTES
        return Activations(num_tokens * _INDEX_BYTES + blocks.saved(num_tokens, b) + head, blocks.working(num_tokens, b))

    return Tower(num_parameters, activations(4), activations(2))


def _height_and_width(config: Mapping[str, Any]) -> tuple[int, int]:
    size = config.get("image_size", 224)
    return (size[0], size[1]) if isinstance(size, list) else (size, size)


def _linear(inputs: int, outputs: int) -> int:
    """Weight and bias."""
    return inputs * outputs + outputs


def _norm(width: int) -> int:
    """Gain and bias."""
    return 2 * width


def _conv(inputs: int, outputs: int, kernel: int) -> int:
    """A convolution without bias, and its batch normalisation."""
    return inputs * outputs * kernel**2 + _norm(outputs)
