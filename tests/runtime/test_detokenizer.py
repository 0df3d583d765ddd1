"""Text grows by whole characters, is never taken back, and ends up as what the tokenizer decodes."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vsurge.runtime.detokenizer import Detokenizer, TokenBytes, Transcript, byte_alphabet

TEXT = "naïve café 東京は夜の七時 🙂🏳️‍🌈 ok\n\tx"


@pytest.fixture(scope="module")
def token_bytes(tokenizer: Any) -> TokenBytes:
    return TokenBytes(tokenizer)


@pytest.fixture(scope="module")
def byte_tokens(token_bytes: TokenBytes) -> dict[bytes, int]:
    """Token ids of single bytes, with which any bytes can be written."""
    return {token_bytes.of(i): i for i in range(1500) if len(token_bytes.of(i)) == 1}


def stream(detokenizer: Detokenizer, ids: list[int], min_tokens: int = 0) -> tuple[list[str], bool]:
    """The text after every token and at the end, and whether a stop string ended it."""
    texts: list[str] = []
    for index, token_id in enumerate(ids):
        stopped = detokenizer.add(token_id, may_stop=index >= min_tokens)
        texts.append(detokenizer.text)
        if stopped:
            return texts, True
    detokenizer.finish()
    return [*texts, detokenizer.text], False


def check_prefixes(texts: list[str]) -> None:
    for early, late in itertools.pairwise(texts):
        assert late.startswith(early)


def test_every_byte_has_its_character() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 1700), st.integers(94, 255), st.sampled_from([1533, 1534, 1535]))),
    st.booleans(),
)
def test_any_token_ids_give_what_the_tokenizer_decodes(
    tokenizer: Any, token_bytes: TokenBytes, ids: list[int], skip: bool
) -> None:
    detokenizer = Detokenizer(token_bytes, skip_special_tokens=skip, stop=(), include_stop=False)
    texts, _ = stream(detokenizer, ids)
    assert texts[-1] == tokenizer.decode(ids, skip_special_tokens=skip)
    check_prefixes(texts)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_give_what_the_tokenizer_decodes(
    tokenizer: Any, token_bytes: TokenBytes, byte_tokens: dict[bytes, int], raw: bytes
) -> None:
    ids = [byte_tokens[raw[i : i + 1]] for i in range(len(raw))]
    detokenizer = Detokenizer(token_bytes, skip_special_tokens=True, stop=(), include_stop=False)
    texts, _ = stream(detokenizer, ids)
    assert texts[-1] == tokenizer.decode(ids)
    check_prefixes(texts)


def test_no_prefix_holds_half_a_character_and_each_comes_with_its_last_byte(
    token_bytes: TokenBytes, byte_tokens: dict[bytes, int]
) -> None:
    raw = TEXT.encode()
    detokenizer = Detokenizer(token_bytes, skip_special_tokens=True, stop=(), include_stop=False)
    texts, _ = stream(detokenizer, [byte_tokens[raw[i : i + 1]] for i in range(len(raw))])
    for length, text in enumerate(texts[:-1], start=1):
        assert text == raw[:length].decode(errors="ignore")
    assert texts[-1] == TEXT


def test_an_unfinished_character_becomes_a_replacement_character_at_the_end_only(
    token_bytes: TokenBytes, byte_tokens: dict[bytes, int]
) -> None:
    raw = "ab東".encode()[:-1]
    detokenizer = Detokenizer(token_bytes, skip_special_tokens=True, stop=(), include_stop=False)
    texts, _ = stream(detokenizer, [byte_tokens[raw[i : i + 1]] for i in range(len(raw))])
    assert texts == ["a", "ab", "ab", "ab", "ab\ufffd"]


def expected_end(text: str, stops: list[str], earliest: int) -> tuple[int, int] | None:
    """By definition: the first end of a stop string beyond `earliest` characters, the longest there."""
    for end in range(earliest + 1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return min(starts), end
    return None


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 6),
)
def test_text_ends_at_the_first_stop_string_however_tokens_cut_it(
    byte_tokens: dict[bytes, int], pieces: list[str], stops: list[str], include: bool, min_tokens: int
) -> None:
    class Pieces(TokenBytes):
        def __init__(self) -> None:
            pass

        def texts(self, *, skip_special_tokens: bool) -> dict[int, str | None]:
            assert skip_special_tokens
            return dict(enumerate(pieces))

    detokenizer = Detokenizer(Pieces(), skip_special_tokens=True, stop=stops, include_stop=include)
    texts, stopped = stream(detokenizer, list(range(len(pieces))), min_tokens)
    whole = "".join(pieces)
    end = expected_end(whole, stops, len("".join(pieces[:min_tokens])))
    assert stopped is (end is not None)
    assert texts[-1] == (whole if end is None else whole[: end[1]] if include else whole[: end[0]])
    check_prefixes(texts)


def test_only_text_that_may_begin_a_stop_string_is_held_back(
    token_bytes: TokenBytes, byte_tokens: dict[bytes, int]
) -> None:
    ids = [byte_tokens[c.encode()] for c in "xENxEND"]
    detokenizer = Detokenizer(token_bytes, skip_special_tokens=True, stop=("END",), include_stop=False)
    texts, stopped = stream(detokenizer, ids)
    assert texts == ["x", "x", "x", "xENx", "xENx", "xENx", "xENx"]
    assert stopped


class CountedText(io.StringIO):
    """Counts the characters that are written and read."""

    num_handled = 0

    def write(self, text: str) -> int:
        self.num_handled += len(text)
        return super().write(text)

    def getvalue(self) -> str:
        self.num_handled += self.tell()
        return super().getvalue()


class CountedBytes(TokenBytes):
    """Counts the tokens that are looked up."""

    num_handled = 0

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._inner = token_bytes

    def of(self, token_id: int) -> bytes:
        self.num_handled += 1
        return self._inner.of(token_id)

    def texts(self, *, skip_special_tokens: bool) -> Any:
        counted, texts = self, self._inner.texts(skip_special_tokens=skip_special_tokens)

        class Counted(dict[int, str | None]):
            def __getitem__(self, token_id: int) -> str | None:
                counted.num_handled += 1
                return texts[token_id]

        return Counted()


@pytest.mark.parametrize("stop", [(), ("END", "東京にて")])
def test_a_token_costs_the_same_however_long_the_text_before_it_is(
    token_bytes: TokenBytes, byte_tokens: dict[bytes, int], stop: tuple[str, ...]
) -> None:
    raw = TEXT.encode()
    ids = [byte_tokens[raw[i : i + 1]] for i in range(len(raw))]
    tokens, text = CountedBytes(token_bytes), CountedText()
    detokenizer = Detokenizer(tokens, skip_special_tokens=True, stop=stop, include_stop=False)
    detokenizer._text = text
    costs: list[int] = []
    for _ in range(50):  # times the same, so the first one tells what each of them may cost
        before = tokens.num_handled + text.num_handled
        for token_id in ids:
            detokenizer.add(token_id, may_stop=True)
        costs.append(tokens.num_handled + text.num_handled - before)
    detokenizer.finish()
    assert detokenizer.text == TEXT * 50
    assert set(costs) == {costs[0]}
    assert costs[0] <= 3 * len(ids)  # its text, its bytes, and a character


def test_an_added_token_with_a_space_in_it_is_text(demo_path: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path)
    tokenizer.add_tokens(["a b", "é!"])
    ids = [len(tokenizer) - 2, len(tokenizer) - 1, 33]
    detokenizer = Detokenizer(TokenBytes(tokenizer), skip_special_tokens=True, stop=(), include_stop=False)
    assert stream(detokenizer, ids)[0][-1] == tokenizer.decode(ids)


def test_a_tokenizer_that_is_not_byte_level_is_refused() -> None:
    with pytest.raises(TypeError, match="processor=object: text needs a byte-level tokenizer"):
        TokenBytes(object())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.data())
def test_readers_of_a_transcript_may_look_in_any_order_while_it_grows(
    token_bytes: TokenBytes, byte_tokens: dict[bytes, int], raw: bytes, data: st.DataObject
) -> None:
    def detokenizer() -> Detokenizer:
        return Detokenizer(token_bytes, skip_special_tokens=True, stop=(), include_stop=False)

    ids = [byte_tokens[raw[i : i + 1]] for i in range(len(raw))]
    texts, _ = stream(detokenizer(), ids)
    grows: list[int] = []
    transcript = Transcript(detokenizer(), grows)
    for token_id in ids:
        grows.append(token_id)
        for end in data.draw(st.lists(st.integers(0, len(grows)), max_size=2)):
            assert transcript.up_to(end, is_finished=False) == (texts[end - 1] if end else "")
    assert transcript.up_to(len(ids), is_finished=True) == texts[-1]
    assert transcript.up_to(len(ids), is_finished=True) == texts[-1]  # for another reader
