"""``python -m daunce_api``: the command line, where the script ``daunce`` is not on the path."""

from daunce_api.cli import main

main()
