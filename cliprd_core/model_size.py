"""How large a model is, told without building it: parameters, and the bytes of activations that one more pair takes.

open_clip's own towers are counted from their config by arithmetic; those of timm, and captioning decoders, are known where
the model has a name of open_clip's: `known_model_sizes.json` holds what torch says of it (`scripts/write_known_models.py`). Neither torch
nor numpy is imported, since the API asks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Self

from cliprd_core.tower_size import Activations, Tower, UnknownSizeError, image_tower, text_tower

__all__ = ["Activations", "ModelSize", "Tower", "UnknownSizeError", "size_of_config", "size_of_known_model"]

MAX_PARAMETERS = 10**15
"""No model has more; numbers beyond it are not worth telling."""


@dataclass(frozen=True)
class ModelSize:
    """An open_clip model. Bytes are of one image, or of one caption of full length."""

    embed_dim: int
    image_size: int  # pixels, height and width
    image: Tower
    text: Tower
    num_other: int  # parameters of neither tower: scales, biases, a captioning decoder
    num_frozen: int  # of all parameters, those that aren't trained even in a student

    @property
    def num_parameters(self) -> int:
        return self.image.num_parameters + self.text.num_parameters + self.num_other

    @property
    def has_activations(self) -> bool:
        """Whether the activations are known, too."""
        return self.image.fp32 is not None

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """From an entry of `known_model_sizes.json`."""
        parameters, activations = record["parameters"], record["activations"]
        towers = {
            name: Tower(
                parameters[name],
                *(None if activations is None else Activations(**activations[precision][name]) for precision in ("fp32", "bf16")),
            )
            for name in ("image", "text")
        }
        return cls(record["embed_dim"], record["image_size"], **towers, num_other=parameters["other"], num_frozen=parameters["frozen"])


def size_of_config(config: Mapping[str, Any]) -> ModelSize:
    """The model of an open_clip config that passed the checks at submission.

    Raises:
        UnknownSizeError: it has parts that are not open_clip's own.
    """
    if "multimodal_cfg" in config:
        raise UnknownSizeError("it has a captioning decoder, which is not counted from a config")
    embed_dim, has_quick_gelu = config["embed_dim"], bool(config.get("quick_gelu"))
    image, num_frozen = image_tower(config["vision_cfg"], embed_dim, has_quick_gelu=has_quick_gelu)
    text = text_tower(config["text_cfg"], embed_dim, has_quick_gelu=has_quick_gelu, is_custom=bool(config.get("custom_text")))
    num_biases = int(config.get("init_logit_bias") is not None)
    size = config["vision_cfg"].get("image_size", 224)
    found = ModelSize(
        embed_dim=embed_dim,
        image_size=size[0] if isinstance(size, list) else size,
        image=image,
        text=text,
        num_other=1 + num_biases,
        num_frozen=num_frozen + num_biases,
    )
    if found.num_parameters > MAX_PARAMETERS:
        raise UnknownSizeError(f"it would have more than {MAX_PARAMETERS:.0e} parameters")
    return found


def size_of_known_model(name: str) -> ModelSize:
    """The model of open_clip's, or ours, of this name; a `/` in it is read as `-`.

    Raises:
        UnknownSizeError: its size was not recorded.
    """
    record = _known_sizes().get(name.replace("/", "-"))
    if record is None:
        raise UnknownSizeError(
            f"no size is recorded for `{name}`: a text tower of Hugging Face's is described by files that only a download has"
        )
    return ModelSize.of_record(record)


@cache
def _known_sizes() -> dict[str, dict[str, Any]]:
    loaded: dict[str, dict[str, Any]] = json.loads(files("cliprd_core").joinpath("known_model_sizes.json").read_text())
    return loaded
