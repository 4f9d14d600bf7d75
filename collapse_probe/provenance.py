"""What a number depends on: the versions of the software, the names of the images."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib import metadata

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


def names_sha256(names: Sequence[str]) -> str:
    """A fingerprint of an image set: SHA-256 of the names in their order, one a line."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
