"""Images a second from JPEG shards to batches: `python benchmarks/data.py` (needs the extras `core` and `bench`; about a minute).

It makes shards of photo-size JPEGs in a temporary folder, each picture a mixture of smooth noise of several scales, edges and grain,
and reads them with RandomResizedCrop to 224 pixels, normalising and CLIP's tokenizer:

    bare, as usual      full decoding and Pillow's resizing on all cores, no reading, no normalising, no batches
    bare                this project's decoding and resizing, the same way: the bound of its loader
    TrainLoader N       this project's loader with N loader processes
    webdataset          the `webdataset` package, and open_clip's own pipeline on it, with as many processes as there are cores

Images per CPU second, over all processes, suffer less from whatever else the machine does than images per second.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import tarfile
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import torch
from numpy.typing import NDArray
from open_clip.transform import AugmentationCfg, image_transform
from PIL import Image

from cliprd_core.data.batch import ModelInput, Preprocess
from cliprd_core.data.hashing import CROP_STREAM, stream_key, uniforms
from cliprd_core.data.loader import build_train_loader
from cliprd_core.data.sources import open_sources
from cliprd_core.data.transforms import DRAWS_PER_CROP, decode_for_crop, decode_rgb, open_image, random_crop_box, resize_crop
from cliprd_core.spec import JobSpec

SIZES = ((500, 375), (1500, 1000))
NUM_PICTURES = 24  # different ones of each size
PAIRS_PER_SHARD = 128
NUM_SHARDS = 4
CROP_SCALE = (0.9, 1.0)
PREPROCESS = Preprocess(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NUM_CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Speed:
    images_per_second: float
    images_per_cpu_second: float


def picture(generator: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of quality 90 that costs about what a photograph of its size does: 1.5 to 2.5 bits a pixel."""
    pixels = np.full((height, width, 3), 128.0, dtype=np.float32)
    for num_waves in (3, 8, 24, 80):
        for channel in range(3):
            noise = generator.normal(0, 90 / num_waves**0.5, (num_waves, num_waves)).astype(np.float32)
            pixels[..., channel] += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    y, x = np.mgrid[0:height, 0:width]
    for _ in range(12):  # things with edges
        centre_x, centre_y, radius = generator.uniform(0, 1, 3) * (width, height, height / 4)
        pixels[(x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2] += generator.normal(0, 50, 3)
    pixels += generator.normal(0, 3, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, pictures: list[bytes]) -> None:
    folder.mkdir()
    for shard in range(NUM_SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * PAIRS_PER_SHARD, (shard + 1) * PAIRS_PER_SHARD):
                caption = f"a photo of thing number {number} on a table in the garden".encode()
                for extension, content in (("jpg", pictures[number % len(pictures)]), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def crop(content: bytes, draws: list[float]) -> NDArray[np.uint8]:
    image = open_image("", content)
    box = random_crop_box(image.width, image.height, CROP_SCALE, draws)
    return resize_crop(*decode_for_crop("", image, box, PREPROCESS.image_size), PREPROCESS)


def crop_as_usual(content: bytes, draws: list[float]) -> NDArray[np.uint8]:
    image = decode_rgb("", content)
    box = random_crop_box(image.width, image.height, CROP_SCALE, draws)
    return np.asarray(image.crop(box).resize((PREPROCESS.image_size, PREPROCESS.image_size), Image.Resampling.BICUBIC))


def bare(make_crop: Callable[[bytes, list[float]], NDArray[np.uint8]], pictures: list[bytes], seconds: float) -> Speed:
    """On all cores, one process each."""
    draws = uniforms(stream_key(CROP_STREAM, 0, 0), np.arange(256), DRAWS_PER_CROP).tolist()
    context = multiprocessing.get_context("fork")
    results: Any = context.SimpleQueue()

    def work() -> None:
        torch.set_num_threads(1)
        make_crop(pictures[0], draws[0])
        start, start_cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - start < seconds:
            make_crop(pictures[count % len(pictures)], draws[count % len(draws)])
            count += 1
        results.put((count / (time.perf_counter() - start), count, time.process_time() - start_cpu))

    processes = [context.Process(target=work) for _ in range(NUM_CORES)]
    for process in processes:
        process.start()
    measured = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return Speed(sum(speed for speed, _, _ in measured), sum(count for _, count, _ in measured) / sum(cpu for _, _, cpu in measured))


def batches(loader_batches: Iterable[Any], num_ahead: int, batch_size: int, seconds: float) -> Speed:
    """Of batches that are taken as soon as they are there, once those are gone that were prepared ahead."""
    iterator = iter(loader_batches)
    for _ in range(num_ahead + 1):
        next(iterator)
    start, start_cpu, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - start < seconds:
        next(iterator)
        count += batch_size
    return Speed(count / (time.perf_counter() - start), count / (cpu_seconds() - start_cpu))


def cpu_seconds() -> float:
    """Of this process and its children."""
    everyone = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(times.user + times.system for times in (one.cpu_times() for one in everyone))


def ours(num_data_workers: int, folder: Path, batch_size: int, seconds: float) -> Speed:
    spec = JobSpec.model_validate(
        {
            "name": "benchmark",
            "recipe": "clip",
            "student": {"model": "ViT-B-32"},
            "data": {"train": [{"type": "webdataset", "shards": str(folder / "*.tar")}], "crop_scale": CROP_SCALE},
            "training": {"global_batch_size": batch_size, "num_data_workers": num_data_workers},
            "resources": {"device": "cpu"},
        }
    )
    student = ModelInput(PREPROCESS, open_clip.get_tokenizer("ViT-B-32"), 77)
    loader = build_train_loader(spec, open_sources(spec.data.train, folder / "cache"), student=student)

    def endless() -> Iterator[Any]:
        for epoch in range(10**6):
            yield from loader.epoch(epoch)

    with closing(loader):
        return batches(endless(), 2 * num_data_workers, batch_size, seconds)


def usual_transform() -> Any:
    return image_transform(
        PREPROCESS.image_size, is_train=True, mean=PREPROCESS.mean, std=PREPROCESS.std, aug_cfg=AugmentationCfg(scale=CROP_SCALE)
    )


def shard_names(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def plain_webdataset(folder: Path, batch_size: int, seconds: float) -> Speed:
    import webdataset

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    data = webdataset.WebDataset(shard_names(folder), resampled=True, nodesplitter=None, shardshuffle=False).shuffle(256).decode("pilrgb")
    data = data.to_tuple("jpg", "txt").map_tuple(usual_transform(), lambda text: tokenizer(text)[0]).batched(batch_size)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=NUM_CORES, multiprocessing_context="fork")
    return batches(loader, 2 * NUM_CORES, batch_size, seconds)


def open_clips(folder: Path, batch_size: int, seconds: float) -> Speed:
    from open_clip_train.data import get_wds_dataset

    arguments = Namespace(
        train_data="::".join(shard_names(folder)),
        train_num_samples=10**7,
        dataset_resampled=True,
        train_data_upsampling_factors=None,
        seed=0,
        batch_size=batch_size,
        workers=NUM_CORES,
        world_size=1,
    )
    loader = get_wds_dataset(arguments, usual_transform(), True, tokenizer=open_clip.get_tokenizer("ViT-B-32")).dataloader
    return batches(loader, 2 * NUM_CORES, batch_size, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each measurement (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="pairs in a batch (default %(default)s)")
    parser.add_argument("--only", default="", help="measure only those whose name holds this, beside `bare`")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{NUM_CORES} cores, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory(prefix="cliprd-benchmark-") as temporary:
        for width, height in SIZES:
            generator = np.random.default_rng(0)
            pictures = [picture(generator, width, height) for _ in range(NUM_PICTURES)]
            folder = Path(temporary) / f"{width}x{height}"
            write_shards(folder, pictures)
            print(f"\n{width}x{height}, {np.mean([len(one) for one in pictures]) / 1024:.0f} KiB each")
            print(f"{'':16s}{'images/s':>10s}{'of bare':>9s}{'images/CPU s':>14s}{'of bare':>9s}")
            contenders: dict[str, Callable[[float], Speed]] = {
                "bare": partial(bare, crop, pictures),
                "bare, as usual": partial(bare, crop_as_usual, pictures),
                **{f"TrainLoader {workers}": partial(ours, workers, folder, arguments.batch_size) for workers in (0, 1, NUM_CORES)},
                "webdataset": partial(plain_webdataset, folder, arguments.batch_size),
                "open_clip": partial(open_clips, folder, arguments.batch_size),
            }
            bound: Speed | None = None
            for name, measure in contenders.items():
                if arguments.only in name or name == "bare":
                    speed = measure(arguments.seconds)
                    bound = bound or speed
                    share, cpu_share = (
                        speed.images_per_second / bound.images_per_second,
                        speed.images_per_cpu_second / bound.images_per_cpu_second,
                    )
                    print(f"{name:16s}{speed.images_per_second:10.0f}{share:9.2f}{speed.images_per_cpu_second:14.0f}{cpu_share:9.2f}")
    print(f"\nload {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
