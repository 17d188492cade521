"""A look's result is kept by function and arguments."""

from __future__ import annotations

from service.looks import Looks


def test_each_set_of_arguments_is_looked_at_once() -> None:
    seen: list[tuple[str, int]] = []

    def look(name: str, *, times: int) -> str:
        seen.append((name, times))
        return name * times

    looks = Looks()
    for _ in range(3):
        assert looks(look, "a", times=2) == "aa"
        assert looks(look, "b", times=2) == "bb"
        assert looks(look, "a", times=3) == "aaa"
    assert seen == [("a", 2), ("b", 2), ("a", 3)]


def test_functions_are_told_apart_and_none_is_a_result() -> None:
    calls: list[int] = []
    looks = Looks()
    for _ in range(2):
        assert looks(calls.append, 1) is None
        assert looks(str, 1) == "1"
    assert calls == [1]
