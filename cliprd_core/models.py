"""Students and teachers: from open_clip names, config objects, `local-dir:` folders, pretrained tags and checkpoint files.

Everything that knows open_clip's model factory belongs here. Weights are read from `.safetensors`, or from `.pt`, `.pth` and
`.bin` files with torch's restricted unpickler; a file that needs more than that is refused, since unpickling runs code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import Transformer
from torch import Tensor, nn

from cliprd_core.data.batch import ModelInput, Preprocess, Tokenizer
from cliprd_core.hashes import file_sha256
from cliprd_core.locations import ForbiddenLocationError, Locations
from cliprd_core.spec import StudentSpec, TeacherSpec, check_model_config
from cliprd_core.weights import load_weights, read_state_dict

logger = logging.getLogger(__name__)

LOCAL_DIR_PREFIX = "local-dir:"
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
"""Names of open_clip's own `local-dir:` layout."""
OTHER_WEIGHTS_FILES = ("open_clip_pytorch_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")

FORBIDDEN_CONFIG_KEYS = frozenset({"trust_remote_code", "bpe_path"})
"""A job spec comes over the network; these would let it run code from a hub repository or open any file of the machine."""


class ClipModel(nn.Module):
    """What open_clip's dual encoders have in common, for type checkers alone: open_clip's classes don't derive from it."""

    visual: nn.Module
    logit_scale: nn.Parameter
    """Log of the scale; 0-d, or of shape (1,)."""

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(B, 3, H, W) to (B, embed_dim)."""
        raise NotImplementedError

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(B, context_length) token ids to (B, embed_dim)."""
        raise NotImplementedError


@dataclass(frozen=True)
class LoadedModel:
    """An open_clip model together with how it wants its inputs."""

    model: ClipModel
    preprocess: Preprocess
    tokenizer: Tokenizer
    context_length: int  # tokens
    embed_dim: int
    config: dict[str, Any]  # open_clip's model_cfg; building it again gives the same architecture
    name: str | None  # open_clip name, where the model came by one
    weights_sha256: str | None  # of the weights file; None: random weights

    @property
    def model_input(self) -> ModelInput:
        """How the data has to prepare its inputs."""
        return ModelInput(preprocess=self.preprocess, tokenizer=self.tokenizer, context_length=self.context_length)


@dataclass(frozen=True)
class _Source:
    """Where a model's parts come from, before anything large is read."""

    config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path | None
    tokenizer: Tokenizer
    name: str | None


