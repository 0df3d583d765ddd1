"""The spelling of EasyDeL's vSurge: a script written for it runs with `import vsurge.easydel as ed`.

Every option has its effect here, or is refused at once by name and value, or, where it can mean nothing in
inference, is said to do nothing in one line of the log.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, TypedDict, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .kernels import SUPPORTED_DTYPES, Implementation
from .model import Model, PartitionAxis, load_model, make_mesh
from .model.config import parse_dtype
from .model.loading import find_checkpoint, read_config
from .model.quantization import Method
from .model.sharding import AXIS_NAMES, TRIVIAL_DIMS
from .runtime import ReturnSample, SamplingParams
from .runtime import vSurge as Engine
from .runtime.checks import is_integer

__all__ = [
    "AttentionMechanisms",
    "AutoEasyDeLModelForCausalLM",
    "EasyDeLBaseConfigDict",
    "EasyDeLGradientCheckPointers",
    "EasyDeLQuantizationMethods",
    "PartitionAxis",
    "ReturnSample",
    "SamplingParams",
    "vSurge",
]

logger = logging.getLogger("vsurge.easydel")


class AttentionMechanisms(Enum):
    """How attention is computed; see `ATTENTION` for what is supported."""

    AUTO = "auto"
    FLASH_ATTN2 = "flash_attn2"
    RING = "ring"
    VANILLA = "vanilla"
    SPLASH = "splash"
    CUDNN = "cudnn"
    BLOCKWISE = "blockwise"
    SDPA = "sdpa"
    CUDA_FLASH_ATTN2 = "cuda_flash_attn2"
    RAGGED_PAGE_ATTENTION = "ragged_page_attention"
    PAGED_ATTENTION = "paged_attention"
    REGRESSIVE_DECODE = "autoregressive_decodeattn"


class EasyDeLQuantizationMethods(Enum):
    """How weights or the cache are quantized; the cache knows NONE and A8BIT only."""

    NONE = None
    NF4 = "nf4"
    A8BIT = "8bit"


class EasyDeLGradientCheckPointers(Enum):
    """What training keeps for its backward pass; inference has none."""

    EVERYTHING_SAVEABLE = "everything_saveable"
    NOTHING_SAVEABLE = "nothing_saveable"
    CHECKPOINT_DOTS = "checkpoint_dots"
    CHECKPOINT_DOTS_WITH_NO_BATCH_DMIS = "checkpoint_dots_with_no_batch_dims"
    NONE = ""


class EasyDeLBaseConfigDict(TypedDict, total=False):
    """The keys of `config_kwargs`.

    Attributes:
        freq_max_position_embeddings, mask_max_position_embeddings: tokens; the smaller is the default
            `max_length` of an engine.
        kv_cache_quantization_method: of the cache; A8BIT is a `kvdtype` of int8.
        gradient_checkpointing: has no effect.
        attn_mechanism, decode_attn_mechanism: of prefill steps and of decode steps.
        kvdtype: of the cache, bfloat16, float32, int8 or float8_e4m3fn.
    """

    freq_max_position_embeddings: int
    mask_max_position_embeddings: int
    kv_cache_quantization_method: EasyDeLQuantizationMethods
    gradient_checkpointing: EasyDeLGradientCheckPointers
    attn_mechanism: AttentionMechanisms
    decode_attn_mechanism: AttentionMechanisms
    kvdtype: DTypeLike


# The paged mechanisms are what every engine here does: None is the best kernel for the device. The plain ones
# are XLA's own operations.
ATTENTION: dict[AttentionMechanisms, Implementation | None] = {
    AttentionMechanisms.AUTO: None,
    AttentionMechanisms.RAGGED_PAGE_ATTENTION: None,
    AttentionMechanisms.PAGED_ATTENTION: None,
    AttentionMechanisms.REGRESSIVE_DECODE: None,
    AttentionMechanisms.VANILLA: "xla",
    AttentionMechanisms.SDPA: "xla",
}

WEIGHTS: dict[EasyDeLQuantizationMethods, Method | None] = {
    EasyDeLQuantizationMethods.NONE: None,
    EasyDeLQuantizationMethods.A8BIT: "a8bit",
    EasyDeLQuantizationMethods.NF4: "nf4",
}


@dataclass(frozen=True)
class EasyDeLModel(Model):
    """A model that also says how long its engines' sequences may be.

    Attributes:
        max_length: default of `vSurge.from_model`, tokens; None for the model's own.
    """

    max_length: int | None = None


class AutoEasyDeLModelForCausalLM:
    """Loads models."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        auto_shard_model: bool = False,
        sharding_axis_dims: Sequence[int] = TRIVIAL_DIMS,
        sharding_axis_names: Sequence[str] = AXIS_NAMES,
        partition_axis: PartitionAxis | None = None,
        config_kwargs: Mapping[str, Any] | None = None,
        quantization_method: EasyDeLQuantizationMethods | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        precision: jax.lax.Precision | None = None,
        revision: str | None = None,
    ) -> EasyDeLModel:
        """Loads a Qwen3 checkpoint.

        Args:
            pretrained_model_name_or_path: a local folder or a hub id.
            auto_shard_model: spread the model over the mesh that the next two describe; otherwise it goes to
                the first device.
            sharding_axis_dims: devices along each axis of the mesh, one of them -1 for all that remain.
            sharding_axis_names: of those axes.
            partition_axis: which axis of the mesh splits what; None for the defaults.
            config_kwargs: see `EasyDeLBaseConfigDict`.
            quantization_method: of the weights: A8BIT is `load_model`'s "a8bit", NF4 its "nf4". NONE leaves
                them as the checkpoint has them.
            dtype: bfloat16 or float32, of the operands of matrix products; None for the parameters'.
            param_dtype: bfloat16 or float32, of the parameters; None for the checkpoint's.
            precision: of matrix products; None for the highest in float32 and the default in bfloat16.
            revision: branch, tag or commit of a hub id.

        Raises:
            ValueError: an unknown option, or a value out of range.
            TypeError: config_kwargs or precision of another type.
            NotImplementedError: a value that is not supported yet.
            ConfigError, CheckpointError, FileNotFoundError: see `load_model`.
        """
        method = WEIGHTS[_member("quantization_method", quantization_method, EasyDeLQuantizationMethods)]
        if config_kwargs is not None and not isinstance(config_kwargs, Mapping):
            raise TypeError(f"config_kwargs={config_kwargs!r}: must be an EasyDeLBaseConfigDict or None")
        options = dict(config_kwargs or {})
        changes = _config_changes(options)
        if precision is not None:
            if not isinstance(precision, jax.lax.Precision):
                raise TypeError(f"precision={precision!r}: must be a jax.lax.Precision or None")
            changes["matmul_precision"] = precision
        computes_in = None if dtype is None else parse_dtype(dtype, "dtype")
        stores = None if param_dtype is None else parse_dtype(param_dtype, "param_dtype")
        folder = find_checkpoint(pretrained_model_name_or_path, revision=revision)
        max_length = _max_length(options, read_config(folder).max_length)
        if not auto_shard_model and tuple(sharding_axis_dims) != TRIVIAL_DIMS:
            make_mesh(sharding_axis_dims, sharding_axis_names)  # which cannot be, is refused all the same
            logger.warning(
                "auto_shard_model=False: the model goes to the first device, not to sharding_axis_dims=%s",
                tuple(sharding_axis_dims),
            )
        model = load_model(
            folder,
            dtype=stores,
            compute_dtype=computes_in,
            sharding_axis_dims=sharding_axis_dims if auto_shard_model else TRIVIAL_DIMS,
            axis_names=sharding_axis_names,
            partition_axis=partition_axis,
            quantization_method=method,
        )
        return EasyDeLModel(
            config=replace(model.config, **changes),
            params=model.params,
            mesh=model.mesh,
            partition_axis=model.partition_axis,
            generation_defaults=model.generation_defaults,
            source=model.source,
            max_length=max_length,
        )


