"""`python cli.py --base … --adapter … --out …`, from a checkout."""

from converter.cli import main

if __name__ == "__main__":
    main()
