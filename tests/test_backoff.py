"""Waits between attempts: bounded, growing, as long as a server asks."""

from __future__ import annotations

import time
from email.utils import formatdate

from mergekit_lite.backoff import FIRST, LONGEST, LONGEST_ASKED, asked_wait, wait_after


def test_waits_double_up_to_the_longest() -> None:
    for failures in (0, 1, 2, 5, 8, 100, 10**6):
        most = min(LONGEST, FIRST * 2 ** (max(min(failures, 50), 1) - 1))
        waits = [wait_after(failures) for _ in range(200)]
        assert most / 2 <= min(waits) < 0.6 * most and 0.9 * most < max(waits) <= most
    assert wait_after(1, 7.0) == 7 and wait_after(9, 1.0) > 1
    assert 1 <= wait_after(3, first=0.5, longest=2.0) <= 2


def test_retry_after_may_be_a_date() -> None:
    assert 5 < asked_wait(formatdate(time.time() + 9, usegmt=True)) <= 9
    assert asked_wait(formatdate(time.time() - 9, usegmt=True)) == 0
    assert asked_wait("soon") == asked_wait(None) == asked_wait("-3") == 0
    assert asked_wait("1e9") == asked_wait("inf") == LONGEST_ASKED
    assert asked_wait("nan") == 0
    assert asked_wait("Mon, 01 Jan 0001 00:00:00 -0000") == 0
    assert 0 <= asked_wait("Fri, 31 Dec 9999 23:59:59 -2359") <= LONGEST_ASKED
