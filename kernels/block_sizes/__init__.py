"""What tuning found fastest: tables by chip or GPU, committed beside this file, and the user's own."""

from .choice import device_here, log_untuned, tuned_blocks, tuned_implementation
from .table import Entry, Key, read_table, table_path, user_table_path, write_table

__all__ = [
    "Entry",
    "Key",
    "device_here",
    "log_untuned",
    "read_table",
    "table_path",
    "tuned_blocks",
    "tuned_implementation",
    "user_table_path",
    "write_table",
]
