"""What a command gave, for every test of the command line."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Result(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)
