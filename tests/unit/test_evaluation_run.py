"""Evaluation from files to results: clip_benchmark's layout, and a model whose answers are known."""

import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cliprd_core import precision
from cliprd_core.control import ControlGroup
from cliprd_core.data.batch import Preprocess
from cliprd_core.data.errors import InvalidDataError
from cliprd_core.data.sources import open_sources
from cliprd_core.evaluation import zero_shot
from cliprd_core.evaluation.datasets import load_classification_set, load_retrieval_set
from cliprd_core.evaluation.features import Evaluator
from cliprd_core.evaluation.result import EvaluationResult
from cliprd_core.evaluation.run import check_evaluation_sets, evaluate
from cliprd_core.evaluation.zero_shot import class_embeddings
from cliprd_core.evaluation_spec import EvaluationSet, EvaluationSpec
from cliprd_core.spec import WebDatasetSource
from cliprd_core.training_spec import Precision
from tests.data_files import write_tar

NAMES = ["red", "green", "blue", "grey", "cyan", "pink"]
COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90), (0, 120, 120), (220, 120, 120)]
PREPROCESS = Preprocess(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class ColourModel(nn.Module):
    """Knows colours and their names: an image's feature is its mean colour, a text's the colour that its last word names.

    The feature is centred, so that grey and white differ. A word that is no colour means white.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.head.weight)
        self.dtypes: set[torch.dtype] = set()

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        assert not self.training
        return self._finish(image.mean(dim=(2, 3)), normalize)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        assert not self.training
        colours = torch.tensor([*COLOURS, (255, 255, 255)]).float() / 127.5 - 1
        return self._finish(colours[text[:, 0]], normalize)

    def _finish(self, features: Tensor, normalize: bool) -> Tensor:
        assert not normalize, "evaluation normalises by itself, in fp32"
        features = self.head(features)
        self.dtypes.add(features.dtype)
        return features


def colour_tokenizer(texts: list[str]) -> Tensor:
    words = [text.rstrip(".").split()[-1] for text in texts]
    return torch.tensor([[NAMES.index(word) if word in NAMES else len(NAMES)] for word in words])


def colour_image(number: int, size: tuple[int, int] = (10, 12)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, COLOURS[number]).save(buffer, format="PNG")
    return buffer.getvalue()


def write_classification(folder: Path, labels: list[int], *, pictures: list[int] | None = None) -> Path:
    """A set whose image i shows colour `pictures[i]` (default `labels[i]`) and is labelled `labels[i]`, in two shards."""
    pictures = labels if pictures is None else pictures
    members = [
        {f"s{i}.png": colour_image(picture), f"s{i}.cls": str(label).encode()}
        for i, (picture, label) in enumerate(zip(pictures, labels, strict=True))
    ]
    half = len(members) // 2
    for shard, part in enumerate((members[:half], members[half:])):
        write_tar(folder / f"test/{shard}.tar", {name: content for member in part for name, content in member.items()})
    (folder / "test/nshards.txt").write_text("2\n")
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n{c}.\n")
    return folder


def write_retrieval(folder: Path, captions: list[tuple[int, str]]) -> Path:
    """A set of images of the given colours with the given caption files."""
    members: dict[str, bytes] = {}
    for i, (colour, text) in enumerate(captions):
        members |= {f"s{i}.png": colour_image(colour), f"s{i}.txt": text.encode()}
    write_tar(folder / "test/0.tar", members)
    (folder / "test/nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def run(spec: EvaluationSpec, **changes: Any) -> list[EvaluationResult]:
    arguments: dict[str, Any] = {
        "preprocess": PREPROCESS,
        "tokenizer": colour_tokenizer,
        "validation": None,
        "device": torch.device("cpu"),
        "precision": Precision.FP32,
    }
    model = changes.pop("model", ColourModel())
    return evaluate(model, spec=spec, **(arguments | changes))


class TestZeroShot:
    def test_perfect_model(self, tmp_path: Path) -> None:
        (result,) = run(EvaluationSpec(zero_shot=[str(write_classification(tmp_path / "colours", [0, 1, 2, 3, 4, 5, 0, 2]))]))
        assert (result.task, result.dataset, result.num_samples) == ("zero_shot", "colours", 8)
        assert result.metrics == {"zero_shot_top1": 1.0, "zero_shot_top5": 1.0, "zero_shot_mean_per_class_recall": 1.0}
        assert result.chance == pytest.approx({"zero_shot_top1": 1 / 6, "zero_shot_top5": 5 / 6, "zero_shot_mean_per_class_recall": 1 / 6})

    def test_wrong_answers_are_counted_per_image_and_per_class(self, tmp_path: Path) -> None:
        """Labels 0,0,0,1: two red pictures right, one red-labelled picture is green, the green-labelled one is red."""
        folder = write_classification(tmp_path / "colours", [0, 0, 0, 1], pictures=[0, 0, 1, 0])
        (result,) = run(EvaluationSpec(zero_shot=[str(folder)]))
        assert result.metrics["zero_shot_top1"] == 2 / 4
        assert result.metrics["zero_shot_mean_per_class_recall"] == pytest.approx((2 / 3 + 0) / 2)

    def test_class_embedding_is_the_normalised_mean_of_normalised_prompts(self) -> None:
        evaluator = Evaluator(ColourModel().eval(), PREPROCESS, colour_tokenizer, torch.device("cpu"), Precision.FP32, ControlGroup())
        embeddings = class_embeddings(evaluator, ["grey", "blue"], ["{c}", "{c} or white", "the {c}."])
        assert embeddings is not None
        white = torch.ones(3) / 3**0.5
        for embedding, colour in zip(embeddings, (COLOURS[3], COLOURS[2]), strict=True):
            raw = torch.tensor(colour) / 127.5 - 1  # far shorter than white's, which must not matter
            mean = (2 * raw / raw.norm() + white) / 3
            torch.testing.assert_close(embedding, mean / mean.norm())

    def test_many_batches_give_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        labels = [i * 7 % 6 for i in range(23)]
        folder = write_classification(tmp_path / "colours", labels, pictures=[label if i % 3 else 0 for i, label in enumerate(labels)])
        whole = run(EvaluationSpec(zero_shot=[str(folder)]))
        monkeypatch.setattr("cliprd_core.evaluation.features.CPU_BATCH_SIZE", 3)
        assert run(EvaluationSpec(zero_shot=[str(folder)])) == whole
        assert 0 < whole[0].metrics["zero_shot_top1"] < 1

    def test_corrupt_images_are_left_out_with_a_warning(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = write_classification(tmp_path / "colours", [0, 1, 2, 3])
        write_tar(folder / "test/1.tar", {"x.png": b"broken", "x.cls": b"0", "y.png": colour_image(2), "y.cls": b"2"})
        with caplog.at_level(logging.WARNING):
            (result,) = run(EvaluationSpec(zero_shot=[str(folder)]))
        assert (result.num_samples, result.metrics["zero_shot_top1"]) == (3, 1.0)
        assert "1.tar:x" in caplog.text
        write_tar(folder / "test/0.tar", {"x.png": b"broken", "x.cls": b"0", "y.png": b"broken", "y.cls": b"2"})
        with pytest.raises(InvalidDataError, match="3 of the 4 images of colours cannot be read"):
            run(EvaluationSpec(zero_shot=[str(folder)]))


class TestRetrieval:
    def test_both_protocols(self, tmp_path: Path) -> None:
        """Captions 0 and 1 of each image are right except: image 2's first caption names red."""
        folder = write_retrieval(tmp_path / "pairs", [(0, "red\n a red \n\n"), (1, "green\nthe green"), (2, "red\nblue")])
        (result,) = run(EvaluationSpec(retrieval=[{"path": str(folder), "name": "mine"}]))
        assert (result.task, result.dataset, result.num_samples) == ("retrieval", "mine", 3)
        metrics = result.metrics
        # Any caption counts: blue finds "blue"; red's best ties with image 2's false "red", which counts against it.
        assert metrics["image_to_text_R@1"] == pytest.approx(2 / 3)
        assert metrics["text_to_image_R@1"] == pytest.approx(5 / 6)
        # Only first captions: image 2's is wrong both ways, and spoils image 0's.
        assert metrics["one_caption_image_to_text_R@1"] == pytest.approx(1 / 3)
        assert metrics["one_caption_text_to_image_R@1"] == pytest.approx(2 / 3)
        assert metrics["image_to_text_R@5"] == metrics["one_caption_text_to_image_R@10"] == 1.0
        assert result.chance["image_to_text_R@1"] == pytest.approx(2 / 6)
        assert result.chance["text_to_image_R@1"] == result.chance["one_caption_image_to_text_R@1"] == pytest.approx(1 / 3)
        assert result.chance.keys() == metrics.keys()
        assert len(metrics) == 12

    def test_held_out_pairs(self, tmp_path: Path) -> None:
        members: dict[str, bytes] = {}
        for number, name in enumerate(NAMES):
            members |= {f"{number}.png": colour_image(number), f"{number}.txt": name.encode()}
        members |= {"6.png": colour_image(0), "6.txt": b" "}  # no caption: cannot be read
        path = write_tar(tmp_path / "0.tar", members)
        validation = open_sources([WebDatasetSource(type="webdataset", shards=str(path))], tmp_path / "cache")
        (result,) = run(EvaluationSpec(), validation=validation)
        assert (result.task, result.dataset, result.num_samples) == ("validation", "validation", 6)
        assert result.metrics == {f"{way}_R@{k}": 1.0 for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
        assert result.chance["image_to_text_R@5"] == pytest.approx(5 / 6)


class TestModelHandling:
    def test_mode_of_every_module_is_put_back(self, tmp_path: Path) -> None:
        model = ColourModel()
        model.train()
        model.head.eval()
        run(EvaluationSpec(zero_shot=[str(write_classification(tmp_path, [0, 1]))]), model=model)
        assert model.training
        assert not model.head.training

    def test_precision_is_the_models_and_features_are_fp32(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = ColourModel()
        spec = EvaluationSpec(zero_shot=[str(write_classification(tmp_path, [0, 1, 2, 3, 4, 5]))])
        seen: list[Tensor] = []
        original = zero_shot.relevant_ranks
        monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
        monkeypatch.setattr(zero_shot, "relevant_ranks", lambda scores, relevant: (seen.append(scores), original(scores, relevant))[1])
        run(spec, model=model, precision=Precision.BF16)
        assert model.dtypes == {torch.bfloat16}
        assert {scores.dtype for scores in seen} == {torch.float32}
        assert max(float(scores.max()) for scores in seen) <= 1 + 1e-6
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_order_of_results(self, tmp_path: Path) -> None:
        classes = [str(write_classification(tmp_path / name, [0, 1])) for name in ("b", "a")]
        pairs = str(write_retrieval(tmp_path / "r", [(0, "red"), (1, "green")]))
        results = run(EvaluationSpec(zero_shot=classes, retrieval=[pairs]))
        assert [(result.task, result.dataset) for result in results] == [("zero_shot", "b"), ("zero_shot", "a"), ("retrieval", "r")]


class TestLayout:
    @pytest.mark.parametrize(
        ("file", "message"),
        [
            ("classnames.txt", r"classnames\.txt is missing; it must hold one class name a line"),
            ("zeroshot_classification_templates.txt", r"templates\.txt is missing; it must hold one prompt a line"),
            ("test/nshards.txt", r"nshards\.txt is missing; it must hold the number of shards"),
            ("test/1.tar", r"test/1\.tar is missing; .*nshards\.txt says that there are 2 shards"),
        ],
    )
    def test_missing_file_is_named(self, tmp_path: Path, file: str, message: str) -> None:
        folder = write_classification(tmp_path / "set", [0, 1])
        (folder / file).unlink()
        with pytest.raises(InvalidDataError, match=message):
            check_evaluation_sets(EvaluationSpec(zero_shot=[str(folder)]))

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            ("classnames.txt", " \n", "is empty"),
            ("zeroshot_classification_templates.txt", "a photo\n", r"'a photo' lacks \{c\}"),
            ("test/nshards.txt", "two", "holds 'two'; it must hold the number of shards"),
            ("dataset_type.txt", "retrieval", r"is a retrieval set.*list it under `evaluation\.retrieval`"),
        ],
    )
    def test_malformed_file_is_named(self, tmp_path: Path, file: str, content: str, message: str) -> None:
        folder = write_classification(tmp_path / "set", [0, 1])
        (folder / file).write_text(content)
        with pytest.raises(InvalidDataError, match=message):
            load_classification_set(EvaluationSet(path=str(folder)))

    def test_missing_folder_and_wrong_type(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidDataError, match="there is no folder"):
            load_retrieval_set(EvaluationSet(path=str(tmp_path / "gone")))
        with pytest.raises(InvalidDataError, match=r"is a classification set.*`evaluation\.zero_shot`"):
            load_retrieval_set(EvaluationSet(path=str(write_classification(tmp_path / "set", [0, 1]))))

    @pytest.mark.parametrize("label", [b"6", b"-1", b"red", b""])
    def test_bad_label_is_named(self, tmp_path: Path, label: bytes) -> None:
        folder = write_classification(tmp_path / "set", [0, 1])
        write_tar(folder / "test/1.tar", {"x.png": colour_image(0), "x.cls": label})
        with pytest.raises(InvalidDataError, match=r"1\.tar:x\.cls holds"):
            run(EvaluationSpec(zero_shot=[str(folder)]))

    def test_images_without_labels(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = write_classification(tmp_path / "set", [0, 1])
        write_tar(folder / "test/1.tar", {"x.png": colour_image(0)})
        assert load_classification_set(EvaluationSet(path=str(folder))).images.num_images == 1
        assert "1 of 2 images" in caplog.text
        write_tar(folder / "test/0.tar", {"x.png": colour_image(0)})
        with pytest.raises(InvalidDataError, match=r"each needs KEY\.cls with a class number"):
            load_classification_set(EvaluationSet(path=str(folder)))

    def test_split_and_cache(self, tmp_path: Path) -> None:
        folder = write_classification(tmp_path / "set", [0, 1, 2, 3])
        (folder / "test").rename(folder / "held_out")
        spec = EvaluationSpec(zero_shot=[{"path": str(folder), "split": "held_out"}])
        assert run(spec, cache_dir=tmp_path / "cache") == run(spec, cache_dir=tmp_path / "cache") == run(spec)
        assert len(list((tmp_path / "cache").iterdir())) == 2
