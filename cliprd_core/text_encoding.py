"""Text features without the padding, where the text tower makes that exact.

In a causal tower a position sees itself and those before it, and the feature is read at one position, the end-of-text token. What stands
behind it reaches neither the feature nor, in the backward pass, any parameter: its gradient is zero. So a caption needs its tokens
up to that position alone. Captions go through the tower in groups of similar length (`caption_groups`); features come back in order.

Shape suffixes: B captions, C context length, N tokens of all groups one after another, W width of the tower, D width of the features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip import transformer as towers
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from cliprd_core.caption_groups import CaptionGroup, plan_groups

CPU_GROUP_COST = 64
"""Tokens. Each further group adds to every weight's gradient once more, which costs as much as some tokens' work at any width."""
GPU_GROUP_COST = 16384
"""Tokens. A group launches a few hundred kernels, a few milliseconds, in which a GPU takes a small tower through so many tokens."""
GPU_LENGTH_MULTIPLE = 8
"""Tokens. Keeps attention masks aligned for the fused kernels, and shapes few."""

_ATTENTION_LAYERS = (nn.MultiheadAttention, towers.Attention)  # mix positions, as the mask allows
_TOKEN_WISE_LAYERS = (
    nn.Linear,
    NonDynamicallyQuantizableLinear,
    nn.LayerNorm,
    towers.LayerNorm,
    towers.LayerNormFp32,
    towers.LayerScale,
    nn.GELU,
    towers.QuickGELU,
    nn.Identity,
    nn.Dropout,
)
_CONTAINERS = (
    towers.Transformer,
    towers.ResidualAttentionBlock,
    towers.CustomResidualAttentionBlock,
    nn.ModuleList,
    nn.Sequential,
)
_KNOWN_LAYERS = frozenset((*_ATTENTION_LAYERS, *_TOKEN_WISE_LAYERS, *_CONTAINERS))


class TextModel(Protocol):
    """What has text features; open_clip's models do."""

    def encode_text(self, text: Tensor, /, normalize: bool) -> Tensor: ...


def encode_text(model: TextModel, tokens_BC: Tensor, device: torch.device) -> Tensor:
    """`model.encode_text`, unnormalised (B, D): the same features and gradients, without the work on padding where `can_trim(model)`.

    Args:
        tokens_BC: token ids, int64, on the host as the loader gives them. Ids on a GPU are taken whole: to read off their lengths
            would be to wait for it.
        device: of `model`.
    """
    tower = _causal_tower(model)
    if tower is None or tokens_BC.device.type != "cpu":
        return model.encode_text(tokens_BC.to(device, non_blocking=True), normalize=False)
    lengths_B = tower.lengths(tokens_BC)
    is_cpu = device.type == "cpu"
    groups = plan_groups(
        lengths_B,
        tokens_BC.shape[1],
        group_cost=CPU_GROUP_COST if is_cpu else GPU_GROUP_COST,
        multiple=1 if is_cpu else GPU_LENGTH_MULTIPLE,
    )
    return tower.encode(_pack(tokens_BC, lengths_B, groups).to(device))


def can_trim(model: TextModel) -> bool:
    """Whether `model`'s text features are known not to depend on what follows the token that they are read at.

    That is open_clip's `CLIP`, or `CustomTextCLIP` with open_clip's own text tower, with the causal mask, read at the token of highest id
    (`argmax`) or at the tokenizer's end-of-text token (`eos`). Not so: SigLIP (no mask, last position), CoCa (appended class token),
    Hugging Face towers, towers with any layer that isn't open_clip's. Nor where a layer draws random numbers now: fewer tokens
    draw others.
    """
    return _causal_tower(model) is not None


def trimmed_layers(model: TextModel) -> nn.Module | None:
    """The layers that see captions of other numbers and lengths in every batch, where `can_trim(model)`; else None."""
    tower = _causal_tower(model)
    if tower is None:
        return None
    layers: nn.Module = tower.parts.transformer
    return layers


def encode_alike(model: TextModel, num_captions: int, num_tokens: int, device: torch.device) -> Tensor:
    """(num_captions, D) features of made-up captions of `num_tokens` each, in one group. For a model that `can_trim`."""
    tower = _causal_tower(model)
    assert tower is not None
    ids = torch.zeros(num_captions * num_tokens, dtype=torch.int64)
    read_at = torch.arange(num_captions) * num_tokens + num_tokens - 1
    return tower.encode(_PackedCaptions(ids, read_at, ((num_captions, num_tokens),)).to(device))


