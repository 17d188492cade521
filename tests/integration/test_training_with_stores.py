"""Training from teacher stores: the same losses as with the teacher online, exact resume over a half-filled store, reuse by later jobs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from cliprd_core import run_setup
from cliprd_core.models import ClipModel, LoadedModel, load_teacher
from cliprd_core.run_dir import RESULT_FILE, TEACHER_STORE_VARIABLE, ResultRecord, read_record
from cliprd_core.spec import JobSpec, TeacherSpec
from cliprd_core.store_dir import CREATING_PREFIX
from cliprd_core.store_removal import list_stores
from tests.tiny import tiny_spec, write_shards
from tests.training_runs import TIMEOUT_SECONDS, Inputs, assert_same_weights, losses, make_inputs, run_here, start, wait_for_step

NUM_PAIRS, NUM_STEPS_PER_EPOCH = 32, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


class CountingTeachers:
    """Loads teachers, and counts the rows that go through their image and text towers."""

    def __init__(self) -> None:
        self.num_images = self.num_texts = 0

    def load(self, spec: TeacherSpec, field: str) -> LoadedModel:
        loaded = load_teacher(spec, field)
        self._count(loaded.model)
        return loaded

    def _count(self, model: ClipModel) -> None:
        encode_image = model.encode_image

        def counted(images: Tensor, normalize: bool = False) -> Tensor:
            self.num_images += len(images)
            return encode_image(images, normalize)

        model.encode_image = counted  # type: ignore[method-assign]
        model.ln_final.register_forward_hook(lambda _module, _inputs, output: self._count_texts(len(output)))

    def _count_texts(self, num_texts: int) -> None:
        self.num_texts += num_texts


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> CountingTeachers:
    counting = CountingTeachers()
    monkeypatch.setattr(run_setup, "load_teacher", counting.load)
    return counting


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared folder of the stores."""
    monkeypatch.setenv(TEACHER_STORE_VARIABLE, str(tmp_path / "stores"))
    return tmp_path / "stores"


def with_views(inputs: Inputs, views: int, **training: Any) -> JobSpec:
    return inputs.spec(data={"teacher_views": views, "crop_scale": [0.5, 1.0]}, training=training)


def test_stored_and_online_losses_agree_to_the_precision_of_the_store(inputs: Inputs, tmp_path: Path, root: Path) -> None:
    """As many views as epochs are the crops of the papers' way; 11 bits of mantissa in the features move losses by a thousandth."""
    assert run_here(tmp_path / "online", with_views(inputs, 0)) == 0
    assert not root.exists()
    assert run_here(tmp_path / "filling", with_views(inputs, 2)) == 0
    assert losses(tmp_path / "filling") == pytest.approx(losses(tmp_path / "online"), rel=2e-3)
    assert losses(tmp_path / "filling") != losses(tmp_path / "online")
    assert run_here(tmp_path / "stored", with_views(inputs, 2)) == 0
    assert losses(tmp_path / "stored") == losses(tmp_path / "filling"), "reading gives the very numbers that computing gave"
    assert_same_weights(tmp_path / "stored", tmp_path / "filling")


def test_each_view_is_computed_once_and_texts_once(inputs: Inputs, tmp_path: Path, root: Path, teachers: CountingTeachers) -> None:
    spec = with_views(inputs, 2, epochs=5)
    assert run_here(tmp_path / "first", spec) == 0
    assert (teachers.num_images, teachers.num_texts) == (2 * NUM_PAIRS, NUM_PAIRS)
    (store,) = list_stores(root)
    assert (store.usage.num_images, store.usage.num_texts) == (2 * NUM_PAIRS, NUM_PAIRS)
    other_recipe = with_views(inputs, 2, learning_rate=1e-4, epochs=3, global_batch_size=16)
    assert run_here(tmp_path / "sweep", other_recipe) == 0
    assert (teachers.num_images, teachers.num_texts) == (2 * NUM_PAIRS, NUM_PAIRS), "a sweep never runs the teacher again"
    assert run_here(tmp_path / "other", with_views(inputs, 2, seed=5)) == 0
    assert teachers.num_images == 4 * NUM_PAIRS, "another seed has other crops"
    assert len(list_stores(root)) == 2


def test_killed_with_a_half_filled_store_it_ends_with_the_same_weights(inputs: Inputs, tmp_path: Path) -> None:
    """SIGKILL at random steps, each attempt with another number of loader processes; the reference has a store of its own."""
    specs = [with_views(inputs, 2, epochs=4, num_data_workers=workers, checkpoint_every_steps=3) for workers in (0, 2, 1)]
    assert run_here(tmp_path / "reference", specs[0]) == 0
    killed = tmp_path / "killed"
    steps = sorted(random.Random(time.time_ns()).sample(range(1, 14), k=2))  # of 16
    for attempt, step in enumerate(steps, start=1):
        process = start(killed, specs[attempt], attempt=attempt, held_step=step + 2)
        wait_for_step(killed, step, process, attempt=attempt)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(TIMEOUT_SECONDS)
    assert run_here(killed, specs[0]) == 0
    assert losses(killed) == losses(tmp_path / "reference"), f"killed at steps {steps}"
    assert_same_weights(killed, tmp_path / "reference")


