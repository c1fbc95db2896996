"""The worker pool with real processes: order, errors, deaths, signals, one thread, and what the display prints."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from rich.console import Console

from guided_descent.bench.display import Display, duration
from guided_descent.bench.files import BenchError
from guided_descent.bench.pool import Job, Stopped, run_jobs


def double(x, *, tick):
    for step in range(1, 4):
        tick(step, float(x))
    return 2 * x


def report_threads(*, tick):
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.getpid()


def fail(*, tick):
    raise ValueError("lr=-1 must be 0 or more")


class Unpicklable(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a}{b}")


def fail_oddly(*, tick):
    raise Unpicklable("a", "b")


def fail_for_a_reason(*, tick):
    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        raise BenchError("cannot save") from error


def die(*, tick):
    os.kill(os.getpid(), signal.SIGKILL)


def save_when_asked(path, *, tick):
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    tick(1, None)
    while not asked:
        time.sleep(0.01)
    with open(path, "w") as file:
        file.write(f"saved after {len(asked)} request")
    raise Stopped(asked[0])


def jobs(n, function=double):
    return [Job(f"job {x}", 3, function, (x,)) for x in range(n)]


def test_results_come_in_order_from_one_thread_processes():
    results = run_jobs([*jobs(3), Job("threads", 1, report_threads)], workers=2)
    assert results[:3] == [0, 2, 4]
    threads, variable, pid = results[3]
    assert (threads, variable) == (1, "1")
    assert pid != os.getpid()


def test_no_workers_means_this_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_jobs([Job("here", 1, report_threads)], workers=0)[0][2] == os.getpid()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_raised_as_itself(workers):
    with pytest.raises(ValueError, match="lr=-1 must be 0 or more"):
        run_jobs([Job("bad", 3, fail), *jobs(2)], workers=workers)


def test_an_error_that_cannot_travel_arrives_as_text():
    with pytest.raises(RuntimeError, match="Unpicklable: ab"):
        run_jobs([Job("odd", 1, fail_oddly)], workers=1)


def test_an_error_keeps_its_cause():
    with pytest.raises(BenchError, match="cannot save") as caught:
        run_jobs([Job("full", 1, fail_for_a_reason)], workers=1)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == 28


def test_a_killed_worker_is_named():
    with pytest.raises(BenchError, match=r"'victim' died \(exit code -9\).*memory"):
        run_jobs([Job("victim", 1, die)], workers=1)


def test_an_error_lets_the_running_job_save(tmp_path):
    saved = tmp_path / "saved"
    with pytest.raises(ValueError, match="lr=-1"):
        run_jobs([Job("long", 9, save_when_asked, (str(saved),)), Job("bad", 1, wait_and_fail)], workers=2)
    assert saved.read_text() == "saved after 1 request"


def wait_and_fail(*, tick):
    time.sleep(1.0)
    fail(tick=tick)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_workers_save_and_is_raised(tmp_path, number):
    saved = tmp_path / "saved"
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:0] = {sys.path!r} + [{os.path.dirname(os.path.abspath(__file__))!r}]
        from rich.console import Console
        from test_pool import Display, Stopped, Job, run_jobs, save_when_asked
        if __name__ == "__main__":
            class Shout(Display):
                def ticked(self, *args):
                    print("running", flush=True)
            try:
                run_jobs([Job("long", 9, save_when_asked, ({str(saved)!r},))], 1, Shout(Console(quiet=True)))
            except Stopped as stop:
                sys.exit(128 + stop.signal)
        """)
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "running\n"
    os.killpg(process.pid, number)  # as a terminal does: to the whole group
    assert process.wait(20) == 128 + number
    assert saved.read_text() == "saved after 1 request"


def test_the_display_prints_a_line_per_job_where_there_is_no_terminal():
    text = io.StringIO()
    display = Display(Console(file=text, width=200), describe=lambda result: f"result {result}")
    run_jobs(jobs(2), workers=0, display=display)
    lines = text.getvalue().splitlines()
    assert lines[0] == "[1/2] job 0: result 0, about 0 s left"
    assert lines[1] == "[2/2] job 1: result 2"


def test_the_live_display_shows_step_loss_and_time_left():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120, color_system=None)
    display = Display(console)
    with display.open(jobs(2)):
        display.started(0, 0)
        display.ticked(0, 2, 1.25)
        display.progress.refresh()
    shown = text.getvalue()
    assert "job 0" in shown
    assert "2/3" in shown
    assert "loss 1.25" in shown
    assert "left" in shown


def test_the_time_left_counts_only_steps_seen_trained(monkeypatch):
    """A run that was found finished, or resumed half way, says nothing about the speed."""
    now = 100.0
    monkeypatch.setattr("guided_descent.bench.display.time.monotonic", lambda: now)
    display = Display(Console(quiet=True))
    with display.open([Job("a", 100, double), Job("b", 100, double), Job("c", 100, double)]):
        display.started(0, 0)
        display.finished(0, None)  # found finished
        assert display.time_left() == "estimating the time left"
        now += 60  # imports and data
        display.started(0, 1)
        display.ticked(0, 50, 1.0)  # resumed
        assert display.time_left() == "estimating the time left"
        now += 5
        display.ticked(0, 60, 1.0)  # ten steps in five seconds
        assert display.time_left() == "about 1 min 10 s left"


def test_durations():
    assert [duration(s) for s in (0.4, 59.4, 59.6, 3599, 3600)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
    ]
