"""What ends again and again is given up; what ends now and then is not."""

from __future__ import annotations

from deploy.endings import Endings


def test_so_many_endings_within_a_minute_are_too_many() -> None:
    endings = Endings(limit=3)
    assert [endings.count(now) for now in (0.0, 20.0, 59.0)] == [False, False, True]


def test_endings_are_forgotten_after_a_minute() -> None:
    endings = Endings(limit=3)
    assert [endings.count(now) for now in (0.0, 30.0, 60.0, 89.0)] == [False, False, False, True]
