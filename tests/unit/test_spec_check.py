"""What is checked of a spec at its submission, and how its paths are resolved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cliprd_core.locations import Locations
from cliprd_core.model_size import ModelSize
from cliprd_core.spec import JobSpec, StudentSpec
from service import data_files
from service.examples import EXAMPLES, QUICK_SPEC
from service.model_config_check import model_config_problems
from service.model_sizes import Unknown, size_of_model
from service.problems import FieldProblem, SpecError
from service.spec_check import check_parts, check_spec
from tests.store_helpers import CONFIG_KEYS, ODD_VALUES, TINY_CONFIG, spec_dict, write_table, write_tar

SMALL = {"global_batch_size": 2, "warmup_steps": 1}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two shards of 10 pairs, a table, a zero-shot and a retrieval set, a checkpoint and a model folder."""
    (tmp_path / "train").mkdir()
    for name in ("00000.tar", "00001.tar"):
        write_tar(tmp_path / "train" / name, num_pairs=10)
    write_table(tmp_path)
    for name in ("classes", "captions"):
        split = tmp_path / "wds" / name / "test"
        split.mkdir(parents=True)
        (split / "nshards.txt").write_text("2\n")
        for shard in ("0.tar", "1.tar"):
            write_tar(split / shard, num_pairs=1)
    (tmp_path / "wds/classes/classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "wds/classes/zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    (tmp_path / "wds/captions/dataset_type.txt").write_text("retrieval\n")
    (tmp_path / "model.pt").write_bytes(b"weights")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported/open_clip_config.json").write_text("{}")
    (tmp_path / "exported/open_clip_model.safetensors").write_bytes(b"weights")
    return tmp_path


def check(root: Path, check_files: bool = True, **changes: Any) -> JobSpec:
    return check_spec(JobSpec.model_validate(spec_dict(**changes)), data_root=root, check_files=check_files)


def problems(root: Path, **changes: Any) -> dict[str, FieldProblem]:
    with pytest.raises(SpecError) as caught:
        check(root, **changes)
    return {one.field: one for one in caught.value.problems}


OPENAI = {"model": "ViT-B-16", "pretrained": "openai"}


def shards(pattern: str, **more: Any) -> dict[str, Any]:
    return {"train": [{"type": "webdataset", "shards": pattern, **more}]}


def table(**more: Any) -> dict[str, Any]:
    return {"train": [{"type": "csv", "path": "pairs.tsv", **more}]}


def test_relative_paths_become_absolute_and_the_rest_stays(root: Path) -> None:
    spec = check(
        root,
        recipe="clip_kd",
        teacher={"model": "local-dir:exported"},
        student={"config": TINY_CONFIG, "pretrained": "model.pt"},
        data={**shards("train/{00000..00001}.tar"), "validation": table(image_root=".")["train"]},
        evaluation={"zero_shot": ["wds/classes"], "retrieval": [{"path": "wds/captions/", "name": "mine"}]},
    )
    assert spec.teacher is not None
    assert spec.teacher.model == f"local-dir:{root}/exported"
    assert spec.student.pretrained == f"{root}/model.pt"
    dumped = spec.model_dump()
    assert dumped["data"]["train"][0]["shards"] == f"{root}/train/{{00000..00001}}.tar"
    assert dumped["data"]["validation"][0]["path"] == f"{root}/pairs.tsv"
    assert dumped["data"]["validation"][0]["image_root"] == str(root)
    assert [(one.name, one.path) for one in spec.evaluation.zero_shot] == [("classes", f"{root}/wds/classes")]
    assert [(one.name, one.path) for one in spec.evaluation.retrieval] == [("mine", f"{root}/wds/captions")]
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert check_spec(spec, data_root=Path("/elsewhere")) == spec


def test_a_pretrained_tag_is_left_alone_and_a_file_found(root: Path) -> None:
    assert check(root, student={"model": "ViT-B-16", "pretrained": "openai"}).student.pretrained == "openai"
    (root / "weights").write_bytes(b"x")
    assert check(root, student={"model": "ViT-B-16", "pretrained": "weights"}).student.pretrained == f"{root}/weights"


@pytest.mark.parametrize(
    ("changes", "field", "problem", "remedy"),
    [
        ({"student": {"model": "ViT-B-61"}}, "student.model", "`ViT-B-61`", "`ViT-B-16`"),
        ({"student": {"model": "ViT-B-16", "pretrained": "openia"}}, "student.pretrained", "`openia`", "`openai`"),
        ({"student": {"model": "ViT-B-16", "pretrained": "x/y"}}, "student.pretrained", "no file", "path"),
        ({"student": {"config": TINY_CONFIG, "pretrained": "openai"}}, "student.pretrained", "no file", "path"),
        ({"student": {"model": "local-dir:train"}}, "student.model", "no open_clip_config.json", "folder"),
        ({"student": {"model": "local-dir:nowhere"}}, "student.model", "no folder", "folder"),
        ({"recipe": "clip_kd", "teachers": [OPENAI, {"model": "local-dir:nowhere"}]}, "teachers.1.model", "no folder", "folder"),
        ({"recipe": "clip_kd", "teachers": [{**OPENAI, "pretrained": "openia"}]}, "teachers.0.pretrained", "`openia`", "`openai`"),
        ({"data": shards("train/{00000..00003}.tar")}, "data.train.0.shards", "00002.tar is missing (and 1 more of 4)", "Check"),
        ({"data": shards("train/*.zip")}, "data.train.0.shards", "no file matches", "Check"),
        ({"data": shards("train/{0..1.tar")}, "data.train.0.shards", "unbalanced", "{00000..00007}"),
        ({"data": shards("gs://bucket/{0..9}.tar")}, "data.train.0.shards", "address of a kind", "s3://"),
        ({"data": shards("s3://bucket")}, "data.train.0.shards", "no address of a shard", "BUCKET/KEY"),
        ({"data": shards("s3:///{0..9}.tar")}, "data.train.0.shards", "no address of a shard", "BUCKET/KEY"),
        ({"data": shards("https://host/*.tar")}, "data.train.0.shards", "HTTP lists no files", "{00000..00007}"),
        ({"data": shards("https://host/{0..9.tar")}, "data.train.0.shards", "no pattern", "{00000..00007}"),
        ({"data": shards("https://[host/0.tar")}, "data.train.0.shards", "no pattern", "{00000..00007}"),
        ({"data": shards("https://host/a b.tar")}, "data.train.0.shards", "no address of a shard", "https://HOST"),
        ({"data": shards("http://host/{0..99999999}.tar")}, "data.train.0.shards", "at most 100000", "narrower"),
        ({"data": shards("{0..99999999999999999999}.tar")}, "data.train.0.shards", "at most 100000", "narrower"),
        ({"data": shards("x" * 3000 + "{0..99999}.tar")}, "data.train.0.shards", "names 100000 shards at great length", "shorter"),
        ({"data": shards("https://h/" + "x" * 3000 + "{0..99999}")}, "data.train.0.shards", "100000 shards at great length", "shorter"),
        ({"data": shards("train")}, "data.train.0.shards", "no readable file", "Check"),
        ({"data": shards("x" * 300)}, "data.train.0.shards", "missing", "Check"),
        ({"data": table(caption_column="titel")}, "data.train.0.caption_column", "no column `titel`", "`title`"),
        ({"data": table(separator=",", caption_column="filepath\ttitle")}, "data.train.0.image_column", "split at ','", "separator"),
        ({"data": table(path="none.tsv")}, "data.train.0.path", "No such file", "Check"),
        ({"data": table(path="model.pt/x")}, "data.train.0.path", "Not a directory", "Check"),
        ({"data": table(image_root="none")}, "data.train.0.image_root", "no folder", "null"),
        ({"evaluation": {"zero_shot": ["wds/captions"]}}, "evaluation.zero_shot.0.path", "is a retrieval set", "`evaluation.retrieval`"),
        (
            {"evaluation": {"retrieval": ["wds/classes"]}},
            "evaluation.retrieval.0.path",
            "is a classification set",
            "`evaluation.zero_shot`",
        ),
        ({"data": shards("model.pt")}, "data.train.0.shards", "is no tar file", "Give tar shards"),
        ({"data": shards("train/*.tar"), "training": {"global_batch_size": 21}}, "training.global_batch_size", "only 20", "Use 20 or less"),
        ({"training": {"global_batch_size": 5}}, "training.global_batch_size", "only 4", "Use 4 or less"),
        ({"evaluation": {"zero_shot": ["none"]}}, "evaluation.zero_shot.0.path", "no folder", "Check"),
        ({"evaluation": {"retrieval": [{"path": "wds/captions", "split": "tst"}]}}, "evaluation.retrieval.0.split", "`tst`", "are: test."),
        ({"name": "a\0b"}, "name", "NUL", "Remove"),
        ({"student": {"config": {**TINY_CONFIG, "x": float("nan")}}}, "student.config.x", "nan", "finite"),
        ({"student": {"config": {**TINY_CONFIG, "x": ["\ud800"]}}}, "student.config.x.0", "surrogate", "Remove"),
    ],
)
def test_one_problem(root: Path, changes: dict[str, Any], field: str, problem: str, remedy: str) -> None:
    found = problems(root, **changes)
    assert list(found) == [field]
    assert problem in found[field].problem
    assert remedy in found[field].remedy


def test_everything_is_found_at_once(root: Path) -> None:
    found = problems(
        root,
        student={"model": "ViT-B-61", "pretrained": "x.pt"},
        data={**shards("train/9.tar"), "validation": table(path="none.tsv")["train"]},
        evaluation={"retrieval": ["none"]},
    )
    assert set(found) == {
        "student.model",
        "student.pretrained",
        "data.train.0.shards",
        "data.validation.0.path",
        "evaluation.retrieval.0.path",
    }


def test_nesting_has_a_limit_and_is_not_followed_by_recursion(root: Path) -> None:
    deep: Any = {}
    for _ in range(50_000):
        deep = [deep]
    found = problems(root, student={"config": {**TINY_CONFIG, "deep": deep}})
    assert "nested" in next(iter(found.values())).problem
    while deep:  # taken apart by hand, since freeing it at once would recurse
        deep = deep.pop()


def test_empty_files_are_missing_data(root: Path) -> None:
    (root / "train/00001.tar").write_bytes(b"")
    assert "00001.tar is no readable file" in problems(root, data=shards("train/*.tar"))["data.train.0.shards"].problem
    (root / "pairs.tsv").write_text("filepath\ttitle\n")
    assert "no rows" in problems(root)["data.train.0.path"].problem
    (root / "pairs.tsv").write_bytes(b"\xff\xfe\x00")
    assert "no such table" in problems(root)["data.train.0.path"].problem


def test_broken_evaluation_layouts(root: Path) -> None:
    split = root / "wds/classes/test"
    (split / "1.tar").unlink()
    evaluation = {"zero_shot": ["wds/classes"]}
    assert "1.tar is missing" in problems(root, evaluation=evaluation)["evaluation.zero_shot.0.path"].problem
    for content in ("two", "0", "99999999999"):
        (split / "nshards.txt").write_text(content)
        assert "nshards.txt" in problems(root, evaluation=evaluation)["evaluation.zero_shot.0.path"].problem


def test_warm_up_and_batch_against_the_known_number_of_pairs(root: Path) -> None:
    (root / "train/sizes.json").write_text(json.dumps({"00000.tar": 10, "00001.tar": 10}))
    data = shards("train/*.tar")
    check(root, data=data, training={**SMALL, "epochs": 1, "warmup_steps": 9})
    found = problems(root, data=data, training={**SMALL, "epochs": 1, "warmup_steps": 10})
    assert "only 10 steps" in found["training.warmup_steps"].problem
    found = problems(root, data=shards("train/*.tar", num_samples=5), training={**SMALL, "epochs": 2, "warmup_steps": 4})
    assert "only 4 steps" in found["training.warmup_steps"].problem
    found = problems(root, data=data, training={"global_batch_size": 21, "warmup_steps": 0})
    assert "only 20 training pairs" in found["training.global_batch_size"].problem


def test_what_is_not_known_is_left_to_the_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "MAX_BYTES_COUNTED", 0)
    check(root, data=shards("train/*.tar"), training={"warmup_steps": 10**6})
    (root / "train/sizes.json").write_text(json.dumps({"00000.tar": 10}))
    check(root, data=shards("train/*.tar"), training={"warmup_steps": 10**6})
    (root / "train/sizes.json").write_text("[]")
    check(root, data={"train": [*shards("train/*.tar")["train"], *table(num_samples=2)["train"]]})


