"""The section `quantization_config` of a checkpoint's config.json: ours, and the published FP8 models'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ConfigError
from .quantization import FP8_BLOCK, METHODS, NF4_BLOCK
from .quantized_specs import Quantization

OURS = "vsurge"  # quant_method of the forms that nobody else has
_FP8_ONLY: dict[str, tuple[Any, ...]] = {
    "fmt": ("e4m3", None),
    "activation_scheme": ("dynamic", None),
    "weight_block_size": ([FP8_BLOCK, FP8_BLOCK],),
}
_SKIPPED = "modules_to_not_convert"


def quantization_from_json(raw: Mapping[str, Any], *, source: str = "config.json") -> Quantization | None:
    """How the weights of a checkpoint are quantized; None if they are not.

    Args:
        raw: the parsed config.json.
        source: what to call the file in errors.

    Raises:
        ConfigError: a method, or an option of it, that is not supported.
    """
    section = raw.get("quantization_config")
    if section is None:
        return None
    where = f"{source}: quantization_config"
    if not isinstance(section, dict):
        raise ConfigError(f"{where}={section!r}: must be an object")
    kind = section.get("quant_method")
    if kind == "fp8":
        only, method = _FP8_ONLY, "fp8"
    elif kind == OURS:
        method = section.get("format")
        made = [name for name in METHODS if name != "fp8"]
        if method not in made:
            raise ConfigError(f"{where}: format={method!r}: supported are {made}")
        only = {"format": (method,), "block_size": (NF4_BLOCK,) if method == "nf4" else (None,)}
    else:
        raise ConfigError(f"{where}: quant_method={kind!r}: supported are 'fp8' and {OURS!r}")
    for name, values in only.items():
        if section.get(name) not in values:
            raise ConfigError(
                f"{where} (quant_method {kind!r}): {name}={section.get(name)!r}: supported is {values[0]!r}"
            )
    unknown = section.keys() - only.keys() - {"quant_method", _SKIPPED}
    if unknown:
        raise ConfigError(f"{where} (quant_method {kind!r}): not supported: {sorted(unknown)}")
    skipped = section.get(_SKIPPED) or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise ConfigError(f"{where}: {_SKIPPED}={skipped!r}: must be a list of names")
    return Quantization(method, tuple(skipped))


def quantization_to_json(quantization: Quantization) -> dict[str, Any]:
    """The section that `quantization_from_json` reads."""
    if quantization.method == "fp8":
        section: dict[str, Any] = {"quant_method": "fp8"} | {
            name: values[0] for name, values in _FP8_ONLY.items()
        }
    else:
        section = {"quant_method": OURS, "format": quantization.method}
        if quantization.method == "nf4":
            section["block_size"] = NF4_BLOCK
    return section | {_SKIPPED: list(quantization.skipped)}