class vSurge(Engine):
    """The engine, with the parameters that EasyDeL's has."""

    @classmethod
    def from_model(
        cls,
        model: Model,
        processor: Any = None,
        *,
        max_length: int | None = None,
        interleaved_mode: bool | None = None,
        slot_clear_steps: int | None = None,
        bytecode_decode: bool | None = None,
        **options: Any,
    ) -> vSurge:
        """Builds an engine around a model; nothing is compiled or allocated yet.

        Args:
            model: from `AutoEasyDeLModelForCausalLM`, `vsurge.load_model` or `vsurge.random_model`.
            processor: its tokenizer; None if prompts and output are token ids.
            max_length: longest sequence, tokens; None for what the model was loaded with.
            interleaved_mode, slot_clear_steps, bytecode_decode: have no effect: prompts are fed
                beside whoever decodes, a place is free as soon as its sequence ends, and text never
                contains half a character.
            options: the other parameters of `vsurge.vSurge.from_model`.
        """
        without_effect = {
            "interleaved_mode": interleaved_mode,
            "slot_clear_steps": slot_clear_steps,
            "bytecode_decode": bytecode_decode,
        }
        for name, value in without_effect.items():
            if value is not None:
                logger.warning("%s=%s has no effect here", name, value)
        if max_length is None and isinstance(model, EasyDeLModel):
            max_length = model.max_length
        return super().from_model(model, processor, max_length=max_length, **options)

    create_odriver = from_model

    def complete(self, *_: Any, **__: Any) -> NoReturn:
        """Is not supported yet."""
        raise NotImplementedError(
            "vSurge.complete: not supported yet; generate(..., stream=True) does its work"
        )