def test_without_a_look_at_files_only_names_and_values_are_checked(root: Path) -> None:
    spec = check(root, check_files=False, data=shards("cluster/{0..9}.tar"), evaluation={"zero_shot": ["cluster/wds"]})
    assert spec.model_dump()["data"]["train"][0]["shards"] == f"{root}/cluster/{{0..9}}.tar"
    with pytest.raises(SpecError, match="ViT-B-61"):
        check(root, check_files=False, student={"model": "ViT-B-61"})


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_documented_examples_are_valid_specs(name: str) -> None:
    check_spec(JobSpec.model_validate(EXAMPLES[name]["value"]), data_root=Path(), check_files=False)


def test_the_quick_example_runs_in_a_checkout() -> None:
    check_spec(JobSpec.model_validate(QUICK_SPEC), data_root=Path(__file__).parents[2])


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"# Read me\n" * 100, "is no tar file"), (b"\x1f\x8b\x08" + bytes(600), "is compressed"), (b"short", "is no tar file")],
)
def test_a_shard_that_is_no_plain_tar(root: Path, content: bytes, words: str) -> None:
    (root / "train/00000.tar").write_bytes(content)
    assert words in problems(root, data=shards("train/00000.tar"))["data.train.0.shards"].problem


def test_pairs_are_counted_where_no_sizes_are_given(root: Path) -> None:
    both = shards("train/{00000..00001}.tar")
    found = problems(root, data=both, training={"global_batch_size": 21, "warmup_steps": 0})
    assert "only 20 training pairs" in found["training.global_batch_size"].problem
    found = problems(root, data=both, training={"global_batch_size": 10, "warmup_steps": 2, "epochs": 1})
    assert "only 2 steps" in found["training.warmup_steps"].problem


