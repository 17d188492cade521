"""What a look at files found, kept for as long as a few checks take that begin at one time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Concatenate, ParamSpec, TypeVar

from service.file_walk import FileWalk

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Looks:
    """Calls a function once for each set of arguments: of a hundred specs over the same shards, one has them looked at.

    It belongs to one thread, and lives no longer than its checks: files come and go.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def __call__(self, look: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """The function's result, found now or before. The arguments are hashable; the result is shared, so nobody changes it."""
        key = (look, args, tuple(kwargs.items()))
        if key not in self._found:
            self._found[key] = look(*args, **kwargs)
        result: Result = self._found[key]
        return result

    def around(
        self, look: Callable[Concatenate[FileWalk, Arguments], Result], walk: FileWalk, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """As a call, of a function that reads folders: the spec that has it called pays for it, and no other that asks the same.

        Raises:
            TooMuchToWalkError: this spec leads to more looks than one may; another one may have more left.
        """
        key = (look, args, tuple(kwargs.items()))
        if key not in self._found:
            self._found[key] = look(walk, *args, **kwargs)
        result: Result = self._found[key]
        return result
