"""Run the command line as `python -m ultrafuser`."""

from ultrafuser.cli.main import main

main()
