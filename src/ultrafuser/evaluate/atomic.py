"""Files that are whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(file: Path, tree: Mapping[str, Any]) -> None:
    """All of it, or what was there before."""
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    draft.replace(file)
