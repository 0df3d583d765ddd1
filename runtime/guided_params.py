"""What structured output a request asks for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from .checks import as_flag

KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, kw_only=True)
class GuidedDecodingParams:
    """Structured output: exactly one of json, regex, choice, grammar and json_object. Names are vLLM's.

    Attributes:
        json: a JSON schema, as a dict or as text; becomes text.
        regex: a regular expression (llguidance's, which is Rust's syntax without look-around) for the whole
            output.
        choice: strings, one of which is the whole output.
        grammar: a context-free grammar in Lark's syntax, as llguidance reads it.
        json_object: any JSON object.
        disable_any_whitespace: JSON without optional white space.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: none or several of the five, or one that is empty or no JSON.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Iterable[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"guided_decoding: {given or 'nothing'} is given, give exactly one of {KINDS}")
        object.__setattr__(self, "json", _schema_text(self.json))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise TypeError(f"guided_decoding: {name}={value!r}: must be a non-empty string")
        object.__setattr__(self, "choice", _choices(self.choice))
        if self.json_object is not None:
            as_flag("json_object", self.json_object)
        as_flag("disable_any_whitespace", self.disable_any_whitespace)
        if self.disable_any_whitespace and not (self.json or self.json_object):
            raise ValueError("guided_decoding: disable_any_whitespace=True needs json or json_object")

    @property
    def kind(self) -> str:
        """Which of the five is given."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False))


def as_guided(value: Any) -> GuidedDecodingParams | None:
    """A request's `guided_decoding`: None, a `GuidedDecodingParams`, or a dict of its fields.

    Raises:
        TypeError, ValueError: none of these.
    """
    if value is None or isinstance(value, GuidedDecodingParams):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"guided_decoding={value!r}: must be a GuidedDecodingParams or a dict of its fields")
    options = dict(cast("Mapping[str, Any]", value))
    known = [field.name for field in fields(GuidedDecodingParams)]
    for name, option in options.items():
        if name not in known:
            raise ValueError(f"guided_decoding: {name}={option!r} is not supported, only {known} are")
    return GuidedDecodingParams(**options)


def _schema_text(schema: Any) -> str | None:
    if schema is None:
        return None
    if isinstance(schema, Mapping):
        try:
            return json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"guided_decoding: json={schema!r} is no JSON schema: {error}") from error
    if not isinstance(schema, str):
        raise TypeError(f"guided_decoding: json={schema!r}: must be a JSON schema, as a dict or as text")
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"guided_decoding: json={schema!r} is no JSON: {error}") from error
    if not isinstance(parsed, dict | bool):
        raise ValueError(f"guided_decoding: json={schema!r}: a JSON schema is an object or a bool")
    return schema


def _choices(choice: Any) -> tuple[str, ...] | None:
    if choice is None:
        return None
    if isinstance(choice, str) or not isinstance(choice, Iterable):
        raise TypeError(f"guided_decoding: choice={choice!r}: must be several strings")
    choices = tuple(cast("Iterable[Any]", choice))
    if not choices or not all(isinstance(text, str) and text for text in choices):
        raise TypeError(f"guided_decoding: choice={choice!r}: must be one or more non-empty strings")
    return choices
