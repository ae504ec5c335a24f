"""Results that are whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultrafuser.data.writing import whole_file


def write_json(file: Path, tree: Mapping[str, Any]) -> None:
    """All of it, or what was there before; answers may hold half a character, so other letters than ASCII are escaped.

    Raises:
        DataError: it cannot be written.
    """
    with whole_file(file, force=True) as draft:
        draft.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
