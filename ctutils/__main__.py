"""`python -m ctutils`: see `ctutils.cli`."""

from ctutils.cli import console

if __name__ == "__main__":
    console()
