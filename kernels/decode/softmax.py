# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""The softmax of the decode kernel's sequences, inside a kernel for TPU.

A step's units stand in the order of the list, so that those of one sequence follow each other, and the last
one's sequence may go on in the next step. Each unit takes over the state of the one before it, unless it
begins a sequence, and leaves its own in its sequence's row: the last one's stays there. Nothing is read back
from the rows, which would make every unit wait for the one before; what passes from step to step lies in one
place.

Scores are to the base of 2, which the chip's exponential is, too. All state is float32, and numbers that
belong to a row are the same in all LANES of it: a register's lanes can be reduced to one, but spreading that
one costs as much again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ..blockwise import LOG2_E, MASKED
from ..tpu.shapes import LANES


class State(NamedTuple):
    """Running softmaxes of rows.

    Attributes:
        highest, total: [..., rows, LANES], the largest score, and the sum of `2 ** (score - highest)`.
        weighted: [..., rows, head_dim], the sum of `2 ** (score - highest) * value`.
    """

    highest: Any
    total: Any
    weighted: Any

    @classmethod
    def scratch(cls, *shape: int, head_dim: int) -> State:
        """Scratch memory for rows of a shape."""
        wide = pltpu.VMEM((*shape, LANES), jnp.float32)
        return cls(wide, wide, pltpu.VMEM((*shape, head_dim), jnp.float32))


class Softmax(NamedTuple):
    """The softmaxes of a group's sequences in VMEM.

    Attributes:
        sequences: of [seqs + 1] sequences, of which the last is that of units without tokens.
        carried: of the last unit of the step before.
    """

    sequences: State
    carried: State

    def begin(self) -> None:
        """Before the first step: what is carried has to be finite."""
        for carried in self.carried:
            carried[...] = jnp.zeros(carried.shape, jnp.float32)

    def begin_group(self) -> None:
        """Marks all sequences as empty."""
        self.sequences.highest[...] = jnp.full(self.sequences.highest.shape, MASKED, jnp.float32)

    def raise_to(self, highest: Any, begins: list[Any]) -> tuple[Any, list[Any]]:
        """The highest score so far at each unit.

        Args:
            highest: [units * rows, 1], of each unit alone.
            begins: per unit, whether it begins a sequence.

        Returns:
            [units * rows, LANES], and per unit [rows, LANES]: what the sums before it then count, unless it
            begins a sequence.
        """
        rows = self.carried.highest.shape[0]
        before, highs, keeps = self.carried.highest[...], list[Any](), list[Any]()
        for unit, begin in enumerate(begins):
            own = jnp.broadcast_to(highest[unit * rows : (unit + 1) * rows], (rows, LANES))
            before = jnp.where(begin, MASKED, before)
            high = jnp.maximum(before, own)
            keeps.append(jnp.exp2(before - high))
            highs.append(high)
            before = high
        return jnp.concatenate(highs), keeps

    def add(
        self,
        highest: Any,
        keeps: list[Any],
        total: Any,
        weighted: Any,
        begins: list[Any],
        sequences: list[Any],
    ) -> None:
        """Adds each unit's sums to those before it, and leaves them with its sequence.

        Sums of another sequence are not kept, whatever they are: 0 times one that is not finite would be NaN.

        Args:
            highest, keeps, begins: from and for `raise_to`.
            total, weighted: [units * rows, 1] and [units * rows, head_dim], of each unit alone.
            sequences: per unit, its sequence's place.
        """
        rows, head_dim = self.carried.weighted.shape
        total_here, weighted_here = self.carried.total[...], self.carried.weighted[...]
        for unit, (keep, begin, sequence) in enumerate(zip(keeps, begins, sequences, strict=True)):
            part = slice(unit * rows, (unit + 1) * rows)
            total_here = jnp.where(begin, 0.0, total_here * keep) + total[part]
            weighted_here = jnp.where(begin, 0.0, weighted_here * spread(keep, head_dim)) + weighted[part]
            self.sequences.highest[sequence] = highest[part]
            self.sequences.total[sequence] = total_here
            self.sequences.weighted[sequence] = weighted_here
        self.carried.highest[...] = highest[-rows:]
        self.carried.total[...] = total_here
        self.carried.weighted[...] = weighted_here

    def write(self, sinks: Any, output: Any, log_sum_exp: Any) -> None:
        """Writes the group's results, to which a sink adds a score without a value.

        Args:
            sinks: [rows, LANES], to the base of 2; MASKED for none.
            output, log_sum_exp: [seqs, rows, head_dim | LANES].
        """
        seqs, _, head_dim = output.shape
        highest = self.sequences.highest[:seqs]
        nothing = highest == MASKED  # is what a row has seen
        sink = sinks[...][None]
        new = jnp.maximum(highest, sink)
        keep = jnp.exp2(highest - new)
        total = jnp.where(nothing, 0.0, self.sequences.total[:seqs] * keep + jnp.exp2(sink - new))
        factor = jnp.where(nothing, 0.0, keep / total)
        weighted = jnp.where(spread(nothing, head_dim), 0.0, self.sequences.weighted[:seqs])
        output[...] = (weighted * spread(factor, head_dim)).astype(output.dtype)
        log_sum_exp[...] = (new + jnp.log2(total)) / LOG2_E


def spread(wide: Any, numbers: int) -> Any:
    """[..., rows, LANES], all the same in a row -> [..., rows, numbers]."""
    if numbers <= LANES:
        return wide[..., :numbers]
    return jnp.concatenate([wide] * -(-numbers // LANES), axis=-1)[..., :numbers]
