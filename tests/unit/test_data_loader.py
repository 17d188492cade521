"""The training loader: the same batches however they are made, corrupt pairs, several models' inputs, and its processes' manners."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cliprd_core.data.batch import Batch, FeatureReader, ModelInput
from cliprd_core.data.batch_builder import BatchBuilder
from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.hashing import CROP_STREAM, stream_key, uniforms
from cliprd_core.data.loader import TrainLoader, build_train_loader
from cliprd_core.data.plan import Plan
from cliprd_core.data.sources import PairSource, open_sources
from cliprd_core.data.tokens import same_tokens
from cliprd_core.data.transforms import DRAWS_PER_CROP, decode_rgb, random_crop_box, resize_crop
from cliprd_core.spec import JobSpec
from tests.data_files import CONTEXT_LENGTH, character_tokenizer, image_bytes, model_input, pair_members, reversing_tokenizer, write_tar
from tests.feature_stores import MemoryStore

NUM_PAIRS = 42
GLOBAL_BATCH_SIZE = 8  # 5 steps an epoch, 2 pairs dropped


def job(folder: Path, teacher_views: int = 0, **training: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "test",
            "recipe": "clip",
            "student": {"model": "ViT-T-16"},
            "data": {
                "train": [{"type": "webdataset", "shards": str(folder / "*.tar")}],
                "crop_scale": (0.5, 1.0),
                "teacher_views": teacher_views,
            },
            "training": {"global_batch_size": GLOBAL_BATCH_SIZE, "num_data_workers": 0, "seed": 3, **training},
            "resources": {"device": "cpu"},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of readable pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    write_tar(folder / "0.tar", pair_members(range(20)))
    write_tar(folder / "1.tar", pair_members(range(20, NUM_PAIRS)))
    return folder


def loader(
    folder: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    teachers: Sequence[ModelInput] = (),
    teacher_views: int = 0,
    readers: Sequence[FeatureReader | None] = (),
    **training: Any,
) -> TrainLoader:
    spec = job(folder, teacher_views, **training)
    source = open_sources(spec.data.train, folder / "cache")
    return build_train_loader(spec, source, student=model_input(), teachers=teachers, readers=readers, rank=rank, world_size=world_size)


def epochs(train_loader: TrainLoader, count: int) -> list[Batch]:
    with closing(train_loader):
        return [batch for epoch in range(count) for batch in train_loader.epoch(epoch)]


def joined(batches: list[list[Batch]]) -> list[Batch]:
    """The global batches of several ranks' batches."""
    return [
        Batch(
            sample_indices=torch.cat([share.sample_indices for share in shares]),
            stand_ins=torch.cat([share.stand_ins for share in shares]),
            view=shares[0].view,
            student_pixels=torch.cat([share.student_pixels for share in shares]),
            student_tokens=torch.cat([share.student_tokens for share in shares]),
        )
        for shares in zip(*batches, strict=True)
    ]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.sample_indices, other.sample_indices)
        assert torch.equal(one.student_pixels, other.student_pixels)
        assert torch.equal(one.student_tokens, other.student_tokens)


