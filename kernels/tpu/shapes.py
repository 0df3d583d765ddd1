"""The registers of a TPU's vector unit, which hold tiles of rows."""

LANES, SUBLANES = 128, 8  # 32-bit numbers in a row, and rows


def padded(size: int, multiple: int = LANES) -> int:
    """The next multiple of a number; by default what `size` numbers take in a register's rows."""
    return -(-size // multiple) * multiple