def load_student(spec: StudentSpec, *, seed: int) -> LoadedModel:
    """Build the model to train, in fp32 on the CPU, in training mode.

    Initial weights are a pure function of `seed` where the spec names none. open_clip's `logit_bias` (SigLIP) takes no part in the
    objective and is frozen.

    Raises:
        ValueError: unknown model, unreadable or unfitting weights; the message names the spec's field and the remedy.
    """
    source = _resolve("student", spec.model, spec.config, spec.pretrained)
    if "multimodal_cfg" in source.config:
        raise ValueError("`student` must be a dual encoder; this config has a captioning decoder (`multimodal_cfg`), which is not trained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = _load("student", source, resize_positions=True)
    logit_bias = getattr(loaded.model, "logit_bias", None)
    if isinstance(logit_bias, nn.Parameter):
        logit_bias.requires_grad_(False)
    loaded.model.train()
    return loaded


def load_teacher(spec: TeacherSpec, field: str = "teacher") -> LoadedModel:
    """Build the frozen teacher, in fp32 on the CPU, in evaluation mode, no parameter requiring a gradient. `field` names it in messages.

    Raises:
        ValueError: as `load_student`; also for `teacher.job` and `teacher.artifact`, which the worker replaces by `local-dir:`.
    """
    if spec.model is None and spec.config is None:
        raise ValueError(
            f"`{field}.job` and `{field}.artifact` exist inside the service only; here give `{field}.model` as `local-dir:PATH`"
        )
    loaded = _load(field, _resolve(field, spec.model, spec.config, spec.pretrained), resize_positions=False)
    loaded.model.requires_grad_(False).eval()
    return loaded


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def register_model_configs() -> None:
    """Make the configs in `cliprd_core/model_configs` (`ViT-T-16`, …) known to open_clip. Repeating it is harmless."""
    open_clip.add_model_config(Path(str(files("cliprd_core").joinpath("model_configs"))))


def _resolve(role: str, model: str | None, config: dict[str, Any] | None, pretrained: str | None) -> _Source:
    """Find config, preprocessing, weights file and tokenizer. `role` is the spec's field, for messages."""
    if config is not None:
        _check_config(f"{role}.config", config)
        weights = None if pretrained is None else _weights_path(role, pretrained)
        return _Source(config, {}, weights, _config_tokenizer(f"{role}.config", config), None)
    assert model is not None
    if model.startswith(LOCAL_DIR_PREFIX):
        if pretrained is not None:
            raise ValueError(f"`{role}.model` {model!r} carries its weights already; remove `{role}.pretrained`")
        return _resolve_local_dir(role, model)
    return _resolve_name(role, model, pretrained)


def read_local_dir(role: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's config and its preprocessing in a folder of open_clip's `local-dir:` layout.

    Raises:
        ValueError: it may not be read, or holds none; `role` is the spec's field, for messages.
    """
    config_path = folder / CONFIG_FILE
    _check_allowed(f"{role}.model", config_path)
    if not config_path.is_file():
        raise ValueError(f"`{role}.model`: {folder} has no {CONFIG_FILE}; give a folder in open_clip's `local-dir:` layout")
    try:
        content = json.loads(config_path.read_text(encoding="utf-8"))
        config, preprocess = content["model_cfg"], content.get("preprocess_cfg") or {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`{role}.model`: {config_path} is not a JSON object with `model_cfg`: {error!r}") from error
    _check_config(f"{role}.model ({config_path})", config)
    return config, preprocess


def _resolve_local_dir(role: str, model: str) -> _Source:
    folder = Path(model.removeprefix(LOCAL_DIR_PREFIX))
    config, preprocess = read_local_dir(role, folder)
    found = [folder / name for name in (WEIGHTS_FILE, *OTHER_WEIGHTS_FILES) if (folder / name).is_file()]
    if not found:
        raise ValueError(f"`{role}.model`: {folder} has no weights; put {WEIGHTS_FILE} beside its {CONFIG_FILE}")
    _check_allowed(f"{role}.model", found[0])
    return _Source(config, preprocess, found[0], _named_tokenizer(f"{role}.model", model), None)


def _resolve_name(role: str, model: str, pretrained: str | None) -> _Source:
    register_model_configs()
    name = model.replace("/", "-")
    config = None if ":" in model else open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f"`{role}.model` {model!r} is not a model that open_clip knows; see `open_clip.list_models()`, or give `{role}.config`"
            " or `local-dir:PATH`"
        )
    tokenizer = _named_tokenizer(f"{role}.model", name)
    if pretrained is None:
        return _Source(config, {}, None, tokenizer, name)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        return _Source(config, {}, _weights_path(role, pretrained, name), tokenizer, name)
    if tag.get("quick_gelu", False):
        config["quick_gelu"] = True  # the weights were trained with it; without, the features are silently worse
    try:
        weights = Path(open_clip.download_pretrained(tag))
    except Exception as error:  # whatever the hub's client raises
        raise ValueError(
            f"`{role}.pretrained`: the weights {pretrained!r} of {name} could not be downloaded ({error});"
            " check the connection, or download them elsewhere and give the file's path"
        ) from error
    return _Source(config, tag, weights, tokenizer, name)


def _check_allowed(field: str, path: Path) -> None:
    try:
        Locations.from_environment().check_path(path)
    except ForbiddenLocationError as error:
        raise ValueError(f"`{field}`: {error}") from error


def _weights_path(role: str, pretrained: str, name: str | None = None) -> Path:
    path = Path(pretrained)
    if path.is_file():
        _check_allowed(f"{role}.pretrained", path)
        return path
    if name is None:
        raise ValueError(f"`{role}.pretrained`: no file {pretrained!r}; with `{role}.config` it must be the path of a checkpoint file")
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
    raise ValueError(f"`{role}.pretrained` {pretrained!r} is neither a file nor a tag of {name} (its tags: {tags})")


def _check_config(field: str, config: dict[str, Any]) -> None:
    """Refuse what open_clip cannot build, and what a spec from the network must not ask for."""
    if not isinstance(config, dict):
        raise ValueError(f"`{field}`: the model config must be an object")
    try:
        check_model_config(config)
        open_clip.CLIPVisionCfg(**config["vision_cfg"])
        open_clip.CLIPTextCfg(**config["text_cfg"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{field}`: {_of_config(error)}") from error
    forbidden = sorted(_keys(config) & FORBIDDEN_CONFIG_KEYS)
    if forbidden:
        raise ValueError(f"`{field}`: `{forbidden[0]}` is not allowed in a model config; remove it")


def _of_config(error: Exception) -> str:
    """Python's words on a dataclass's arguments, in the config's own names."""
    return str(error).replace("CLIPVisionCfg.__init__()", "`vision_cfg`").replace("CLIPTextCfg.__init__()", "`text_cfg`")


def _keys(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return {str(key) for key in value} | {key for inner in value.values() for key in _keys(inner)}
    return {key for inner in value for key in _keys(inner)} if isinstance(value, list) else set()


def _named_tokenizer(field: str, name: str) -> Tokenizer:
    """The tokenizer of a built-in name or of a `local-dir:` folder, as `open_clip.get_tokenizer` chooses it."""
    try:
        tokenizer: Tokenizer = open_clip.get_tokenizer(name)
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise _tokenizer_error(field, error) from error
    return tokenizer


def _config_tokenizer(field: str, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer that a bare config describes: a Hugging Face one where it names one, else CLIP's."""
    text = open_clip.CLIPTextCfg(**config["text_cfg"])
    options = {"context_length": text.context_length, **(text.tokenizer_kwargs or {})}
    try:
        tokenizer: Tokenizer
        if text.hf_tokenizer_name:
            tokenizer = open_clip.tokenizer.HFTokenizer(text.hf_tokenizer_name, tokenizer_mode=text.tokenizer_mode, **options)
        else:
            tokenizer = open_clip.SimpleTokenizer(**options)
    except (ImportError, OSError, ValueError, TypeError) as error:
        raise _tokenizer_error(field, error) from error
    return tokenizer


def _tokenizer_error(field: str, error: Exception) -> ValueError:
    remedy = "install the package `transformers`" if isinstance(error, ImportError) else "check `hf_tokenizer_name` and `tokenizer_kwargs`"
    return ValueError(f"`{field}`: its tokenizer could not be loaded ({error}); {remedy}")


def _load(role: str, source: _Source, *, resize_positions: bool) -> LoadedModel:
    """Build the architecture and fill it with the weights, if any."""
    model = build_architecture(role, source.config)
    _put_sequence_first(model)
    text = open_clip.CLIPTextCfg(**source.config["text_cfg"])
    vocab_size = getattr(source.tokenizer, "vocab_size", None)
    if vocab_size is not None and text.hf_model_name is None and vocab_size > text.vocab_size:
        raise ValueError(f"`{role}`: its tokenizer has {vocab_size} tokens but `text_cfg.vocab_size` is {text.vocab_size}; raise it")
    preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), source.preprocess)
    preprocess["size"] = getattr(model.visual, "image_size", open_clip.CLIPVisionCfg(**source.config["vision_cfg"]).image_size)
    open_clip.set_model_preprocess_cfg(model, preprocess)
    sha256 = None
    if source.weights is not None:
        load_weights(model, read_state_dict(source.weights), origin=f"`{role}`: {source.weights}", resize_positions=resize_positions)
        sha256 = file_sha256(source.weights)
    return LoadedModel(
        model=model,
        preprocess=_typed_preprocess(role, preprocess),
        tokenizer=source.tokenizer,
        context_length=text.context_length,
        embed_dim=source.config["embed_dim"],
        config=source.config,
        name=source.name,
        weights_sha256=sha256,
    )


def _put_sequence_first(model: nn.Module) -> None:
    """Let open_clip's transformers compute on (L, B, W), by their own option, since `nn.MultiheadAttention` does so in any case.

    Given (B, L, W) it transposes without a copy, and without gradients torch then multiplies the sequence's places one by one, each with
    a copy of the weights in bf16 on a CPU: twenty times as slow for ViT-B/16.
    """
    for transformer in model.modules():
        if isinstance(transformer, Transformer) and all(isinstance(block.attn, nn.MultiheadAttention) for block in transformer.resblocks):
            transformer.batch_first = False
            for block in transformer.resblocks:
                block.attn.batch_first = False


def build_architecture(role: str, config: dict[str, Any]) -> ClipModel:
    """Instantiate the architecture as `open_clip.create_model` would, with random weights and nothing downloaded for the towers."""
    options = {key: value for key, value in config.items() if key != "custom_text"}
    options["vision_cfg"] = {**config["vision_cfg"], "timm_model_pretrained": False}
    options["text_cfg"] = {**config["text_cfg"], "hf_model_pretrained": False}
    has_custom_text = bool(config.get("custom_text")) or bool(config["text_cfg"].get("hf_model_name"))
    custom_class = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
    try:
        return cast(ClipModel, (custom_class if has_custom_text else open_clip.CLIP)(**options))
    except (TypeError, ValueError, KeyError, ZeroDivisionError, AssertionError, ImportError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" in str(error):  # the GPU's, or the CPU's, which has no type of its own
            raise
        raise ValueError(f"`{role}`: open_clip cannot build this model config: {error!r}") from error


def _typed_preprocess(role: str, preprocess: dict[str, Any]) -> Preprocess:
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(
            f"`{role}`: its images are {height}x{width}; only square ones are supported, set `vision_cfg.image_size` to one number"
        )
    return Preprocess(
        image_size=int(height),
        mean=_three(preprocess["mean"]),
        std=_three(preprocess["std"]),
        interpolation=preprocess["interpolation"],
        resize_mode=preprocess["resize_mode"],
    )


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
