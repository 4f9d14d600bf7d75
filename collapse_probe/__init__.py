"""collapse-probe: tells whether a Vision Transformer's attention has collapsed, and whether a fix cures it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collapse_probe.analysis import analyze as analyze
    from collapse_probe.capture import listen as listen
    from collapse_probe.comparison import compare as compare
    from collapse_probe.findings import Findings as Findings
    from collapse_probe.intervention import intervene as intervene
    from collapse_probe.monitoring import Monitor as Monitor
    from collapse_probe.sweeping import sweep as sweep

__version__ = "0.1.0"
_HOMES = {
    "analyze": "analysis",
    "compare": "comparison",
    "listen": "capture",
    "Findings": "findings",
    "Monitor": "monitoring",
    "intervene": "intervention",
    "sweep": "sweeping",
}
__all__ = ["Findings", "Monitor", "__version__", "analyze", "compare", "intervene", "listen", "sweep"]


def __getattr__(name: str) -> Any:  # loaded on first use, so that the import stays light
    if name not in _HOMES:
        raise AttributeError(f"module 'collapse_probe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"collapse_probe.{_HOMES[name]}"), name)
