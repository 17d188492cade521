"""Weights files: reading them without running code from them, and fitting them into a model.

Knows file formats and the wrappers CLIP checkpoints come in; what model the weights are for is the caller's business.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
NUM_NAMED_KEYS = 3
"""How many of the keys at fault an error message names."""


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read name -> tensor, on the CPU, with the wrappers of training checkpoints (`state_dict`, `module.`) taken off.

    Raises:
        ValueError: another format, a damaged file, or one that holds more than tensors.
    """
    content: object
    if path.suffix == ".safetensors":
        try:
            content = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}); it may be cut off: fetch it again") from error
    elif path.suffix in PICKLE_SUFFIXES:
        content = _read_pickle(path)
    else:
        raise ValueError(
            f"{path}: weights must be a .safetensors file (or {', '.join(PICKLE_SUFFIXES)}), not {path.suffix or 'without suffix'}"
        )
    return _unwrap(path, content)


def load_weights(model: nn.Module, state: dict[str, Tensor], *, origin: str, resize_positions: bool) -> None:
    """Fill `model` with `state`, every key of it and no other.

    Older open_clip layouts are converted as open_clip does. With `resize_positions`, position embeddings of another resolution or
    context length are interpolated, with a warning; without, they are an error like any other shape.

    Raises:
        ValueError: missing, unexpected or differently shaped keys. `origin` begins the message.
    """
    state = _to_current_layout(model, dict(state))
    own = model.state_dict()
    if resize_positions:
        before = dict(state)
        widths_fit = all(state[key].shape[-1] == own[key].shape[-1] for key in state if key.endswith("positional_embedding") and key in own)
        if widths_fit:
            resize_pos_embed(state, model)
            resize_text_pos_embed(state, model)
        for key in (key for key in state if state[key] is not before[key]):
            logger.warning("%s: `%s` interpolated from %s to %s positions", origin, key, len(before[key]), len(state[key]))
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in sorted(own.keys() & state.keys())
            if state[key].shape != own[key].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(
            f"{len(keys)} {kind} ({', '.join(keys[:NUM_NAMED_KEYS])}{', …' if len(keys) > NUM_NAMED_KEYS else ''})"
            for kind, keys in faults.items()
            if keys
        )
        raise ValueError(
            f"{origin} holds the weights of another model than the one asked for: {listed}; name the model they were saved from"
        )
    model.load_state_dict(state)


def _read_pickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # bytes that are no pickle fail in whatever way they happen to be read
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as plain weights ({reason}); a file that needs unpickling is refused because that runs code from it:"
            " where you trust it, load it yourself and save its state_dict with safetensors.torch.save_file"
        ) from error


def _unwrap(path: Path, content: object) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} does not hold a state_dict (names and tensors), alone or under the key `state_dict`")
    state: dict[str, Tensor] = content
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _to_current_layout(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape what older or foreign CLIP checkpoints lay out differently."""
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for key in ("logit_scale", "logit_bias"):
        own = getattr(model, key, None)
        if own is not None and key in state and state[key].numel() == own.numel():
            state[key] = state[key].reshape(own.shape)
    if getattr(model, "logit_bias", None) is not None and "logit_bias" not in state and "logit_scale" in state:
        state["logit_bias"] = torch.zeros_like(state["logit_scale"])
    if "text.transformer.embeddings.position_ids" not in model.state_dict():
        state.pop("text.transformer.embeddings.position_ids", None)
    return state
