"""Import the modules of optional extras."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def needed(module: str, extra: str) -> Any:
    """Import a module that an extra installs.

    Raises:
        ImportError: The module is not installed; the message gives the pip command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this needs {module}; run: pip install 'transformer-lens-rome[{extra}]'"
        ) from error
