"""Structured output: grammars as masks of tokens, by llguidance (extra `guided`)."""
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (llguidance is only partly typed)

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .guided_params import GuidedDecodingParams
from .token_mask import MaskError, Words

CACHED_GRAMMARS = 128
MOST_CHARACTERS = 500  # of what llguidance says, which may repeat the whole grammar


class Grammars:
    """Turns what requests ask for into masks. Safe between threads.

    Args:
        processor: the tokenizer.
        vocab_size: the model's, which may be larger than the tokenizer's.
        eos_token_ids: tokens that end a sequence, allowed where the grammar may end.
    """

    def __init__(self, processor: Any, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._processor = processor
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()  # guards everything below
        self._tokenizer: Any = None  # made when it is first needed: it takes a second
        self._cached: OrderedDict[GuidedDecodingParams, Any] = OrderedDict()

    def mask(self, params: GuidedDecodingParams) -> GrammarMask:
        """A mask at its beginning.

        Raises:
            ImportError: llguidance is not installed.
            ValueError: no processor, or the grammar is wrong.
        """
        if self._processor is None:
            raise ValueError("guided_decoding: needs a processor; without one, output is token ids")
        llguidance = _llguidance()
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = llguidance.hf.from_tokenizer(
                    self._processor, n_vocab=self._vocab_size, eos_token=self._eos_token_ids or None
                )
            if params not in self._cached:
                self._cached[params] = self._compile(llguidance.LLMatcher, params)
                if len(self._cached) > CACHED_GRAMMARS:
                    self._cached.popitem(last=False)
            self._cached.move_to_end(params)
            compiled = self._cached[params]
            return GrammarMask(compiled.deep_copy(), partial(self._discard, params, compiled))

    def _discard(self, params: GuidedDecodingParams, compiled: Any) -> None:
        """After an error, which every copy would run into: they share a lexer, and that has given up."""
        with self._lock:
            if self._cached.get(params) is compiled:
                del self._cached[params]

    def _compile(self, matcher: Any, params: GuidedDecodingParams) -> Any:
        grammar = _grammar_of(matcher, params)
        _check(matcher, grammar, params, self._tokenizer)
        compiled = matcher(self._tokenizer, grammar, log_level=0)
        if compiled.is_error():
            raise _wrong(params, compiled.get_error())
        return compiled


def check_grammar(params: GuidedDecodingParams) -> None:
    """Finds what is wrong with a grammar before there is an engine; what depends on the tokenizer it cannot.

    Raises:
        ImportError: llguidance is not installed.
        ValueError: the grammar is wrong.
    """
    matcher = _llguidance().LLMatcher
    _check(matcher, _grammar_of(matcher, params), params, None)


def _llguidance() -> Any:
    try:
        import llguidance
        import llguidance.hf  # pyright: ignore[reportUnusedImport]  (for the attribute)
    except ImportError as error:
        raise ImportError("guided_decoding: needs llguidance: pip install 'vsurge[guided]'") from error
    return llguidance


def _grammar_of(matcher: Any, params: GuidedDecodingParams) -> str:
    try:
        return _as_grammar(matcher, params)
    except (ValueError, RecursionError) as error:
        raise _wrong(params, str(error)) from error


def _as_grammar(matcher: Any, params: GuidedDecodingParams) -> str:
    if params.grammar is not None:
        return matcher.grammar_from_lark(params.grammar)
    if params.regex is not None:
        return matcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # A terminal (in capitals) is one automaton; of a rule, the parser would follow each choice by itself.
        choices = " | ".join(map(json.dumps, params.choice))
        return matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    schema: Any = params.json if params.json is not None else '{"type": "object"}'  # JSON, see _schema_text
    if isinstance(json.loads(schema), bool):
        schema = f'{{"anyOf": [{schema}]}}'  # llguidance wants an object
    return matcher.grammar_from_json_schema(
        schema, overrides={"whitespace_flexible": not params.disable_any_whitespace}
    )


def _check(matcher: Any, grammar: str, params: GuidedDecodingParams, tokenizer: Any) -> None:
    wrong, messages = matcher.validate_grammar_with_warnings(grammar, tokenizer)
    if wrong:
        raise _wrong(params, messages[0])


def _wrong(params: GuidedDecodingParams, reason: str) -> ValueError:
    given = repr(getattr(params, params.kind))
    shown = given if len(given) <= MOST_CHARACTERS else f"{given[:MOST_CHARACTERS]}..."
    return ValueError(f"guided_decoding: {params.kind}={shown}: {reason[:MOST_CHARACTERS]}")


class GrammarMask:
    """Follows a grammar along one request's tokens.

    Args:
        matcher: at the grammar's beginning.
        discard: called when the matcher has failed.
    """

    def __init__(self, matcher: Any, discard: Callable[[], None] = lambda: None) -> None:
        self._matcher = matcher
        self._discard = discard

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped()

    def check(self) -> None:
        # It has failed in `restrict`, which cannot say so: the step's other requests would fail with this
        # one. It calls itself stopped then, and allows the end alone.
        if self._matcher.is_error():
            raise self._error("cannot find out which tokens may come next")

    def advance(self, token_id: int) -> None:
        self.check()
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token_id):
            raise self._error(f"cannot go on after token {token_id}")

    def _error(self, what: str) -> MaskError:
        self._discard()
        reason = str(self._matcher.get_error()).partition("\n<state>")[0][:MOST_CHARACTERS]
        return MaskError(f"guided_decoding: {what}: {reason}")

    def restrict(self, words: Words) -> None:
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        words &= allowed[: len(words)]  # it may have a word more
