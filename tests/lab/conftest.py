"""The command line, for every test here."""

from tests.recipes.toys import trivium

__all__ = ["trivium"]
