"""`python -m converter`."""

from converter.cli.main import console

console()
