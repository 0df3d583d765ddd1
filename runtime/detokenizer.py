"""Token ids to text, one token at a time: never half a character, never a retraction.

A byte-level tokenizer's tokens are byte strings that may cut a character in two. The bytes go through
Python's incremental UTF-8 decoder, which keeps an unfinished character back and turns what can never become
one into U+FFFD, as decoding the whole does. (tokenizers' own DecodeStream re-decodes a window of tokens,
fails on byte sequences that are no UTF-8, and has no way to flush.) Text that could be the beginning of a
stop string is held back until that is decided.

Where stop strings may end a text, the engine's thread writes it. Any other is written by who reads it, as far
as they do (`Transcript`).
"""

from __future__ import annotations

import codecs
import io
import threading
from array import array
from collections.abc import Mapping, Sequence
from functools import cache
from os import PathLike
from typing import Any


@cache
def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (GPT-2's).

    Printable ones stand for themselves, the others are numbered from U+0100.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """The bytes of every token of a byte-level tokenizer, spelled out as they are needed.

    It keeps a copy of the vocabulary: a tokenizer refuses to be read by the engine's thread while a caller's
    thread changes its padding or truncation.

    Raises:
        TypeError: not a byte-level tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        if isinstance(tokenizer, str | PathLike):
            raise TypeError(
                f"processor={str(tokenizer)!r}: must be a tokenizer, not the name of one; load it first with "  # pyright: ignore[reportUnknownArgumentType]
                "transformers.AutoTokenizer.from_pretrained"
            )
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or "ByteLevel" not in repr(backend.decoder):
            raise TypeError(
                f"processor={type(tokenizer).__name__}: text needs a byte-level tokenizer of transformers "
                "(Qwen3's is one), or processor=None with token ids as prompts"
            )
        added: dict[int, Any] = tokenizer.added_tokens_decoder
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        self._tokens = {token_id: token for token, token_id in vocabulary.items()}
        self._known: dict[int, bytes] = {}
        self._texts = {skipped: _Texts(self, skipped) for skipped in (frozenset[int](), self._special)}

    def of(self, token_id: int) -> bytes:
        """The token's bytes; none for an id unknown to the tokenizer (a model's vocabulary is padded)."""
        if token_id not in self._known:
            self._known[token_id] = _spell(self._tokens.get(token_id, ""))
        return self._known[token_id]

    def texts(self, *, skip_special_tokens: bool) -> Mapping[int, str | None]:
        """The text of every token that is of whole characters; None of one that begins or ends inside of one.

        Args:
            skip_special_tokens: whether the text of a special token is empty.
        """
        return self._texts[self._special if skip_special_tokens else frozenset()]

    def text_of(self, token_id: int) -> str:
        """The token's text by itself; half a character becomes U+FFFD."""
        return self.of(token_id).decode(errors="replace")


class _Texts(dict[int, str | None]):
    """See `TokenBytes.texts`; a token's is found when it is asked for the first time."""

    def __init__(self, token_bytes: TokenBytes, skipped: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(skipped, ""))
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        try:
            self[token_id] = self._token_bytes.of(token_id).decode()
        except UnicodeDecodeError:
            self[token_id] = None
        return self[token_id]


def _spell(token: str) -> bytes:
    """A token as bytes, by the rule of tokenizers' byte-level decoder."""
    alphabet = byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()  # an added token, written as text


class Detokenizer:
    """The text of one sequence, growing token by token.

    It ends at the stop string that is complete first, character by character, however tokens cut the text.

    Args:
        token_bytes: of the tokenizer.
        skip_special_tokens: leave special tokens out.
        stop: strings that end the text.
        include_stop: whether the text ends after the stop string instead of before it.

    Attributes:
        has_stop_strings: whether there are any.
        num_characters: of `text`.
    """

    __slots__ = (
        "_held",
        "_include_stop",
        "_is_cut",
        "_stop",
        "_text",
        "_texts",
        "_token_bytes",
        "_utf8",
        "has_stop_strings",
        "num_characters",
    )

    def __init__(
        self, token_bytes: TokenBytes, *, skip_special_tokens: bool, stop: Sequence[str], include_stop: bool
    ) -> None:
        self._token_bytes = token_bytes
        self._texts = token_bytes.texts(skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self.has_stop_strings = bool(stop)
        self._include_stop = include_stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._is_cut = False  # whether the decoder keeps an unfinished character
        self._held = ""  # may be the beginning of a stop string
        self._text = io.StringIO()  # appending to a str would copy it
        self.num_characters = 0

    @property
    def text(self) -> str:
        """All of it so far; may be asked for in any thread."""
        return self._text.getvalue()

    def up_to(self, end: int, *, is_finished: bool) -> str:
        """The first `end` characters; may be asked for in any thread."""
        del is_finished  # then `finish` has been called
        return self.text[:end]

    @property
    def unfinished(self) -> str:
        """U+FFFD if the text so far ends inside a character; otherwise nothing."""
        return self._utf8.getstate()[0].decode(errors="replace")

    def add(self, token_id: int, *, may_stop: bool) -> bool:
        """Appends a token's text.

        Args:
            token_id: the token.
            may_stop: whether a stop string that it completes ends the text.

        Returns:
            Whether one did.
        """
        text = self._texts[token_id]
        if text is None or (text and self._is_cut):
            text = self._utf8.decode(self._token_bytes.of(token_id))
            self._is_cut = bool(self._utf8.getstate()[0])
        if self._stop:
            return self._append(text, may_stop=may_stop)
        self._write(text)
        return False

    def finish(self) -> None:
        """Appends what was held back: an unfinished character (as U+FFFD) and a stop string's beginning."""
        self._write(self._held + self._utf8.decode(b"", final=True))
        self._held = ""

    def _write(self, new: str) -> None:
        self.num_characters += self._text.write(new)

    def _append(self, new: str, *, may_stop: bool) -> bool:
        text = self._held + new
        match = self._first_stop(text, len(self._held)) if may_stop else None
        if match is not None:
            start, end = match
            self._write(text[:end] if self._include_stop else text[:start])
            self._held = ""
            self._utf8.reset()  # what follows the stop string is dropped
            return True
        hold = self._undecided(text)
        self._write(text[: len(text) - hold])
        self._held = text[len(text) - hold :]
        return False

    def _first_stop(self, text: str, num_old: int) -> tuple[int, int] | None:
        """Start and end of the stop string that ends first beyond the first `num_old` characters."""
        matches: list[tuple[int, int]] = []
        for stop in self._stop:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0:
                matches.append((start, start + len(stop)))
        return min(matches, key=lambda match: (match[1], match[0]), default=None)

    def _undecided(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stop):
                return length
        return 0


class Transcript:
    """The text of a list of tokens that grows, written when somebody reads it. Any thread may.

    Args:
        detokenizer: without stop strings; used by nobody else.
        token_ids: the list.
    """

    def __init__(self, detokenizer: Detokenizer, token_ids: Sequence[int]) -> None:
        self._detokenizer = detokenizer
        self._token_ids = token_ids
        self._ends = array("Q")  # after each token that is written, the characters
        self._lock = threading.Lock()

    def up_to(self, end: int, *, is_finished: bool) -> str:
        """The text of the first `end` tokens, and if no more come, of a character that is unfinished."""
        with self._lock:
            for token_id in self._token_ids[len(self._ends) : end]:
                self._detokenizer.add(token_id, may_stop=False)
                self._ends.append(self._detokenizer.num_characters)
            text = self._detokenizer.text[: self._ends[end - 1] if end else 0]
            return text + self._detokenizer.unfinished if is_finished else text
