"""The executor of the processes beside process 0, which does what process 0's does (`processes`)."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax's signatures are only partly typed)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from ..model import Model, Params
from .executor import Executor
from .options import EngineOptions
from .weights import Parts, assembled


class FollowingExecutor(Executor):
    """Follows a `LeadingExecutor`.

    Args:
        model, options: as for `Executor`, the same as process 0's.
    """

    def __init__(self, model: Model, options: EngineOptions) -> None:
        super().__init__(model, options)
        self._placed: list[jax.Array] = []  # of weights that come, in the order of the tree's leaves

    @property
    def params(self) -> Params:
        """The weights of the latest update, or the model's."""
        return self._model.params

    def do(self, what: str, arguments: Sequence[Any]) -> None:
        """What process 0 says."""
        match what:
            case "compile":
                self.compile(show_progress=False)
            case "allocate":
                self.allocate()
            case "release":
                self.release()
            case "dispatch":
                self.dispatch(*arguments)
            case "place":
                self._place_next(*arguments)
            case "update":
                self._update_to_placed()
            case _:
                raise ValueError(f"process 0 says {what!r}, which this version does not know")

    def _place_next(self, parts: Parts) -> None:
        like = jax.tree.leaves(self._model.params)
        # There may be more than one tree here: they are taken in the order in which they come.
        old: jax.Array = like[len(self._placed) % len(like)]
        placed = assembled(parts, old)
        jax.block_until_ready(placed)
        self._placed.append(placed)

    def _update_to_placed(self) -> None:
        structure: Any = jax.tree.structure(self._model.params)
        taken, self._placed = self._placed[: structure.num_leaves], self._placed[structure.num_leaves :]
        self.update(jax.tree.unflatten(structure, taken))