def test_two_jobs_fill_and_use_one_store_at_once(inputs: Inputs, tmp_path: Path, root: Path) -> None:
    spec = with_views(inputs, 1, epochs=3)
    processes = [start(tmp_path / name, spec) for name in ("one", "two")]
    for name, process in zip(("one", "two"), processes, strict=True):
        assert process.wait(TIMEOUT_SECONDS) == 0, (tmp_path / name / "log.txt").read_text()
    (store,) = list_stores(root)
    assert (store.usage.num_images, store.usage.num_texts) == (NUM_PAIRS, NUM_PAIRS)
    assert not list(root.glob(f"{CREATING_PREFIX}*"))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-3)


def test_a_store_that_cannot_be_made_costs_a_warning(
    inputs: Inputs, tmp_path: Path, root: Path, teachers: CountingTeachers, caplog: pytest.LogCaptureFixture
) -> None:
    root.write_text("a file where the folder should be")
    assert run_here(tmp_path / "run", with_views(inputs, 2, epochs=3)) == 0
    assert "so it runs in every step" in caplog.text
    assert teachers.num_images == 3 * NUM_PAIRS


def test_a_run_that_has_a_store_only_later_goes_on_with_the_same_numbers(inputs: Inputs, tmp_path: Path, root: Path) -> None:
    spec = with_views(inputs, 2, epochs=3)
    assert run_here(tmp_path / "stored", spec) == 0
    shutil.rmtree(root)
    root.write_text("a file where the folder should be")
    process = start(tmp_path / "run", spec, held_step=12)
    wait_for_step(tmp_path / "run", 5, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(TIMEOUT_SECONDS)
    root.unlink()
    assert run_here(tmp_path / "run", spec) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "stored")
    assert_same_weights(tmp_path / "run", tmp_path / "stored")


def test_killed_with_corrupt_pairs_it_ends_with_the_same_weights(inputs: Inputs, tmp_path: Path) -> None:
    """Two of 32 pairs cannot be read: others stand in for them, some of them twice in a step."""
    shards = write_shards(tmp_path / "shards", 32)
    content = bytearray(Path(shards).read_bytes())
    for name in (b"000003.png", b"000004.png"):
        place = content.index(name) + 512
        content[place : place + 64] = bytes(64)
    Path(shards).write_bytes(content)
    source = {"type": "webdataset", "shards": shards}
    spec = inputs.spec(data={"teacher_views": 1, "train": [source]}, training={"epochs": 4})
    assert run_here(tmp_path / "reference", spec) == 0
    result = read_record(tmp_path / "reference" / RESULT_FILE, ResultRecord)
    assert result is not None
    assert result.num_corrupt_samples == 2
    step = random.Random(time.time_ns()).randrange(1, 14)
    process = start(tmp_path / "killed", spec, held_step=step + 2)
    wait_for_step(tmp_path / "killed", step, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(TIMEOUT_SECONDS)
    assert run_here(tmp_path / "killed", spec) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "reference"), f"killed at step {step}"
    assert_same_weights(tmp_path / "killed", tmp_path / "reference")


def test_a_tokenizer_of_its_own_has_a_store_of_its_own(inputs: Inputs, tmp_path: Path, root: Path) -> None:
    """The same weights, reading captions in another way."""
    folder = tmp_path / "teacher"
    shutil.copytree(inputs.teacher.removeprefix("local-dir:"), folder)
    spec = tiny_spec(inputs.shards, teacher=f"local-dir:{folder}", data={"teacher_views": 1}, training={"epochs": 1, "warmup_steps": 0})
    assert run_here(tmp_path / "one", spec) == 0
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "whitespace"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert run_here(tmp_path / "two", spec) == 0
    tokenizers = {str(store.meta.key.transform["tokenizer"]) for store in list_stores(root) if store.meta is not None}
    assert len(tokenizers) == 2


def test_two_processes_fill_one_store(inputs: Inputs, tmp_path: Path, root: Path) -> None:
    assert run_here(tmp_path / "alone", with_views(inputs, 1, epochs=3)) == 0
    expected = losses(tmp_path / "alone")
    (store,) = list_stores(root)
    for path in (root / store.key).iterdir():
        path.unlink()
    (root / store.key).rmdir()
    process = start(tmp_path / "run", with_views(inputs, 1, epochs=3), num_processes=2)
    assert process.wait(TIMEOUT_SECONDS) == 0, (tmp_path / "run" / "log.txt").read_text()
    (store,) = list_stores(root)
    assert (store.usage.num_images, store.usage.num_texts) == (NUM_PAIRS, NUM_PAIRS)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-3)
