"""Qwen3 as pure functions over a pytree of arrays; checkpoints and their place on devices."""

from .config import PUBLISHED, ConfigError, Experts, Qwen3Config, Yarn, published_config
from .generation_defaults import GenerationDefaults
from .loading import Model, load_model, random_model
from .params import LayerParams, Params, num_active_parameters, num_parameters
from .quantization import QuantizedMatrix
from .quantized_specs import Quantization
from .qwen3 import Batch, forward, hidden_states, logits
from .safetensors_file import CheckpointError
from .saving import save_model
from .sharding import Layout, PartitionAxis, layout_of, make_mesh

__all__ = [
    "PUBLISHED",
    "Batch",
    "CheckpointError",
    "ConfigError",
    "Experts",
    "GenerationDefaults",
    "LayerParams",
    "Layout",
    "Model",
    "Params",
    "PartitionAxis",
    "Quantization",
    "QuantizedMatrix",
    "Qwen3Config",
    "Yarn",
    "forward",
    "hidden_states",
    "layout_of",
    "load_model",
    "logits",
    "make_mesh",
    "num_active_parameters",
    "num_parameters",
    "published_config",
    "random_model",
    "save_model",
]