def test_an_evaluation_set_of_the_other_kind(root: Path) -> None:
    found = problems(root, evaluation={"retrieval": ["wds/classes"]})
    assert "Move it to `evaluation.zero_shot`" in found["evaluation.retrieval.0.path"].remedy
    (root / "wds/classes/dataset_type.txt").write_text("retrieval")
    found = problems(root, evaluation={"zero_shot": ["wds/classes"]})
    assert "Move it to `evaluation.retrieval`" in found["evaluation.zero_shot.0.path"].remedy


def test_a_wrong_key_of_a_config_is_named(root: Path) -> None:
    config = {**TINY_CONFIG, "vision_cfg": {**TINY_CONFIG["vision_cfg"], "widht": 8}}
    assert "`width`" in problems(root, student={"config": config})["student.config.vision_cfg.widht"].remedy


@pytest.mark.parametrize("address", ["s3://bucket/train/{0..9}.tar", "s3://bucket/*.tar", "https://host:8080/a/{00..10}.tar?token=a*b"])
def test_remote_shards_pass_unchanged_and_unasked(root: Path, address: str) -> None:
    source = check(root, data=shards(address)).data.train[0]
    assert source.model_dump()["shards"] == address


def parts_problems(root: Path, body: dict[str, Any], *, check_files: bool = True) -> dict[str, FieldProblem]:
    found = check_parts(body, data_root=root, locations=Locations.of([root], ()), check_files=check_files)
    return {one.field: one for one in found}


