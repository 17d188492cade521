"""Students and teachers from every kind of source, and the errors a user meets."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from cliprd_core.models import LoadedModel, build_architecture, load_student, load_teacher, num_parameters
from cliprd_core.spec import StudentSpec, TeacherSpec
from tests.tiny import CONTEXT_LENGTH, MODEL_IMAGE_SIZE, tiny_config, write_teacher


def tiny_student(seed: int = 0, **kwargs: Any) -> LoadedModel:
    return load_student(StudentSpec(config=tiny_config(), **kwargs), seed=seed)


def assert_same_weights(first: LoadedModel, second: LoadedModel) -> None:
    a, b = first.model.state_dict(), second.model.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_papers_student_is_known_by_name() -> None:
    loaded = load_student(StudentSpec(model="ViT-T-16"), seed=0)
    assert num_parameters(loaded.model) == 46_116_097
    assert (loaded.embed_dim, loaded.context_length, loaded.preprocess.image_size, loaded.name) == (512, 77, 224, "ViT-T-16")
    assert loaded.weights_sha256 is None
    assert loaded.model.training


def test_initial_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = tiny_student(seed=3)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1)), "building a model must not disturb the global generator"
    torch.manual_seed(6)
    assert_same_weights(first, tiny_student(seed=3))
    assert not torch.equal(first.model.state_dict()["text_projection"], tiny_student(seed=4).model.state_dict()["text_projection"])


def test_teacher_is_frozen_and_keeps_its_own_preprocessing(tmp_path: Path) -> None:
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}
    name = write_teacher(tmp_path / "teacher", tiny_config(image_size=48, context_length=20), preprocess=preprocess)
    teacher = load_teacher(TeacherSpec(model=name))
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.preprocess.image_size == 48
    assert teacher.preprocess.mean == (0.5, 0.4, 0.3)
    assert (teacher.preprocess.interpolation, teacher.preprocess.resize_mode) == ("bilinear", "squash")
    assert teacher.tokenizer(["a red circle"]).shape == (1, 20)
    assert teacher.weights_sha256 is not None


def test_tokenizer_options_of_a_config_are_honoured() -> None:
    config = tiny_config()
    config["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    cleaning = load_student(StudentSpec(config=config), seed=0).tokenizer
    assert torch.equal(cleaning(["A red circle."]), cleaning(["a red circle"]))
    plain = tiny_student().tokenizer
    assert not torch.equal(plain(["A red circle."]), plain(["a red circle"]))


@pytest.mark.parametrize("wrapping", ["plain", "state_dict", "module"])
@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_checkpoint_files_load_with_their_wrappers(tmp_path: Path, wrapping: str, suffix: str) -> None:
    original = tiny_student(seed=1)
    content: dict[str, Any] = dict(original.model.state_dict())
    if wrapping != "plain":
        prefix = "module." if wrapping == "module" else ""
        content = {"epoch": 3, "state_dict": {f"{prefix}{name}": value for name, value in content.items()}}
    path = tmp_path / f"weights{suffix}"
    torch.save(content, path)
    assert_same_weights(original, tiny_student(seed=2, pretrained=str(path)))


def test_half_precision_weights_become_fp32(tmp_path: Path) -> None:
    halves = {name: value.half() for name, value in tiny_student(seed=1).model.state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    loaded = tiny_student(pretrained=str(tmp_path / "half.safetensors"))
    assert loaded.model.logit_scale.dtype == torch.float32
    assert torch.equal(loaded.model.state_dict()["text_projection"], halves["text_projection"].float())


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    for name in ("bomb.pt", "bomb.pth", "bomb.bin"):
        (tmp_path / name).write_bytes(pickle.dumps({"state_dict": Bomb()}, protocol=2))
        torch.save({"state_dict": Bomb()}, tmp_path / f"zip-{name}")
        for path in (tmp_path / name, tmp_path / f"zip-{name}"):
            with pytest.raises(ValueError, match="refused because that runs code"):
                tiny_student(pretrained=str(path))
    assert not trace.exists()


def test_weights_of_another_model_are_named_in_the_error(tmp_path: Path) -> None:
    state = dict(tiny_student().model.state_dict())
    state["visual.surprise"] = torch.zeros(1)
    del state["visual.class_embedding"]
    state["text_projection"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="another model") as raised:
        tiny_student(pretrained=str(tmp_path / "other.safetensors"))
    message = str(raised.value)
    assert "1 missing (visual.class_embedding)" in message
    assert "1 unexpected (visual.surprise)" in message
    assert "text_projection (3, 3) instead of (32, 32)" in message


def test_students_positions_are_interpolated_but_a_teachers_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(tiny_student().model.state_dict(), tmp_path / "w.safetensors")
    larger, path = tiny_config(image_size=48, context_length=20), str(tmp_path / "w.safetensors")
    student = load_student(StudentSpec(config=larger, pretrained=path), seed=0)
    assert student.model.state_dict()["visual.positional_embedding"].shape[0] == 37
    assert "`visual.positional_embedding` interpolated from 17 to 37 positions" in caplog.text
    with pytest.raises(ValueError, match=re.escape("visual.positional_embedding (17, 32) instead of (37, 32)")):
        load_teacher(TeacherSpec(config=larger, pretrained=path))


def test_truncated_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(tiny_student().model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="may be cut off"):
        tiny_student(pretrained=str(path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": "ViT-Q-99"}, "`student.model` 'ViT-Q-99' is not a model that open_clip knows"),
        ({"model": "hf-hub:some/repo"}, "is not a model that open_clip knows"),
        ({"model": "ViT-B-16", "pretrained": "no_such_tag"}, "neither a file nor a tag of ViT-B-16 (its tags: openai, laion400m_e31"),
        ({"model": "local-dir:/does/not/exist"}, "has no open_clip_config.json"),
        ({"config": tiny_config(), "pretrained": "openai"}, "must be the path of a checkpoint file"),
        ({"config": {**tiny_config(), "vision_cfg": {"layerz": 1}}}, "`vision_cfg` got an unexpected keyword argument 'layerz'"),
        ({"config": {**tiny_config(), "nonsense": 1}}, "cannot build this model config"),
        ({"config": tiny_config() | {"multimodal_cfg": {}}}, "captioning decoder"),
        ({"config": tiny_config() | {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}}, "`trust_remote_code` is not allowed"),
        (
            {"config": tiny_config() | {"text_cfg": {"vocab_size": 100, "width": 32, "heads": 2, "layers": 1}}},
            "`text_cfg.vocab_size` is 100",
        ),
        ({"config": tiny_config(image_size=[32, 48])}, "only square ones"),  # type: ignore[arg-type]
    ],
)
def test_user_mistakes_name_field_and_remedy(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_student(StudentSpec(**spec), seed=0)


def test_teacher_given_by_job_is_the_services_business() -> None:
    with pytest.raises(ValueError, match="inside the service only"):
        load_teacher(TeacherSpec(job="0123456789"))


def test_local_dir_without_weights(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_config()}))
    with pytest.raises(ValueError, match="has no weights"):
        load_teacher(TeacherSpec(model=f"local-dir:{tmp_path}"))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="not a JSON object with `model_cfg`"):
        load_teacher(TeacherSpec(model=f"local-dir:{tmp_path}"))


@pytest.mark.parametrize("name", ["ViT-T-16", "RN50"])
def test_architecture_is_open_clips_own(name: str) -> None:
    """Same state_dict names and shapes as open_clip builds; ours adds nothing and drops nothing."""
    ours = load_student(StudentSpec(model=name), seed=0).model.state_dict()
    with torch.device("meta"):
        theirs = open_clip.CLIP(**open_clip.get_model_config(name)).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_siglip_bias_is_kept_but_not_trained() -> None:
    loaded = load_student(StudentSpec(config=tiny_config() | {"init_logit_bias": -10.0}), seed=0)
    frozen = [key for key, parameter in loaded.model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["logit_bias"]


def test_features_do_not_depend_on_the_order_in_which_a_transformer_computes() -> None:
    loaded = load_student(StudentSpec(config=tiny_config()), seed=0).model.eval()
    own = build_architecture("student", tiny_config()).eval()
    own.load_state_dict(loaded.state_dict())
    assert not loaded.visual.transformer.batch_first
    assert own.visual.transformer.batch_first
    images, tokens = torch.randn(3, 3, MODEL_IMAGE_SIZE, MODEL_IMAGE_SIZE), torch.randint(1, 99, (3, CONTEXT_LENGTH))
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images), own.encode_image(images))
        torch.testing.assert_close(loaded.encode_text(tokens), own.encode_text(tokens))
