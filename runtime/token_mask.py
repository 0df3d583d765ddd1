"""Which tokens may come next, decided by the host from those before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]  # a bit per token of the vocabulary, the lowest first; 0 forbids


class MaskError(RuntimeError):
    """A mask cannot say any more what may come next."""


@runtime_checkable
class TokenMask(Protocol):
    """Follows one request's generated tokens."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        ...

    def check(self) -> None:
        """To be asked where a step has found no token under the mask.

        Raises:
            MaskError: what `restrict` left is wrong.
        """
        ...

    def advance(self, token_id: int) -> None:
        """Takes the token that was generated.

        Raises:
            MaskError: what may follow it cannot be found out, or what `restrict` left was wrong.
        """
        ...

    def restrict(self, words: Words) -> None:
        """Clears the bits of what must not come next."""
        ...


class BadWords:
    """Forbids what would complete a sequence of tokens.

    Args:
        sequences: each of two tokens or more; a single one is a matter of bias.
    """

    is_complete = False

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._sequences = [tuple(sequence) for sequence in sequences]
        self._longest = max(map(len, self._sequences)) - 1
        self._recent: tuple[int, ...] = ()

    def check(self) -> None:
        pass

    def advance(self, token_id: int) -> None:
        self._recent = (*self._recent, token_id)[-self._longest :]

    def restrict(self, words: Words) -> None:
        for *beginning, last in self._sequences:
            if self._recent[-len(beginning) :] == tuple(beginning):
                words[last // 32] &= ~np.uint32(1 << last % 32)