def test_parts_are_checked_as_in_a_whole_spec(root: Path) -> None:
    """Each valid part of a body that is no spec; nothing outside the roots is looked at, and no list beyond its limit."""
    train = [
        {"type": "csv", "path": "../secret.tsv"},
        {"type": "webdataset", "shards": "https://other/0.tar"},
        *shards("train/9.tar")["train"],
    ]
    body = {
        "name": 3,
        "student": {"config": {**TINY_CONFIG, "extra": "\0"}, "pretrained": "none.pt"},
        "teacher": {"model": "ViT-B-61", "pretrained": "openai"},
        "data": {"train": train, "validation": table(path="none.tsv")["train"] * 257},
        "evaluation": {"zero_shot": ["none"], "retrieval": [7, "wds/captions"]},
    }
    found = parts_problems(root, body)
    assert set(found) == {
        "student.config.extra",
        "teacher.model",
        "data.train.0.path",
        "data.train.1.shards",
        "data.train.2.shards",
        "evaluation.zero_shot.0.path",
    }
    assert "outside the folders" in found["data.train.0.path"].problem
    assert "none of the remote hosts" in found["data.train.1.shards"].problem
    unseen = parts_problems(root, body, check_files=False)
    assert set(unseen) == set(found) - {"data.train.2.shards", "evaluation.zero_shot.0.path"}


