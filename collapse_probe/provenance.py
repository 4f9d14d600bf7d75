"""What a number depends on: the versions of the software, the names of the images."""

from __future__ import annotations

import hashlib
import platform
import re
import secrets
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import import_module, metadata
from typing import Any

from collapse_probe.errors import ModelError

PACKAGES = ("collapse-probe", "torch", "timm", "torchvision", "transformers", "numpy", "scipy")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a run may depend on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def stamp() -> dict[str, Any]:
    """What makes a run this one: an `id` of its own, the versions of the software, and the time, in UTC."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"id": secrets.token_hex(8), "versions": versions(), "created": now}


def require_torchvision() -> None:
    """Import torchvision, on which timm stands; ModelError where it was not built for the torch that is installed."""
    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        raise
    except Exception as error:  # RuntimeError of a missing operator, then AttributeError of a half-made module
        found = versions()
        pair = f"torch {found.get('torch', '?')} and torchvision {found.get('torchvision', '?')}"
        way = "install two that were released together: pip install --upgrade torch torchvision"
        raise ModelError(f"{pair} do not fit each other ({error}); {way}") from error


def names_sha256(names: Sequence[str]) -> str:
    """A fingerprint of an image set: SHA-256 of the names in their order, one a line."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


NOT_WRITTEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and what stands for bytes that are no UTF-8


def escaped(name: str) -> str:
    """A name that can be written anywhere: bytes that were no UTF-8 and control characters as escapes.

    >>> escaped("caf\udce9.png"), escaped("a\x1b")
    ('caf\\xe9.png', 'a\\x1b')
    """
    return NOT_WRITTEN.sub(_escape, name)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
