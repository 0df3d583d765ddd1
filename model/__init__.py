"""Qwen3 as pure functions over a pytree of arrays; checkpoints and their place on devices."""

from .checkpoint import CheckpointError
from .config import ConfigError, GenerationDefaults, Qwen3Config, Yarn, published_config
from .loading import Model, load_model, random_model
from .params import LayerParams, Params, num_parameters
from .qwen3 import Batch, forward
from .sharding import PartitionAxis, make_mesh

__all__ = [
    "Batch",
    "CheckpointError",
    "ConfigError",
    "GenerationDefaults",
    "LayerParams",
    "Model",
    "Params",
    "PartitionAxis",
    "Qwen3Config",
    "Yarn",
    "forward",
    "load_model",
    "make_mesh",
    "num_parameters",
    "published_config",
    "random_model",
]
