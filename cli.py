"""`python cli.py --base … --adapter … --out …`, from a checkout."""

from converter.cli.main import console

if __name__ == "__main__":
    console()
