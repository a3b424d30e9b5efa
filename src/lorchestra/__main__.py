"""``python -m lorchestra``."""

from lorchestra.cli import main

main()
