"""The trained models that ship with the package: which there are, where their files lie, what each file says of itself."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "bundled"
MODELS = {
    "digits-tied-mhsa": "positive control: one block reused 24 times, plain attention",
    "digits-tied-re-attention": "the positive control with Re-attention, of its own in every block",
    "digits-mhsa": "an ordinary ViT of 24 blocks, plain attention",
    "digits-re-attention": "the ordinary ViT of 24 blocks with Re-attention",
}


def bundled_models() -> list[str]:
    """The names of the models whose files are there, in the order of MODELS."""
    return [name for name in MODELS if file_of(name).is_file()]


def file_of(name: str) -> Path:
    """Where the file of a bundled model lies."""
    return FOLDER / f"{name}.safetensors"
