"""What the TPU compiler says of a kernel, on any machine."""

from .compiler import CHIPS, compile_for

__all__ = ["CHIPS", "compile_for"]
