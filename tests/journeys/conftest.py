"""Fixtures of the journeys: a toy model directory, made once a session, and the command line in this process."""

from __future__ import annotations

from tests.recipes.toys import toy, trivium

__all__ = ["toy", "trivium"]
