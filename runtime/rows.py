"""What the host remembers of each row of the batch, so that a step sends it without collecting it anew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .request import Request
from .sampling import MAX_BANNED, SamplingInputs
from .shaping import GENERATED, IN_PROMPT, ShapingInputs
from .step_plan import Chunk

Settings = tuple[SamplingInputs, ShapingInputs, npt.NDArray[np.bool_]]

LARGEST_FLOAT, LARGEST_INT = float(np.finfo(np.float32).max), int(np.iinfo(np.int32).max)


class Rows:
    """NumPy arrays with a row per request that runs, and one more for padding: it is greedy and has no pages.

    Args:
        num_rows: of the batch.
        pages_per_seq: length of a row of the page table.
    """

    def __init__(self, num_rows: int, pages_per_seq: int) -> None:
        self._padding = num_rows
        count = num_rows + 1
        self._page_table = np.zeros((count, pages_per_seq), np.int32)
        # Who has the row, how often it had lost its pages by then, and how many of them stand in its table.
        self._holds: list[tuple[Request | None, int, int]] = [(None, 0, 0)] * count
        self._temperature = np.zeros(count, np.float32)
        self._top_k = np.zeros(count, np.int32)
        self._top_p = np.ones(count, np.float32)
        self._min_p = np.zeros(count, np.float32)
        self._seed = np.zeros((count, 2), np.uint32)
        self._banned = np.full((count, MAX_BANNED), -1, np.int32)
        self._banned_before = np.zeros(count, np.int32)
        self._presence = np.zeros(count, np.float32)
        self._frequency = np.zeros(count, np.float32)
        self._repetition = np.ones(count, np.float32)
        self._biased = np.zeros(count, np.bool_)
        self._masked = np.zeros(count, np.bool_)
        self._wants_logprobs = np.zeros(count, np.bool_)
        self._taken: list[Request] = []
        self._collected: tuple[bytes, Settings] | None = None

    def taken(self) -> list[Request]:
        """The requests that have come to a row since this was asked last."""
        taken, self._taken = self._taken, []
        return taken

    def of(self, chunks: Sequence[Chunk], n: int) -> npt.NDArray[np.int32]:
        """The rows [n] of a step's chunks, brought up to date; behind them the one for padding."""
        rows = np.full(n, self._padding, np.int32)
        taken: list[int] = []
        for request, *_ in chunks:
            row = request.row
            taken.append(row)
            held, num_preemptions, start = self._holds[row]
            # It may come back to its row, with other pages.
            if held is not request or num_preemptions != request.num_preemptions:
                start = 0
                self._set(row, request)
                self._taken.append(request)
            end = len(request.pages)
            if end > start:
                self._page_table[row, start:end] = request.pages[start:]
                self._holds[row] = request, request.num_preemptions, end
        rows[: len(chunks)] = taken
        return rows

    def page_table(self, rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """[n, pages_per_seq]; behind a request's pages stand any valid ones."""
        return self._page_table[rows]

    def settings(self, rows: npt.NDArray[np.int32]) -> Settings:
        """How the tokens of these rows are sampled, what is done to their logits before, and whether their
        log-probabilities are wanted: arrays that stay the same while the requests on the rows do."""
        key = rows.tobytes()
        if self._collected is None or self._collected[0] != key:
            self._collected = key, (self._sampling(rows), self._shaping(rows), self._wants_logprobs[rows])
        return self._collected[1]

    def _sampling(self, rows: npt.NDArray[np.int32]) -> SamplingInputs:
        return SamplingInputs(  # pyright: ignore[reportCallIssue]
            self._temperature[rows],  # pyright: ignore[reportArgumentType]
            self._top_k[rows],  # pyright: ignore[reportArgumentType]
            self._top_p[rows],  # pyright: ignore[reportArgumentType]
            self._min_p[rows],  # pyright: ignore[reportArgumentType]
            self._seed[rows],  # pyright: ignore[reportArgumentType]
            self._banned[rows],  # pyright: ignore[reportArgumentType]
            self._banned_before[rows],  # pyright: ignore[reportArgumentType]
        )

    def _shaping(self, rows: npt.NDArray[np.int32]) -> ShapingInputs:
        return ShapingInputs(  # pyright: ignore[reportCallIssue]
            self._presence[rows],  # pyright: ignore[reportArgumentType]
            self._frequency[rows],  # pyright: ignore[reportArgumentType]
            self._repetition[rows],  # pyright: ignore[reportArgumentType]
            self._biased[rows],  # pyright: ignore[reportArgumentType]
            self._masked[rows],  # pyright: ignore[reportArgumentType]
        )

    def _set(self, row: int, request: Request) -> None:
        """Values beyond the range of float32 or int32, which mean nothing more there, become its largest."""
        self._collected = None
        params = request.params
        self._temperature[row] = min(params.temperature, LARGEST_FLOAT)
        self._top_k[row] = min(max(params.top_k, 0), LARGEST_INT)
        self._top_p[row], self._min_p[row] = params.top_p, params.min_p
        self._seed[row] = request.seed >> 32, request.seed & 0xFFFFFFFF
        self._banned[row] = -1
        self._banned[row, : len(request.banned_token_ids)] = sorted(request.banned_token_ids)
        self._banned_before[row] = min(len(request.prompt_ids) + params.min_tokens, LARGEST_INT)
        self._presence[row], self._frequency[row] = params.presence_penalty, params.frequency_penalty
        self._repetition[row] = min(params.repetition_penalty, LARGEST_FLOAT)
        self._biased[row], self._masked[row] = request.is_biased, bool(request.masks)
        self._wants_logprobs[row] = request.wants_logprobs


def bias_of(request: Request, vocab_size: int) -> npt.NDArray[np.float32]:
    """[vocab], what a request adds to its logits."""
    bias = np.zeros(vocab_size, np.float32)
    if request.params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(request.params.allowed_token_ids)] = 0.0
    for token_id, value in request.bias.items():
        bias[token_id] += value
    return bias


def counts_of(request: Request, vocab_size: int) -> npt.NDArray[np.int32]:
    """[vocab], how often each token occurs in a request, as `RowState` has it."""
    counts = GENERATED * np.bincount(request.output_ids, minlength=vocab_size).astype(np.int32)
    counts[request.prompt_ids] += np.int32(IN_PROMPT)  # once, however often they occur
    return counts
