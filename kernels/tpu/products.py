# pyright: reportUnknownMemberType=false
# (jax's signatures are only partly typed)
"""Matrix products inside kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax import lax


def dot(left: Any, right: Any, *, contract: tuple[int, int]) -> Any:
    """A product of two matrices, summed in float32.

    Float32 factors are multiplied at the highest precision: a TPU's default is one bfloat16 pass.

    Args:
        contract: the axis of the left and of the right factor that are summed over.
    """
    precision = lax.Precision.HIGHEST if left.dtype == np.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision, preferred_element_type=np.dtype(np.float32))
