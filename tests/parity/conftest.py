"""Assertions of the shared harness say what they compared, as those of test files do."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.parity.harness")