class TestDeterminism:
    @pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on a machine with fewer cores
    @pytest.mark.parametrize("num_data_workers", [1, 3])
    def test_number_of_loader_processes_changes_nothing(self, folder: Path, num_data_workers: int) -> None:
        assert_same(epochs(loader(folder), 3), epochs(loader(folder, num_data_workers=num_data_workers), 3))

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_number_of_training_processes_changes_no_global_batch(self, folder: Path, world_size: int) -> None:
        shares = [epochs(loader(folder, rank=rank, world_size=world_size), 2) for rank in range(world_size)]
        assert_same(joined(shares), epochs(loader(folder), 2))

    @pytest.mark.parametrize("num_data_workers", [0, 2])
    @pytest.mark.parametrize("start", [(0, 0), (0, 3), (1, 1), (1, 5)])
    def test_resuming_anywhere_gives_the_rest(self, folder: Path, num_data_workers: int, start: tuple[int, int]) -> None:
        whole = epochs(loader(folder), 3)
        epoch, step = start
        with closing(loader(folder, num_data_workers=num_data_workers)) as resumed:
            rest = list(resumed.epoch(epoch, step))
            for later in range(epoch + 1, 3):
                rest += list(resumed.epoch(later))
        assert_same(rest, whole[epoch * 5 + step :])

    @pytest.mark.parametrize("num_data_workers", [0, 2])
    def test_leaving_an_epoch_and_going_elsewhere(self, folder: Path, num_data_workers: int) -> None:
        whole = epochs(loader(folder), 2)
        with closing(loader(folder, num_data_workers=num_data_workers)) as train_loader:
            iterator = train_loader.epoch(0)
            first = [next(iterator), next(iterator)]
            assert_same(first, whole[:2])
            assert_same(list(train_loader.epoch(0, 2)), whole[2:5])
            assert_same(list(train_loader.epoch(1, 3)), whole[8:])
            assert_same(list(train_loader.epoch(0)), whole[:5])

    def test_torchs_and_numpys_global_randomness_is_neither_used_nor_advanced(self, folder: Path) -> None:
        torch.manual_seed(0)
        before = torch.random.get_rng_state()
        first = epochs(loader(folder, num_data_workers=1), 1)
        assert torch.equal(before, torch.random.get_rng_state())
        torch.manual_seed(1)
        assert_same(first, epochs(loader(folder, num_data_workers=1), 1))

    def test_seed_changes_order_and_crops(self, folder: Path) -> None:
        first, other = epochs(loader(folder), 1)[0], epochs(loader(folder, seed=4), 1)[0]
        assert not torch.equal(first.sample_indices, other.sample_indices)

    def test_an_epoch_has_each_pair_at_most_once_and_other_crops_than_the_last(self, folder: Path) -> None:
        batches = epochs(loader(folder), 2)
        images: list[dict[int, torch.Tensor]] = []
        for epoch in range(2):
            mine = batches[epoch * 5 : epoch * 5 + 5]
            indices = torch.cat([batch.sample_indices for batch in mine]).tolist()
            assert len(set(indices)) == 40
            images.append(dict(zip(indices, torch.cat([batch.student_pixels for batch in mine]), strict=True)))
        common = images[0].keys() & images[1].keys()
        same = sum(torch.equal(images[0][index], images[1][index]) for index in common)
        assert len(common) >= 38
        assert same < 10

    def test_start_step_outside_the_epoch_is_refused(self, folder: Path) -> None:
        with closing(loader(folder)) as train_loader:
            assert (train_loader.num_samples, train_loader.num_steps_per_epoch) == (NUM_PAIRS, 5)
            with pytest.raises(ValueError, match="steps 0 to 4"):
                train_loader.epoch(0, 6)


