"""The cache of token ids: it answers as the tokenizer does, and loader processes share it."""

import multiprocessing

import torch
from torch import Tensor

from cliprd_core.data.batch import ModelInput
from cliprd_core.data.tokens import TokenCache
from tests.data_files import character_tokenizer, model_input

CAPTIONS = ["a cat", "a dog", "", "a tree on a hill"]


class CountingTokenizer:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, captions: list[str]) -> Tensor:
        self.asked += captions
        return character_tokenizer(captions)


def cache(num_samples: int) -> tuple[TokenCache, CountingTokenizer]:
    tokenizer = CountingTokenizer()
    base = model_input()
    return TokenCache(ModelInput(base.preprocess, tokenizer, base.context_length), num_samples), tokenizer


def test_only_what_is_new_is_tokenised() -> None:
    tokens, tokenizer = cache(10)
    expected = character_tokenizer(CAPTIONS)
    assert torch.equal(tokens.tokenise([7, 2, 0, 9], CAPTIONS), expected)
    assert torch.equal(
        tokens.tokenise([0, 9, 5], ["", "a tree on a hill", "a fox"]), torch.cat([expected[2:], character_tokenizer(["a fox"])])
    )
    assert tokenizer.asked == [*CAPTIONS, "a fox"]


def test_forked_processes_share_it() -> None:
    tokens, tokenizer = cache(10)
    process = multiprocessing.get_context("fork").Process(target=lambda: tokens.tokenise([7, 2, 0, 9], CAPTIONS))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert torch.equal(tokens.tokenise([7, 2, 0, 9], CAPTIONS), character_tokenizer(CAPTIONS))
    assert not tokenizer.asked


def test_a_row_that_is_half_written_is_not_taken() -> None:
    tokens, tokenizer = cache(4)
    tokens.tokenise([0, 1, 2, 3], CAPTIONS)
    tokens._rows[1, 0] += 1
    tokenizer.asked.clear()
    assert torch.equal(tokens.tokenise([0, 1, 2, 3], CAPTIONS), character_tokenizer(CAPTIONS))
    assert tokenizer.asked == ["a dog"]
