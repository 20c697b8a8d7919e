"""Other libraries: import those of optional extras, and quote their errors."""

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


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