class TestContent:
    def test_batch_is_made_of_the_pairs_it_names(self, folder: Path) -> None:
        source = open_sources(job(folder).data.train, folder / "cache")
        student = model_input()
        batch = epochs(loader(folder), 1)[2]
        assert batch.student_pixels.dtype == torch.uint8
        assert batch.student_pixels.is_contiguous()
        for row, index in enumerate(batch.sample_indices.tolist()):
            sample = source.read(index)
            image = decode_rgb(sample.key, sample.image_bytes)
            draws = uniforms(stream_key(CROP_STREAM, 3, 0), torch.tensor([index]).numpy(), DRAWS_PER_CROP)[0].tolist()
            pixels = resize_crop(image, random_crop_box(*image.size, (0.5, 1.0), draws), student.preprocess)
            assert torch.equal(batch.student_pixels[row], torch.from_numpy(pixels.copy()))
            assert torch.equal(batch.student_tokens[row], character_tokenizer([sample.caption])[0])

    def test_teacher_that_sees_and_reads_the_same_gets_nothing_of_its_own(self, folder: Path) -> None:
        batch = epochs(loader(folder, teachers=[model_input()]), 1)[0]
        assert batch.teacher_pixels == (None,)
        assert batch.teacher_tokens == (None,)
        assert batch.inputs_of_teacher(0) == (batch.student_pixels, batch.student_tokens)

    def test_each_teacher_gets_what_it_wants(self, folder: Path) -> None:
        teachers = [model_input(mean=0.25), model_input(), model_input(image_size=24, tokenizer=reversing_tokenizer)]
        batch = epochs(loader(folder, teachers=teachers), 1)[0]
        for index, teacher in enumerate(teachers):
            alone = epochs(loader(folder, teachers=[teacher]), 1)[0]
            for given, expected in zip(batch.inputs_of_teacher(index), alone.inputs_of_teacher(0), strict=True):
                assert torch.equal(given, expected)

    def test_teacher_of_other_normalisation_sees_the_same_pixels(self, folder: Path) -> None:
        batch = epochs(loader(folder, teachers=[model_input(mean=0.25)]), 1)[0]
        assert batch.teacher_pixels == (None,), "normalising is the step's"
        assert batch.teacher_tokens == (None,)

    def test_teacher_of_other_size_sees_the_same_box(self, tmp_path: Path) -> None:
        """Student at 12 pixels, teacher at 24: the teacher's image, shrunk, is the student's."""
        write_tar(
            tmp_path / "0.tar",
            {name: image_bytes(3, size=(96, 96)) if name.endswith("png") else text for name, text in pair_members(range(8)).items()},
        )
        teacher = model_input(image_size=24, tokenizer=reversing_tokenizer)
        batch = epochs(loader(tmp_path, teachers=[teacher]), 1)[0]
        images, tokens = batch.inputs_of_teacher(0)
        assert images.shape == (8, 24, 24, 3)
        assert batch.student_pixels.shape == (8, 12, 12, 3)
        shrunk = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 2).permute(0, 2, 3, 1)
        same_row = (shrunk - batch.student_pixels.float()).abs().mean()
        other_row = (shrunk - batch.student_pixels.float().roll(1, 0)).abs().mean()
        assert same_row < other_row / 2
        captions = [f"caption {index}" for index in batch.sample_indices.tolist()]
        assert torch.equal(tokens, reversing_tokenizer(captions))
        assert torch.equal(batch.student_tokens, character_tokenizer(captions))

    def test_views_are_taken_in_turn_by_epochs_and_a_limit_changes_none_of_them(self, folder: Path) -> None:
        """View v is the crop that epoch v would have without a limit."""
        free = epochs(loader(folder, teachers=[model_input()], teacher_views=0), 3)
        turns = epochs(loader(folder, teachers=[model_input()], teacher_views=2), 4)
        assert [batch.view for batch in free[::5]] == [0, 1, 2]
        assert [batch.view for batch in turns[::5]] == [0, 1, 0, 1]
        assert_same(turns[:10], free[:10])
        crops: list[dict[int, torch.Tensor]] = []
        for mine in (turns[:5], turns[10:15]):
            indices = torch.cat([batch.sample_indices for batch in mine]).tolist()
            crops.append(dict(zip(indices, torch.cat([batch.student_pixels for batch in mine]), strict=True)))
        common = crops[0].keys() & crops[1].keys()
        assert len(common) >= 38
        assert all(torch.equal(crops[0][index], crops[1][index]) for index in common), "the third epoch sees the first one's crops"

    def test_teachers_whose_features_are_stored_get_no_inputs(self, folder: Path) -> None:
        store = MemoryStore(NUM_PAIRS, 4, num_views=1)
        teacher = model_input(image_size=24, tokenizer=reversing_tokenizer)
        made = loader(folder, teachers=[teacher], teacher_views=1, readers=[store])
        batches = epochs(made, 1)
        assert all(batch.teacher_pixels[0] is not None and batch.teacher_tokens[0] is not None for batch in batches)
        store.image_present[:], store.text_present[:] = True, True
        store.images.normal_()
        for before, batch in zip(batches, epochs(loader(folder, teachers=[teacher], teacher_views=1, readers=[store]), 1), strict=True):
            assert (batch.teacher_pixels, batch.teacher_tokens) == ((None,), (None,))
            assert torch.equal(batch.student_pixels, before.student_pixels)
            (stored,) = batch.stored_features
            assert stored is not None
            assert torch.equal(stored.image, store.images[0, batch.sample_indices])
            with pytest.raises(AssertionError, match="not prepared"):
                batch.inputs_of_teacher(0)

    def test_no_store_is_asked_for_stand_ins(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", pair_members(range(8), corrupt=frozenset({2})))
        store = MemoryStore(8, 4, num_views=1)
        store.image_present[:], store.text_present[:] = True, True
        (batch,) = epochs(loader(tmp_path, teachers=[model_input(image_size=24)], teacher_views=1, readers=[store]), 1)
        assert sorted(batch.sample_indices.tolist()) == [0, 1, 3, 3, 4, 5, 6, 7]
        row = batch.stand_ins.nonzero().item()
        (stored,) = batch.stored_features
        assert stored is not None
        assert (~stored.image_present).nonzero().item() == (~stored.text_present).nonzero().item() == row
        images, _ = batch.inputs_of_teacher(0)
        assert images.shape == (8, 24, 24, 3), "so the teacher has to run"

    def test_captions_beyond_the_token_cache_are_tokenised_all_the_same(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = epochs(loader(folder), 2)
        monkeypatch.setattr("cliprd_core.data.tokens.MAX_CACHE_BYTES", 10 * 4 * (CONTEXT_LENGTH + 1))
        assert_same(epochs(loader(folder), 2), whole)

    def test_equal_tokenizers_are_recognised(self) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        def of(context_length: int, **options: Any) -> ModelInput:
            return ModelInput(model_input().preprocess, SimpleTokenizer(context_length=context_length, **options), context_length)

        assert same_tokens(of(16), of(16))
        assert not same_tokens(of(16), of(32))
        assert not same_tokens(of(16), of(16, clean="canonicalize"))
        assert not same_tokens(of(16), of(16, additional_special_tokens=["<extra>"]))
        assert not same_tokens(model_input(), model_input(tokenizer=reversing_tokenizer))

    def test_moving_a_batch_keeps_what_is_absent_absent(self, folder: Path) -> None:
        batch = epochs(loader(folder, teachers=[model_input(image_size=24)]), 1)[0].to(torch.device("cpu"))
        assert [one is None for one in batch.teacher_pixels] == [False]
        assert batch.teacher_tokens == (None,)


class TestCorruptPairs:
    @pytest.fixture
    def broken(self, tmp_path: Path) -> Path:
        write_tar(tmp_path / "0.tar", pair_members(range(NUM_PAIRS), corrupt=frozenset({5, 6, 30, NUM_PAIRS - 1})))
        return tmp_path

    @pytest.mark.parametrize("num_data_workers", [0, 2])
    def test_next_readable_pair_stands_in_and_each_is_warned_of_once(
        self, broken: Path, num_data_workers: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        plan = Plan(NUM_PAIRS, GLOBAL_BATCH_SIZE, seed=3)
        stand_ins = {5: 7, 6: 7, 30: 31, NUM_PAIRS - 1: 0}
        with closing(loader(broken, num_data_workers=num_data_workers)) as train_loader, caplog.at_level(logging.WARNING):
            for epoch in range(3):
                for step, batch in enumerate(train_loader.epoch(epoch)):
                    planned = plan.request(epoch, step).indices.tolist()
                    assert batch.sample_indices.tolist() == [stand_ins.get(index, index) for index in planned]
                    assert torch.equal(
                        batch.student_tokens, character_tokenizer([f"caption {index}" for index in batch.sample_indices.tolist()])
                    )
            assert len(train_loader.corrupt_indices) == 4
            assert train_loader.corrupt_indices == {5, 6, 30, NUM_PAIRS - 1}
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 4
        assert any("0.tar:000030: cannot decode its image" in message for message in messages)

    def test_stand_ins_do_not_depend_on_the_number_of_processes(self, broken: Path) -> None:
        shares = [epochs(loader(broken, rank=rank, world_size=2), 2) for rank in range(2)]
        assert_same(joined(shares), epochs(loader(broken), 2))

    @pytest.mark.parametrize("num_data_workers", [0, 1])
    def test_mostly_corrupt_batch_is_refused(self, tmp_path: Path, num_data_workers: int) -> None:
        write_tar(tmp_path / "0.tar", pair_members(range(8), corrupt=frozenset(range(5))))
        train_loader = loader(tmp_path, num_data_workers=num_data_workers)
        with closing(train_loader), pytest.raises(InvalidDataError, match=r"^5 of the 8 pairs of one batch cannot be read.*0\.tar:0000"):
            next(train_loader.epoch(0))

    def test_half_corrupt_batch_is_used(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", pair_members(range(8), corrupt=frozenset(range(4))))
        assert set(epochs(loader(tmp_path), 1)[0].sample_indices.tolist()) == {4, 5, 6, 7}

    def test_a_share_may_be_mostly_corrupt_if_the_global_batch_is_not(self, tmp_path: Path) -> None:
        """Of 8 pairs 3 are corrupt, and all 3 are in the first half: with 2 processes one has 3 of 4 corrupt, which is no error."""
        first_half = Plan(8, 8, seed=3, rank=0, world_size=2).request(0, 0).indices.tolist()
        write_tar(tmp_path / "0.tar", pair_members(range(8), corrupt=frozenset(first_half[:3])))
        shares = [epochs(loader(tmp_path, rank=rank, world_size=2), 1) for rank in range(2)]
        assert_same(joined(shares), epochs(loader(tmp_path), 1))

    def test_every_process_refuses_what_one_process_would(self, tmp_path: Path) -> None:
        """5 of 8 corrupt, 4 of them in one share: that share's process must see that the global batch is lost."""
        halves = [Plan(8, 8, seed=3, rank=rank, world_size=2).request(0, 0).indices.tolist() for rank in range(2)]
        write_tar(tmp_path / "0.tar", pair_members(range(8), corrupt=frozenset([*halves[0], halves[1][0]])))
        with pytest.raises(InvalidDataError, match="5 of the 8"):
            epochs(loader(tmp_path, rank=0, world_size=2), 1)

    def test_too_few_pairs_for_a_batch(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", pair_members(range(7)))
        with pytest.raises(InvalidDataError, match="7 training pairs"):
            loader(tmp_path)

    def test_builder_refuses_an_unknown_interpolation(self, folder: Path) -> None:
        source: PairSource = open_sources(job(folder).data.train, folder / "cache")
        student = model_input()
        object.__setattr__(student.preprocess, "interpolation", "lanczos")
        with pytest.raises(ValueError, match="interpolation"):
            BatchBuilder(source, student=student, teachers=[], crop_scale=(0.9, 1.0), seed=0)


TRAINER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from tests.unit.test_data_loader import loader
    train_loader = loader(Path(sys.argv[1]), num_data_workers=2)
    batches = train_loader.epoch(0)
    next(batches), next(batches)  # one of each loader process, so both are set up
    print("ready", flush=True)
    if sys.stdin.readline() == "fail\\n":
        raise RuntimeError("the trainer failed, and closed nothing")
    print(sum(1 for _ in batches) + sum(1 for _ in train_loader.epoch(1)), flush=True)
    train_loader.close()
"""


class TestProcesses:
    @pytest.fixture
    def trainer(self, folder: Path) -> Iterator[subprocess.Popen[str]]:
        """A process that has begun an epoch with two loader processes, and goes on when a line is sent to it."""
        repository = str(Path(__file__).parents[2])
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TRAINER), str(folder), repository],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with process:
            yield process
            process.kill()

    def test_loader_processes_ignore_the_signals_that_stop_a_run(self, trainer: subprocess.Popen[str]) -> None:
        children = psutil.Process(trainer.pid).children()
        assert len(children) == 2
        for child in children:
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert all(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
        output, _ = trainer.communicate("\n", timeout=120)
        assert output == "8\n"  # 3 batches left of epoch 0, 5 of epoch 1
        assert trainer.returncode == 0
        assert not psutil.wait_procs(children, timeout=60)[1]

    def test_loader_processes_die_with_the_trainer(self, trainer: subprocess.Popen[str]) -> None:
        children = psutil.Process(trainer.pid).children()
        assert len(children) == 2
        for child in children:
            child.suspend()  # so that torch's own check, each 5 seconds, has no part in this
        trainer.kill()
        gone, alive = psutil.wait_procs(children, timeout=60)
        for child in alive:
            child.kill()
        assert not alive, gone

    def test_a_trainer_that_fails_does_not_wait_for_them(self, trainer: subprocess.Popen[str]) -> None:
        children = psutil.Process(trainer.pid).children()
        trainer.communicate("fail\n", timeout=120)
        assert trainer.returncode == 1
        assert not psutil.wait_procs(children, timeout=60)[1]

    def test_closing_ends_them(self, folder: Path) -> None:
        train_loader = loader(folder, num_data_workers=2)
        before = set(psutil.Process().children())  # another test's
        next(train_loader.epoch(0))
        children = set(psutil.Process().children()) - before
        assert len(children) == 2
        train_loader.close()
        train_loader.close()
        assert not psutil.wait_procs(children, timeout=60)[1]

    def test_a_killed_process_is_told_though_the_handler_s_word_was_lost(self, folder: Path) -> None:
        """torch tells it by an exception from its handler of SIGCHLD, which code that bears any exception swallows, such as logging's."""
        with closing(loader(folder, num_data_workers=1)) as train_loader:
            before = set(psutil.Process().children())
            batches = train_loader.epoch(0)
            next(batches)
            (child,) = set(psutil.Process().children()) - before
            handler = signal.signal(signal.SIGCHLD, lambda *_: None)
            try:
                child.kill()
                with pytest.raises(RuntimeError, match=f"{child.pid}\\) is killed by signal: Killed"):
                    list(batches)
            finally:
                signal.signal(signal.SIGCHLD, handler)
