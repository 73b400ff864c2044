"""Tests here may be coroutines, as those of the bridge."""

from tests.bridge.conftest import pytest_pyfunc_call

__all__ = ["pytest_pyfunc_call"]
