"""The JSON files that carry their schema: read back, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from collapse_probe.errors import OutputError


def read_document(folder: str | Path, file: str, *, schema: str, refusal: str, command: str) -> dict[str, Any]:
    """The content of `file` in `folder`, as `command` writes it.

    OutputError where there is none (`folder`, then `refusal`, such as "holds no sweep") or it has another schema.
    """
    path = Path(folder) / file
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{folder} {refusal} ({error}); expected {file} as {command} writes it") from error
    if content.get("schema") != schema:
        raise OutputError(f"{path} has schema {content.get('schema')!r}; expected {schema!r}: {command} again")
    return content
