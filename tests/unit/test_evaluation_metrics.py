"""The maths of evaluation on matrices written by hand, and chance against counting and simulation."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cliprd_core.evaluation.metrics import chance_hit_rate, hit_rate, mean_per_class_recall, relevant_ranks
from cliprd_core.evaluation.retrieval import chance_metrics, recall_metrics

NAN = float("nan")


def one_relevant(scores: list[list[float]], targets: list[int]) -> list[int]:
    table = torch.tensor(scores)
    relevant = torch.zeros_like(table, dtype=torch.bool)
    relevant[torch.arange(len(targets)), targets] = True
    ranks: list[int] = relevant_ranks(table, relevant).tolist()
    return ranks


class TestRanks:
    def test_rank_counts_better_candidates(self) -> None:
        scores = [[0.9, 0.1, 0.5], [0.9, 0.1, 0.5], [0.9, 0.1, 0.5]]
        assert one_relevant(scores, [0, 1, 2]) == [0, 2, 1]

    def test_ties_count_against_the_model(self) -> None:
        assert one_relevant([[1.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 0.0]], [0, 1]) == [3, 2]

    def test_constant_model_never_hits(self) -> None:
        ranks = relevant_ranks(torch.zeros(6, 6), torch.eye(6, dtype=torch.bool))
        assert hit_rate(ranks, 1) == hit_rate(ranks, 5) == 0.0

    def test_scores_that_are_not_numbers_count_against_the_model(self) -> None:
        assert one_relevant([[NAN, 0.1, 0.2], [0.5, NAN, 0.2], [NAN, NAN, NAN]], [0, 0, 2]) == [2, 1, 2]

    def test_minus_infinity_is_a_score_like_any_other(self) -> None:
        assert one_relevant([[-math.inf, 0.0], [-math.inf, -math.inf]], [0, 1]) == [1, 1]

    def test_any_of_several_relevant_candidates_counts(self) -> None:
        scores = torch.tensor([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6]])
        relevant = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0]]).bool()
        assert relevant_ranks(scores, relevant).tolist() == [1, 2, 0]

    def test_relevant_candidates_do_not_stand_in_each_others_way(self) -> None:
        scores = torch.tensor([[0.5, 0.5, 0.5, 0.1]])
        assert relevant_ranks(scores, torch.tensor([[True, True, True, False]])).tolist() == [0]

    @given(
        st.integers(1, 8).flatmap(
            lambda n: st.lists(
                st.tuples(st.lists(st.integers(0, 4), min_size=n, max_size=n), st.integers(0, n - 1)), min_size=1, max_size=5
            )
        )
    )
    def test_rank_is_the_worst_place_over_all_orders_of_ties(self, rows: list[tuple[list[int], int]]) -> None:
        expected = []
        for scores, target in rows:
            order = sorted(range(len(scores)), key=lambda index: (-scores[index], index == target))
            expected.append(order.index(target))
        assert one_relevant([[float(score) for score in scores] for scores, _ in rows], [target for _, target in rows]) == expected


class TestAccuracy:
    def test_accuracy_at_k(self) -> None:
        ranks = torch.tensor([0, 0, 1, 4, 5])
        assert hit_rate(ranks, 1) == 2 / 5
        assert hit_rate(ranks, 5) == 4 / 5

    def test_mean_per_class_recall_weighs_classes_alike(self) -> None:
        """Class 0: 3 of 4 right. Class 2: 0 of 1. Class 1 does not occur."""
        ranks = torch.tensor([0, 0, 0, 1, 2])
        targets = torch.tensor([0, 0, 0, 0, 2])
        assert mean_per_class_recall(ranks, targets) == pytest.approx((3 / 4 + 0) / 2)
        assert hit_rate(ranks, 1) == 3 / 5


class TestChance:
    def test_one_relevant(self) -> None:
        assert chance_hit_rate([1], 1913, 5) == pytest.approx(5 / 1913, rel=1e-14)
        assert chance_hit_rate([1, 1], 3, 5) == 1.0

    @pytest.mark.parametrize(("count", "total", "k"), [(1, 5, 2), (2, 5, 2), (3, 6, 2), (2, 6, 5), (4, 4, 1)])
    def test_equals_counting_all_draws(self, count: int, total: int, k: int) -> None:
        draws = list(itertools.combinations(range(total), k))
        hits = sum(any(candidate < count for candidate in draw) for draw in draws)
        assert chance_hit_rate([count], total, k) == pytest.approx(hits / len(draws), rel=1e-14)

    def test_mean_over_queries(self) -> None:
        assert chance_hit_rate([1, 3], 4, 1) == pytest.approx((1 / 4 + 3 / 4) / 2)

    def test_equals_a_random_model(self) -> None:
        """Recall of random features, averaged over 200 draws, is within 4 standard errors of chance in both directions."""
        counts = [1, 3, 2, 1, 5, 2]
        owners = torch.arange(6).repeat_interleave(torch.tensor(counts))
        generator = torch.Generator().manual_seed(0)
        draws = [
            recall_metrics(torch.randn(6, 16, generator=generator), torch.randn(14, 16, generator=generator), owners) for _ in range(200)
        ]
        for name, expected in chance_metrics(counts).items():
            values = torch.tensor([draw[name] for draw in draws])
            assert abs(float(values.mean()) - expected) <= 4 * float(values.std()) / math.sqrt(200) + 1e-12, name


class TestRetrieval:
    """Features are chosen so that image @ text is the matrix written down: text features are unit vectors."""

    def recall(self, scores: list[list[float]], owners: list[int]) -> dict[str, float]:
        table: Tensor = torch.tensor(scores)
        return recall_metrics(table, torch.eye(table.shape[1]), torch.tensor(owners))

    def test_one_caption_an_image(self) -> None:
        metrics = self.recall([[0.9, 0.2, 0.1], [0.8, 0.7, 0.3], [0.1, 0.6, 0.5]], [0, 1, 2])
        assert metrics["image_to_text_R@1"] == pytest.approx(1 / 3)  # images 1 and 2 prefer another's caption
        assert metrics["text_to_image_R@1"] == pytest.approx(3 / 3)  # by column: 0.9, 0.7 and 0.5 lead
        assert metrics["image_to_text_R@5"] == metrics["text_to_image_R@10"] == 1.0

    def test_several_captions_an_image(self) -> None:
        """Image 0 owns texts 0 and 1, image 1 owns text 2."""
        metrics = self.recall([[0.1, 0.9, 0.5], [0.2, 0.8, 0.7]], [0, 0, 1])
        assert metrics["image_to_text_R@1"] == 1 / 2  # image 0 finds its text 1; image 1 prefers text 1
        assert metrics["text_to_image_R@1"] == pytest.approx(2 / 3)  # texts 1 and 2 find theirs, text 0 prefers image 1

    def test_blocks_of_queries_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        images, texts, owners = torch.randn(30, 8), torch.randn(75, 8), torch.arange(75) % 30
        whole = recall_metrics(images, texts, owners)
        monkeypatch.setattr("cliprd_core.evaluation.retrieval.BLOCK_SIZE", 7)
        assert recall_metrics(images, texts, owners) == whole
        assert 0 < whole["image_to_text_R@10"] < 1
