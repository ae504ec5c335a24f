"""Run untrusted Python in bubblewrap's namespaces, with limits, and with a verdict that the program cannot forge.

docs/sandbox.md says what the sandbox keeps out, and what it does not.
"""

from ultrafuser.sandbox.execute import available, check, decide, run
from ultrafuser.sandbox.program import Limits, Outcome, Status

__all__ = ["Limits", "Outcome", "Status", "available", "check", "decide", "run"]
