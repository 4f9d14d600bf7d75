"""collapse-probe: tells whether a Vision Transformer's attention has collapsed, and whether a fix cures it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collapse_probe.analysis.analyze import analyze
    from collapse_probe.analysis.compare import compare
    from collapse_probe.analysis.intervene import intervene
    from collapse_probe.analysis.merge import merge
    from collapse_probe.analysis.probe import Probe
    from collapse_probe.capture.capture import record as record
    from collapse_probe.results.comparison import Comparison
    from collapse_probe.results.findings import Findings
    from collapse_probe.results.intervention import Interventions
    from collapse_probe.results.sweep import Sweep
    from collapse_probe.training.monitor import Monitor
    from collapse_probe.training.sweep import sweep

__version__ = "0.1.0"
_HOMES = {
    "analyze": "analysis.analyze",
    "compare": "analysis.compare",
    "record": "capture.capture",
    "Findings": "results.findings",
    "Comparison": "results.comparison",
    "Interventions": "results.intervention",
    "Sweep": "results.sweep",
    "Monitor": "training.monitor",
    "intervene": "analysis.intervene",
    "Probe": "analysis.probe",
    "merge": "analysis.merge",
    "sweep": "training.sweep",
}
__all__ = [
    "Comparison",
    "Findings",
    "Interventions",
    "Monitor",
    "Probe",
    "Sweep",
    "__version__",
    "analyze",
    "compare",
    "intervene",
    "merge",
    "record",
    "sweep",
]


def __getattr__(name: str) -> Any:  # loaded on first use, so that the import stays light
    if name not in _HOMES:
        raise AttributeError(f"module 'collapse_probe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"collapse_probe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:  # the public names alone, for completion
    return __all__
