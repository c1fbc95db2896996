"""Signals: one is a request, a second SIGINT is an order, and handlers go back where they came from."""

from __future__ import annotations

import signal
import threading

import pytest

from guided_descent.bench.signals import Interrupted, SignalFlag


@pytest.fixture(autouse=True)
def _handlers_are_restored():
    before = {number: signal.getsignal(number) for number in SignalFlag.SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SignalFlag.SIGNALS} == before


@pytest.mark.parametrize("number", SignalFlag.SIGNALS)
def test_the_first_sets_the_flag(number):
    with SignalFlag() as flag:
        assert flag.received is None
        signal.raise_signal(number)
        assert flag.received == number


def test_a_second_interrupt_stops_at_once_and_a_second_term_does_not(request):
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, kept))
    with pytest.raises(KeyboardInterrupt), SignalFlag() as flag:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert flag.received == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        assert flag.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second SIGINT was ignored")


def test_long_work_is_left_at_once_and_not_begun_after_a_signal():
    with SignalFlag() as flag:
        with pytest.raises(Interrupted), flag.interruptible():
            try:
                signal.raise_signal(signal.SIGTERM)
            except Exception:
                pytest.fail("ordinary handlers must not see it")
            pytest.fail("it went on")
        signal.raise_signal(signal.SIGTERM)  # outside: only a flag
        with pytest.raises(Interrupted), flag.interruptible():
            pytest.fail("it began")


def test_other_threads_work_without_signals():
    seen = []

    def work():
        with SignalFlag() as flag:
            seen.append(flag.received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None]