def _config_changes(options: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Qwen3Config` that `config_kwargs` sets."""
    known = list(EasyDeLBaseConfigDict.__annotations__)
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"config_kwargs: {name}={value!r}: no such option; there are {known}")
    if "gradient_checkpointing" in options:
        policy = _member(
            "gradient_checkpointing", options["gradient_checkpointing"], EasyDeLGradientCheckPointers
        )
        wanted = policy is not EasyDeLGradientCheckPointers.NONE
        level = logging.WARNING if wanted else logging.INFO
        logger.log(level, "gradient_checkpointing=%s has no effect: inference computes no gradients", policy)
    changes: dict[str, Any] = {}
    for theirs, ours in (("attn_mechanism", "attention"), ("decode_attn_mechanism", "decode_attention")):
        if theirs in options:
            changes[ours] = _attention(theirs, options[theirs])
    kv_dtype = _cache_dtype(options.get("kvdtype"), options.get("kv_cache_quantization_method"))
    if kv_dtype is not None:
        changes["kv_dtype"] = kv_dtype
    return changes


Member = TypeVar("Member", bound=Enum)


def _member(name: str, value: Any, kind: type[Member]) -> Member:
    """A member of an enumeration, given as such or by its value."""
    try:
        return kind(value)
    except ValueError:
        members = [f"{kind.__name__}.{member.name}" for member in kind]
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(members)}") from None


def _attention(name: str, value: Any) -> Implementation | None:
    mechanism = _member(name, value, AttentionMechanisms)
    if mechanism not in ATTENTION:
        supported = ", ".join(member.name for member in ATTENTION)
        raise NotImplementedError(f"{name}={mechanism}: has no equivalent here; supported are {supported}")
    return ATTENTION[mechanism]


def _cache_dtype(value: Any, quantization_method: Any) -> Any:
    """The dtype of the cache that two options name; None if neither does."""
    name = "kv_cache_quantization_method"
    method = _member(name, quantization_method, EasyDeLQuantizationMethods)
    if method is EasyDeLQuantizationMethods.NF4:
        raise NotImplementedError(
            f"{name}={method}: not supported; supported are EasyDeLQuantizationMethods.NONE and A8BIT"
        )
    quantized = jnp.dtype(jnp.int8) if method is EasyDeLQuantizationMethods.A8BIT else None
    if value is None:
        return quantized
    supported = ", ".join(dtype.name for dtype in SUPPORTED_DTYPES)
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise ValueError(f"kvdtype={value!r}: no such dtype; supported are {supported}") from None
    if dtype not in SUPPORTED_DTYPES:
        raise NotImplementedError(f"kvdtype={dtype}: not supported yet; supported are {supported}")
    if quantized is not None and dtype.itemsize == 1 and dtype != quantized:
        raise ValueError(f"kvdtype={dtype}: contradicts {name}={method}, which is int8")
    return quantized or dtype


def _max_length(options: dict[str, Any], longest: int) -> int | None:
    """The default `max_length` of engines: the smaller of the two limits, each at most the model's own."""
    lengths: list[int] = []
    for name in ("freq_max_position_embeddings", "mask_max_position_embeddings"):
        length = options.get(name)
        if length is None:
            continue
        if not is_integer(length) or length < 2:
            raise ValueError(f"{name}={length!r}: must be a number of tokens, at least 2")
        if length > longest:
            raise ValueError(f"{name}={length}: this model's position embedding reaches {longest} tokens")
        lengths.append(int(length))
    return min(lengths, default=None)
