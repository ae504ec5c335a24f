"""`python -m ultrafuser`."""

from ultrafuser.cli.main import main

main()
