"""`python -m fullframe` is `fullframe`."""

from fullframe.cli import main

main()
