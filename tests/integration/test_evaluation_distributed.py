"""Several processes share an evaluation, and the main one has what one alone would have found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cliprd_core import distributed
from cliprd_core.control import ControlGroup
from cliprd_core.data.sources import open_sources
from cliprd_core.evaluation import features
from cliprd_core.evaluation_spec import EvaluationSpec
from cliprd_core.spec import WebDatasetSource
from tests.process_group import join_group, run_processes
from tests.unit.test_evaluation_run import COLOURS, ColourModel, run, write_classification, write_retrieval


def check_shared_evaluation(rank: int, num_processes: int, port: int, folder: str) -> None:
    """What each process runs: with batches of 3 images, of which there are more than processes, and with fewer."""
    features.CPU_BATCH_SIZE = 3
    model = ColourModel()
    model.head.weight.data[0, 1] = 0.8  # confuses some colours
    model.register_buffer("statistics", torch.zeros(2))
    root = Path(folder)
    spec = EvaluationSpec(zero_shot=[str(root / "many"), str(root / "few")], retrieval=[str(root / "captions")])
    validation = open_sources([WebDatasetSource(type="webdataset", shards=str(root / "captions/test/0.tar"))], None)
    alone = run(spec, model=model, validation=validation)
    join_group(rank, num_processes, port)
    group = ControlGroup()
    shared = run(spec, model=model, validation=validation, group=group)
    assert shared == (alone if rank == 0 else [])
    assert [one.task for one in alone] == ["zero_shot", "zero_shot", "retrieval", "validation"]
    assert any(0 < value < 1 for one in alone for value in one.metrics.values())
    model.get_buffer("statistics").fill_(rank)
    distributed.broadcast_buffers(model)
    assert model.get_buffer("statistics").tolist() == [0.0, 0.0]
    assert group.broadcast(rank) == 0
    assert group.gather(rank) == (list(range(num_processes)) if rank == 0 else None)
    group.wait()
    dist.destroy_process_group()


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_an_evaluation(num_processes: int, tmp_path: Path) -> None:
    write_classification(tmp_path / "many", [number * 7 % 6 for number in range(23)])
    write_classification(tmp_path / "few", [1, 4])
    names = ("red", "green", "blue", "grey", "cyan", "pink")
    write_retrieval(tmp_path / "captions", [(number % len(COLOURS), names[number % 6]) for number in range(11)])
    run_processes(check_shared_evaluation, num_processes, str(tmp_path))
