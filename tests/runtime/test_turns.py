from __future__ import annotations

import threading

import pytest

from rfengine.runtime.turns import Turns

WAIT = 20.0  # seconds that a test waits for another thread at most


def test_a_turn_goes_to_the_thread_that_asked_first_not_to_the_one_that_is_quickest():
    turns, order = Turns(), []

    def other() -> None:
        with turns:
            order.append("other")

    with turns:
        thread = threading.Thread(target=other)
        thread.start()
        while len(turns._queue) < 2:
            pass
        order.append("first")
    with turns:
        order.append("first again")
    thread.join(WAIT)
    assert order == ["first", "other", "first again"]


def test_a_thread_that_has_the_turn_may_take_it_again_and_keeps_it_to_the_end():
    turns = Turns()
    with turns:
        with turns:
            pass
        assert list(turns._queue) == [threading.get_ident()]
    assert not turns._queue


def test_an_error_inside_gives_the_turn_back():
    turns = Turns()
    with pytest.raises(KeyError), turns:
        raise KeyError
    assert not turns._queue


def test_a_thread_that_is_interrupted_while_it_waits_leaves_the_queue(monkeypatch):
    turns = Turns()
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with turns:
            entered.set()
            assert leave.wait(WAIT)

    def interrupt(predicate: object) -> None:
        raise KeyboardInterrupt

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(WAIT)
    monkeypatch.setattr(turns._changed, "wait_for", interrupt)
    with pytest.raises(KeyboardInterrupt), turns:
        pass
    leave.set()
    thread.join(WAIT)
    assert not turns._queue
