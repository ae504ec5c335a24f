"""`python -m ultrafuser`."""

from ultrafuser.cli import main

main()
