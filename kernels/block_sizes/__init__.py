"""Block sizes that tuning found: tables by chip, committed beside this file, and the user's own."""

from .choice import log_untuned, tuned_blocks
from .table import Entry, Key, read_table, table_path, user_table_path, write_table

__all__ = [
    "Entry",
    "Key",
    "log_untuned",
    "read_table",
    "table_path",
    "tuned_blocks",
    "user_table_path",
    "write_table",
]
