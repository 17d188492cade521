"""Where jobs may read from: at submission, and again where the trainer opens files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cliprd_core.data.errors import CorruptSampleError, InvalidDataError
from cliprd_core.data.sources import expand_shards, open_sources
from cliprd_core.evaluation.datasets import load_classification_set
from cliprd_core.evaluation_spec import EvaluationSet
from cliprd_core.locations import DATA_ROOTS_VARIABLE, REMOTE_HOSTS_VARIABLE, ForbiddenLocationError, Locations, ServiceFileError
from cliprd_core.models import load_student, load_teacher
from cliprd_core.spec import CsvSource, JobSpec, StudentSpec, TeacherSpec, WebDatasetSource
from service.problems import FieldProblem, SpecError
from service.settings import Settings
from service.spec_check import MAX_PATH_DEPTH, check_spec
from tests.store_helpers import TINY_CONFIG, spec_dict, write_table, write_tar
from worker.settings import WorkerSettings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The one folder that jobs may read; `outside` and `root-2` beside it hold the same, and `root/link` leads out."""
    for name in ("root", "outside", "root-2"):
        folder = tmp_path / name
        split = folder / "set" / "test"
        split.mkdir(parents=True)
        write_table(folder)
        write_tar(folder / "0.tar", 4)
        write_tar(split / "0.tar", 4)
        (split / "nshards.txt").write_text("1")
        (folder / "set" / "classnames.txt").write_text("cat\n")
        (folder / "set" / "zeroshot_classification_templates.txt").write_text("a {c}\n")
        (folder / "weights.pt").write_bytes(b"weights")
        (folder / "open_clip_config.json").write_text("{}")
        (folder / "open_clip_model.safetensors").write_bytes(b"weights")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "root" / "inner").symlink_to(tmp_path / "root")
    return tmp_path / "root"


def problems(root: Path, *, hosts: tuple[str, ...] = (), **changes: Any) -> dict[str, FieldProblem]:
    try:
        check_spec(JobSpec.model_validate(spec_dict(**changes)), data_root=root, locations=Locations.of([root], hosts))
    except SpecError as error:
        return {one.field: one for one in error.problems}
    return {}


def shards(pattern: str) -> dict[str, Any]:
    return {"data": {"train": [{"type": "webdataset", "shards": pattern}]}}


CASES: list[tuple[str, Callable[[str], dict[str, Any]]]] = [
    ("data.train.0.path", lambda folder: {"data": {"train": [{"type": "csv", "path": f"{folder}/pairs.tsv"}]}}),
    ("data.train.0.image_root", lambda folder: {"data": {"train": [{"type": "csv", "path": "pairs.tsv", "image_root": folder}]}}),
    ("data.train.0.shards", lambda folder: shards(f"{folder}/0.tar")),
    ("data.train.0.shards", lambda folder: shards(f"{folder}/*.tar")),
    ("evaluation.zero_shot.0.path", lambda folder: {"evaluation": {"zero_shot": [f"{folder}/set"]}}),
    ("student.pretrained", lambda folder: {"student": {"config": TINY_CONFIG, "pretrained": f"{folder}/weights.pt"}}),
    ("student.model", lambda folder: {"student": {"model": f"local-dir:{folder}"}}),
    ("teacher.pretrained", lambda folder: {"recipe": "clip_kd", "teacher": {"model": "RN50", "pretrained": f"{folder}/weights.pt"}}),
    ("teachers.0.model", lambda folder: {"recipe": "clip_kd", "teachers": [{"model": f"local-dir:{folder}"}]}),
]


@pytest.mark.parametrize(("field", "changes"), CASES)
def test_each_field_of_a_spec_is_held_to_the_roots(root: Path, field: str, changes: Callable[[str], dict[str, Any]]) -> None:
    for allowed in (".", "inner"):
        assert problems(root, **changes(allowed)) == {}
    for folder in ("../outside", str(root.parent / "outside"), "../root-2", "link", "inner/link"):
        found = problems(root, **changes(folder))
        assert list(found) == [field], folder
        assert found[field].problem.endswith(f"is outside the folders that jobs may read: {root}")
        assert "CLIPRD_DATA_ROOTS" in found[field].remedy
    assert "(it leads to" in problems(root, **changes("link"))[field].problem


@pytest.mark.parametrize(
    ("field", "name", "changes"),
    [
        ("evaluation.zero_shot.0.path", "set/classnames.txt", {"evaluation": {"zero_shot": ["set"]}}),
        ("evaluation.zero_shot.0.path", "set/test/0.tar", {"evaluation": {"zero_shot": ["set"]}}),
        ("data.train.0.shards", "0.tar", shards("?.tar")),
        ("student.model", "open_clip_model.safetensors", {"student": {"model": "local-dir:."}}),
    ],
)
def test_files_inside_a_root_that_lead_out_of_it_are_refused(root: Path, field: str, name: str, changes: dict[str, Any]) -> None:
    (root / name).unlink()
    (root / name).symlink_to(root.parent / "outside" / name)
    assert "is outside" in problems(root, **changes)[field].problem


