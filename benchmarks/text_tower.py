"""Time of a text tower on the full context and without padding: `python benchmarks/text_tower.py`.

Two kinds of captions: "web" are of lengths at the quantiles of a log-normal distribution with a mean of 15 tokens, start and end of text
included, and the last one fills the context; "emoji" are drawn from the example's training captions. A forward and backward pass
("train") and a forward pass in evaluation mode ("infer"). On the CPU one thread and its CPU time, which hardly suffers from whatever
else the machine does; on a GPU wall time, planning and copying included. Each is the least of the repetitions. `--group-costs 8 32 128`
shows what other costs of a group would give.
"""

from __future__ import annotations

import argparse
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from torch import Tensor

from cliprd_core import text_encoding
from cliprd_core.models import register_model_configs
from cliprd_core.precision import autocast
from cliprd_core.text_encoding import encode_text

CONTEXT_LENGTH = 77
START_OF_TEXT, END_OF_TEXT = 49406, 49407
EMOJI = Path(__file__).parents[1] / "examples" / "emoji" / "train"


def web_tokens(batch_size: int) -> Tensor:
    """(B, 77) random tokens."""
    quantiles = torch.distributions.Normal(2.53, 0.6).icdf((torch.arange(batch_size) + 0.5) / batch_size)  # exp(2.53 + 0.6² / 2) = 15
    lengths = quantiles.exp().round().int().clamp(3, CONTEXT_LENGTH)
    lengths[-1] = CONTEXT_LENGTH
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, START_OF_TEXT, (batch_size, CONTEXT_LENGTH), generator=generator)
    tokens[:, 0] = START_OF_TEXT
    for row, length in enumerate(lengths.tolist()):
        tokens[row, length - 1] = END_OF_TEXT
        tokens[row, length:] = 0
    return tokens[torch.randperm(batch_size, generator=generator)]


def emoji_tokens(batch_size: int) -> Tensor:
    """(B, 77)"""
    captions: list[str] = []
    for path in sorted(EMOJI.glob("*.tar")):
        with tarfile.open(path) as archive:
            texts = [member for member in archive if member.name.endswith(".txt")]
            captions += [file.read().decode() for member in texts if (file := archive.extractfile(member)) is not None]
    chosen = torch.randint(len(captions), (batch_size,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens: Tensor = open_clip.SimpleTokenizer(context_length=CONTEXT_LENGTH)([captions[index] for index in chosen])
    return tokens


def text_model(name: str, device: torch.device) -> Any:
    """open_clip's model with an image tower of one layer, which isn't used."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise SystemExit(f"open_clip knows no model {name!r}")
    config["vision_cfg"] = {**config["vision_cfg"], "layers": 1}
    torch.manual_seed(0)
    return open_clip.CLIP(**config).to(device)


@dataclass(frozen=True)
class Bench:
    """One model and one kind of pass."""

    name: str
    model: Any
    device: torch.device
    is_training: bool
    dtype: torch.dtype | None  # of autocast
    num_repetitions: int

    def report(self, captions: str, encode: Callable[[], Tensor]) -> None:
        self.model.train(self.is_training)
        seconds = min(self._seconds(encode) for _ in range(self.num_repetitions))
        print(f"{self.name:16}{'train' if self.is_training else 'infer':8}{captions:12}{seconds:8.3f}", flush=True)

    def _seconds(self, encode: Callable[[], Tensor]) -> float:
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        self.model.zero_grad()
        start = clock()
        with torch.set_grad_enabled(self.is_training), autocast(self.device, self.dtype):
            features = encode()
        if self.is_training:
            torch.autograd.backward(features.float().square().sum())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return clock() - start


def measure(bench: Bench, captions: dict[str, Tensor], group_costs: list[int] | None) -> None:
    name_of_cost = "CPU_GROUP_COST" if bench.device.type == "cpu" else "GPU_GROUP_COST"
    on_device = captions["web"].to(bench.device)
    bench.report("full", partial(bench.model.encode_text, on_device))
    for cost in group_costs or [getattr(text_encoding, name_of_cost)]:
        with patch.object(text_encoding, name_of_cost, cost):
            for kind, tokens in captions.items():
                bench.report(f"{kind} {cost}", partial(encode_text, bench.model, tokens, bench.device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["ViT-B-16", "ViT-T-16"])
    parser.add_argument("--passes", nargs="+", choices=["train", "infer"], default=["train", "infer"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--group-costs", nargs="+", type=int, help="tokens; by default the library's own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    register_model_configs()
    device = torch.device(options.device)
    captions = {"web": web_tokens(options.batch_size), "emoji": emoji_tokens(options.batch_size)}
    for kind, tokens in captions.items():
        lengths = tokens.argmax(dim=1) + 1
        print(f"{kind}: {options.batch_size} captions, mean {float(lengths.float().mean()):.1f} tokens, longest {int(lengths.max())}")
    print(f"{'text tower of':16}{'pass':8}{'captions':12}{'seconds':>8}")
    for name in options.models:
        model = text_model(name, device)
        for one in options.passes:
            bench = Bench(name, model, device, one == "train", torch.bfloat16 if options.bf16 else None, options.repetitions)
            measure(bench, captions, options.group_costs)


if __name__ == "__main__":
    main()
