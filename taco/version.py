"""The version of taco; the only place where it is written."""

from __future__ import annotations

__version__ = "0.1.0"
__version_tuple__ = (0, 1, 0)
