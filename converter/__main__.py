"""`python -m converter`."""

from converter.cli import console

console()