def test_a_glob_does_not_look_outside(root: Path) -> None:
    found = problems(root, **shards("../outside/none*.tar"))["data.train.0.shards"]
    assert "is outside" in found.problem, "not: no file matches"
    for pattern in ("*/../../outside/*.tar", "{0,../outside/0}.tar", "{0,link/*}.tar"):
        assert "is outside" in problems(root, **shards(pattern))["data.train.0.shards"].problem, pattern


@pytest.mark.parametrize(
    ("address", "is_allowed"),
    [
        ("https://data.example/0.tar", True),
        ("https://DATA.example:443/0.tar", True),
        ("http://user:secret@data.example/{0..3}.tar", True),
        ("s3://bucket/0.tar", True),
        ("http://other.example:8080/0.tar", True),
        ("http://other.example/0.tar", False),
        ("s3://data.example/0.tar", False),
        ("https://bucket/0.tar", False),
        ("https://data.example.evil/0.tar", False),
        ("https://data.example@evil/0.tar", False),
        ("https://{data.example,169.254.169.254}/0.tar", False),
    ],
)
def test_remote_hosts_must_be_on_the_list(root: Path, address: str, is_allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ("data.example", "s3://bucket", "other.example:8080")
    found = problems(root, hosts=hosts, **shards(address))
    assert (found == {}) is is_allowed
    if not is_allowed:
        assert "none of the remote hosts" in found["data.train.0.shards"].problem
        assert "secret" not in found["data.train.0.shards"].problem
    assert "data.train.0.shards" in problems(root, **shards(address)), "none is allowed by default"
    assert problems(root, hosts=("*",), **shards(address)) == {}
    monkeypatch.setenv(REMOTE_HOSTS_VARIABLE, ",".join(hosts))
    if is_allowed:
        assert list(expand_shards(address))
    else:
        with pytest.raises(InvalidDataError, match=r"`shards`: .*remote hosts"):
            list(expand_shards(address))


def test_paths_of_absurd_depth_are_refused(root: Path) -> None:
    found = problems(root, **shards("a/" * (MAX_PATH_DEPTH + 1) + "0.tar"))
    assert str(MAX_PATH_DEPTH) in found["data.train.0.shards"].problem


def test_the_trainer_looks_again(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A link may have been changed since the submission."""
    monkeypatch.setenv(DATA_ROOTS_VARIABLE, str(root))
    cache = tmp_path / "cache"
    outside = root / "link"
    with pytest.raises(InvalidDataError, match=rf"`shards`: .*leads to.*jobs may read: {root}"):
        open_sources([WebDatasetSource(type="webdataset", shards=f"{outside}/0.tar")], cache)
    with pytest.raises(InvalidDataError, match=r"`path`: .*jobs may read"):
        open_sources([CsvSource(type="csv", path=f"{outside}/pairs.tsv")], cache)
    with pytest.raises(InvalidDataError, match="jobs may read"):
        load_classification_set(EvaluationSet(path=f"{outside}/set"), cache)
    (root / "set" / "classnames.txt").unlink()
    (root / "set" / "classnames.txt").symlink_to(outside / "set" / "classnames.txt")
    with pytest.raises(InvalidDataError, match="jobs may read"):
        load_classification_set(EvaluationSet(path=f"{root}/set"), cache)
    with pytest.raises(ValueError, match=r"`student.pretrained`: .*jobs may read"):
        load_student(StudentSpec(config=TINY_CONFIG, pretrained=f"{outside}/weights.pt"), seed=0)
    with pytest.raises(ValueError, match=r"`teacher.model`: .*jobs may read"):
        load_teacher(TeacherSpec(model=f"local-dir:{outside}"))


def test_a_row_of_a_table_does_not_lead_out(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    secret = tmp_path / "outside" / "secret.png"
    secret.write_bytes(b"secret")
    (root / "fine.png").write_bytes(b"fine")
    (root / "rows.tsv").write_text(f"filepath\ttitle\nfine.png\ta\n{secret}\tb\n../outside/secret.png\tc\nlink/secret.png\td\n")
    source = CsvSource(type="csv", path=str(root / "rows.tsv"))
    assert open_sources([source], tmp_path).read(1).image_bytes == b"secret"
    monkeypatch.setenv(DATA_ROOTS_VARIABLE, str(root))
    pairs = open_sources([source], tmp_path)
    assert pairs.read(0).image_bytes == b"fine"
    for row in (1, 2, 3):
        with pytest.raises(CorruptSampleError, match="jobs may read"):
            pairs.read(row)
    assert pairs.fingerprint


@pytest.mark.parametrize(("field", "changes"), CASES)
def test_the_services_own_files_are_no_data(root: Path, field: str, changes: Callable[[str], dict[str, Any]]) -> None:
    home = root / ".cliprd"
    shutil.copytree(root.parent / "outside", home)
    (root / "way").symlink_to(home)
    locations = Locations.of([root], (), home=home)
    for folder in (".cliprd", str(home), "way"):
        with pytest.raises(SpecError) as error:
            check_spec(JobSpec.model_validate(spec_dict(**changes(folder))), data_root=root, locations=locations)
        assert [one.field for one in error.value.problems] == [field]
        assert f"is in {home}, where the service keeps its own files" in error.value.problems[0].problem
        assert "CLIPRD_DATA_ROOTS" not in error.value.problems[0].remedy
    check_spec(JobSpec.model_validate(spec_dict(**changes("."))), data_root=root, locations=locations)
    within = Locations.of([root, home / "set", home], (), home=home)  # a run directory, say
    within.check_path(home / "set" / "classnames.txt")
    for private in (home, home / "0.tar"):
        with pytest.raises(ServiceFileError):
            within.check_path(private)


def test_a_glob_tells_nothing_of_the_services_own_files(root: Path) -> None:
    (root / ".cliprd" / "redis").mkdir(parents=True)
    (root / ".cliprd" / "redis" / "redis.conf").write_text("requirepass secret")
    locations = Locations.of([root], (), home=root / ".cliprd")
    with pytest.raises(SpecError) as error:
        check_spec(JobSpec.model_validate(spec_dict(**shards(".c*/redis/*.conf"))), data_root=root, locations=locations)
    assert "the service keeps its own files" in error.value.problems[0].problem, "not: it is no tar"


def test_the_trainer_reads_none_of_the_services_own_files(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor through a link or a table's row."""
    home = root / ".cliprd"
    shutil.copytree(root.parent / "outside", home)
    for name, value in Locations.of([root], (), home=home).environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidDataError, match="the service keeps its own files"):
        open_sources([CsvSource(type="csv", path=str(home / "pairs.tsv"))], tmp_path)
    (root / "rows.tsv").write_text(f"filepath\ttitle\n{home}/weights.pt\ta\n")
    pairs = open_sources([CsvSource(type="csv", path=str(root / "rows.tsv"))], tmp_path)
    with pytest.raises(CorruptSampleError, match="the service keeps its own files"):
        pairs.read(0)


def test_settings_of_service_and_worker_say_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "1"
    monkeypatch.chdir(tmp_path)
    home = str(tmp_path / ".cliprd")
    assert Settings().locations == Locations((str(tmp_path),), (), home)
    assert WorkerSettings().locations_of(run) == Locations((str(tmp_path), str(run)), (), home)
    monkeypatch.setenv("CLIPRD_DATA_ROOT", "data")
    assert Settings().locations.roots == (f"{tmp_path}/data",)
    monkeypatch.setenv(DATA_ROOTS_VARIABLE, f"/data{os.pathsep}more")
    monkeypatch.setenv(REMOTE_HOSTS_VARIABLE, "Data.Example, s3://Bucket")
    assert Settings().locations == Locations(("/data", f"{tmp_path}/more"), ("data.example", "s3://bucket"), home)
    told = WorkerSettings().locations_of(run)
    assert told.roots == ("/data", f"{tmp_path}/more", str(run))
    assert Locations.from_environment(told.environment()) == told
    assert Locations.from_environment({}) == Locations()


def test_without_limits_everything_may_be_read() -> None:
    Locations().check_path("/etc/passwd")
    Locations().check_url("https://anywhere/x.tar")
    with pytest.raises(ForbiddenLocationError, match="none"):
        Locations((), ()).check_path("/etc/passwd")
    Locations(("/",), ()).check_path("/etc/passwd")


@pytest.mark.parametrize(
    ("tower", "key", "value"),
    [
        ("text_cfg", "hf_tokenizer_name", "/etc"),
        ("text_cfg", "hf_tokenizer_name", "../secret"),
        ("text_cfg", "hf_model_name", "a/../../secret"),
        ("vision_cfg", "timm_model_name", "local-dir:/data/secret"),
        ("vision_cfg", "timm_model_name", "hf-hub:someone/anything"),
    ],
)
def test_a_model_config_names_no_folder(root: Path, tower: str, key: str, value: str) -> None:
    config = {**TINY_CONFIG, tower: {**TINY_CONFIG[tower], key: value}}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=f"{tower}.{key}.*plain name"):
        JobSpec.model_validate(spec_dict(student={"config": config}))
    (root / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(ValueError, match=f"{tower}.{key}.*plain name"):
        load_teacher(TeacherSpec(model=f"local-dir:{root}"))
