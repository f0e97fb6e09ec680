"""The order of the tests: files that take long go first, so that no core waits for the last of them.

No test fails because a machine is busy.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

LONG = (  # by their time, the longest first
    "test_train.py", "test_crash.py", "test_golden.py", "test_families.py", "test_boost.py", "test_serving.py",
    "test_report.py", "test_choice.py", "test_cli.py", "test_damage.py", "test_whole.py", "test_sample_killed.py",
    "test_contributing.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the long files first; those of one file stay together."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