@dataclass(frozen=True)
class _PackedCaptions:
    """The captions of all groups, one group after another, one caption after another."""

    token_ids: Tensor  # (N,) int64
    read_at: Tensor  # (B,) int64, where among the N each caption of the batch has the token that its feature is read at
    shapes: tuple[tuple[int, int], ...]  # of each group: captions, tokens of each

    def to(self, device: torch.device) -> _PackedCaptions:
        """By one copy, which on a GPU the host doesn't wait for."""
        both = torch.cat([self.token_ids, self.read_at])
        if device.type == "cuda":
            both = both.pin_memory()
        both = both.to(device, non_blocking=True)
        return _PackedCaptions(both[: len(self.token_ids)], both[len(self.token_ids) :], self.shapes)


def _pack(tokens_BC: Tensor, lengths_B: NDArray[np.int64], groups: list[CaptionGroup]) -> _PackedCaptions:
    read_at_B = np.empty_like(lengths_B)
    parts: list[Tensor] = []
    start = 0
    for group in groups:
        parts.append(tokens_BC[torch.from_numpy(group.rows), : group.length].flatten())
        read_at_B[group.rows] = start + group.length * np.arange(len(group.rows)) + lengths_B[group.rows] - 1
        start += len(parts[-1])
    shapes = tuple((len(group.rows), group.length) for group in groups)
    return _PackedCaptions(torch.cat(parts), torch.from_numpy(read_at_B), shapes)


@dataclass(frozen=True)
class _CausalTower:
    """The parts of open_clip's text tower, which `CLIP` holds itself and `CustomTextCLIP` in its `text`."""

    parts: Any  # has token_embedding, positional_embedding, transformer, attn_mask, ln_final, text_projection
    eos_id: int | None  # None: the feature is read at the token of highest id

    def lengths(self, tokens_BC: Tensor) -> NDArray[np.int64]:
        """(B,) tokens up to the one that the feature is read at; where several qualify, and with `eos` where none does, the first."""
        scores_BC = tokens_BC if self.eos_id is None else (tokens_BC == self.eos_id).int()
        lengths_B: NDArray[np.int64] = (scores_BC.argmax(dim=1) + 1).numpy()
        return lengths_B

    def encode(self, captions: _PackedCaptions) -> Tensor:
        """(B, D). Embeds and reads all groups at once: an embedding's gradient is as large as the vocabulary, whatever the group."""
        parts = self.parts
        cast_type = parts.transformer.get_cast_dtype()
        embedded_NW = parts.token_embedding(captions.token_ids).to(cast_type)
        positions_CW = parts.positional_embedding.to(cast_type)
        hidden: list[Tensor] = []
        group_sizes = [num_captions * length for num_captions, length in captions.shapes]
        for (num_captions, length), group_NW in zip(captions.shapes, embedded_NW.split(group_sizes), strict=True):
            inputs = group_NW.view(num_captions, length, -1) + positions_CW[:length]
            mask = parts.attn_mask[:length, :length].contiguous()  # fused attention wants its rows aligned
            hidden.append(parts.transformer(inputs, attn_mask=mask).flatten(0, 1))
        read_BW = parts.ln_final(torch.cat(hidden).index_select(0, captions.read_at))
        projection = parts.text_projection
        if isinstance(projection, nn.Linear):
            read_BW = projection(read_BW)
        elif projection is not None:
            read_BW = read_BW @ projection
        features_BD: Tensor = read_BW
        return features_BD


def _causal_tower(model: Any) -> _CausalTower | None:
    """The text tower, if it is one of those that `can_trim` tells of."""
    if type(model) is open_clip.CLIP:
        parts, pool_type, eos_id = model, model.text_pool_type, model.text_eos_id
    elif type(model) is open_clip.CustomTextCLIP and type(model.text) is towers.TextTransformer:
        parts, pool_type, eos_id = model.text, model.text.pool_type, model.text.eos_id
        if parts.cls_emb is not None or parts.output_tokens:
            return None
    else:
        return None
    has_causal_mask = parts.attn_mask is not None  # there is no other kind in these classes
    if not has_causal_mask or pool_type not in ("argmax", "eos") or len(parts.positional_embedding) != parts.context_length:
        return None
    layers = [*parts.transformer.modules(), *parts.ln_final.modules()]
    if type(parts.token_embedding) is not nn.Embedding or not all(_is_exact(layer) for layer in layers):
        return None
    return _CausalTower(parts, eos_id if pool_type == "eos" else None)


def _is_exact(layer: nn.Module) -> bool:
    """Whether it is a layer of open_clip's towers, exactly, and draws no random numbers."""
    if type(layer) not in _KNOWN_LAYERS:
        return False
    drop_probability = layer.p if isinstance(layer, nn.Dropout) else layer.dropout if isinstance(layer, nn.MultiheadAttention) else 0.0
    return not (layer.training and drop_probability)
