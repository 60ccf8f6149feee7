"""Which signals stop a process."""

from __future__ import annotations

import signal

from rfengine.stop_signals import stop_signals


def test_a_hangup_stops_and_what_is_ignored_does_not() -> None:
    assert stop_signals() == (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert stop_signals() == (signal.SIGINT, signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
