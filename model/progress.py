"""Progress bars for long work, on stderr.

They are huggingface_hub's, so that HF_HUB_DISABLE_PROGRESS_BARS silences them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress_bar(items: Sequence[T], description: str, *, show: bool, unit: str = "it") -> Iterator[T]:
    """Yields the items, with a bar on stderr if `show` and stderr is a terminal or a notebook."""
    from huggingface_hub.utils import tqdm

    # disable=None: shown on a terminal only
    yield from tqdm(items, desc=description, unit=unit, disable=None if show else True, leave=False)
