"""The toy model and the command line, for every test here."""

from tests.recipes.toys import toy, trivium

__all__ = ["toy", "trivium"]