@pytest.mark.parametrize("body", [{}, {"student": 1, "data": [], "evaluation": None}, {"data": {"train": {"type": "csv"}}}])
def test_a_body_without_sound_parts_adds_no_problems(root: Path, body: dict[str, Any]) -> None:
    assert parts_problems(root, body) == {}


def test_sources_name_no_more_shards_together_than_can_be_looked_at(root: Path) -> None:
    many = {"type": "webdataset", "shards": "https://host/{00000..99999}.tar"}
    found = problems(root, data={"train": [many, many, shards("train/*.tar")["train"][0]]})
    assert found["data.train.2.shards"].problem == "makes the spec's shards more than 200000"


@pytest.mark.parametrize(
    ("key", "value", "remedy"), [("image_size", [], "HEIGHT"), ("image_size", [1], "HEIGHT"), ("layers", [2, 2], "all four")]
)
def test_lists_of_sizes_have_as_many_as_there_are(root: Path, key: str, value: list[int], remedy: str) -> None:
    config = {**TINY_CONFIG, "vision_cfg": {**TINY_CONFIG["vision_cfg"], key: value}}
    found = problems(root, student={"config": config})
    assert list(found) == [f"student.config.vision_cfg.{key}"]
    assert remedy in found[f"student.config.vision_cfg.{key}"].remedy


def test_a_config_that_passes_has_a_size_or_a_reason_why_not() -> None:
    num_passed = 0
    for tower, key, value in ((tower, key, value) for tower, keys in CONFIG_KEYS.items() for key in keys for value in ODD_VALUES):
        config = {**TINY_CONFIG, tower: {**TINY_CONFIG[tower], key: value}}
        try:
            student = StudentSpec.model_validate({"config": config})
        except ValidationError:
            continue
        assert student.config is not None
        if not model_config_problems("student.config", student.config):
            num_passed += 1
            assert isinstance(size_of_model(student, None), ModelSize | Unknown), (tower, key, value)
    assert num_passed > 100
