"""The user's directory: what the commands write goes there and never into the installed package.

The library itself writes nothing there; only the commands do.
"""

from __future__ import annotations

import logging
import os
import tempfile

from .kernels.home import home_path

logger = logging.getLogger("vsurge")


def keep_compiled_programs() -> None:
    """Has jax keep compiled programs in the user's directory, so that the next start is quick.

    `JAX_COMPILATION_CACHE_DIR` takes precedence. A directory that cannot be written to is a warning.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = home_path() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a folder that exists may still be read-only
            pass
    except OSError as error:
        logger.warning(
            "%s cannot be written to (%s): compiled programs are not kept, every start compiles anew; "
            "VSURGE_HOME chooses another folder",
            folder,
            error.strerror or error,
        )
        return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Small programs count too: by default only what took a second to compile is kept.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
