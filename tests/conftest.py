"""The order of the tests: files that take long go first, so that no core waits for the last of them.

No test fails because a machine is busy.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")

LONG = (  # by their time, the longest first
    "test_train.py", "test_crash.py", "test_golden.py", "test_families.py", "test_boost.py", "test_serving.py",
    "test_report.py", "test_choice.py", "test_cli.py", "test_damage.py", "test_whole.py", "test_sample_killed.py",
    "test_contributing.py",
)  # fmt: skip
POSIX = re.compile(
    r"import (fcntl|pty|resource)|from tests(\.\w+)* import .*\b(browser|faults|processes)\b|"
    r"from tests\.(browser|every_change|faults|processes) import|os\.(fork|killpg|mkfifo)|signal\.SIGKILL"
)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out, where there is no POSIX, the tests that take it for granted."""
    if os.name == "posix" or not collection_path.name.startswith("test_"):
        return None
    return True if POSIX.search(collection_path.read_text(encoding="utf-8")) else None


@pytest.fixture(scope="module", autouse=True)
def _what_stays_is_no_garbage() -> None:
    """Keep what is there before a file's tests out of the search for garbage.

    That is all that was imported and every test, through which each training and each model that is let go would search
    anew: a fourth of the time of training tests. It is done for each file, as runs with several workers undo it.
    """
    gc.freeze()


@pytest.fixture
def place_of_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the clusters that commands start here: their sockets lie in it, so its name has to be short."""
    with TemporaryDirectory(prefix="m", dir="/tmp", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the long files first; those of one file stay together."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
