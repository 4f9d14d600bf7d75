"""Models: where they come from, our own, the fixes, checkpoints."""

from collapse_probe.provenance import require_torchvision

require_torchvision()  # before timm, whose import would fail with a missing operator and not say why
