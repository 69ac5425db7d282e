"""Signals to a process that trains: the first asks, its echoes are the same request, a later one ends the process."""

import signal
import subprocess
import sys

from pipeline.interrupt import ONE_REQUEST_SEC, stop_requested

STOPS_BETWEEN_STEPS = """
import os, signal, sys, time
from pipeline.interrupt import stop_requested
with stop_requested() as stopping:
    for wait in sys.argv[1:]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(float(wait))
    print("asked to stop" if stopping() else "not asked")
"""


def stops(*waits):
    """A process that gets SIGTERM before each wait, in seconds: its exit code and what it prints."""
    command = [sys.executable, "-c", STOPS_BETWEEN_STEPS, *map(str, waits)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.strip()


def test_no_signal_is_no_request():
    assert stops() == (0, "not asked")


def test_a_launcher_of_several_threads_that_dies_is_one_request():
    parent = """
import ctypes, os, signal, subprocess, sys, threading, time
for _ in range(16):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
    child = """
import ctypes, os, signal, time
from pipeline.interrupt import stop_requested
with stop_requested() as stopping:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    os.kill(os.getppid(), signal.SIGKILL)
    while not stopping():
        time.sleep(0.01)
    print("asked to stop", flush=True)
"""
    for _ in range(8):  # a third of them had a second signal without the wait
        launcher = subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True)
        output, _ = launcher.communicate(timeout=60)  # until nobody holds its end
        assert (launcher.returncode, output) == (-signal.SIGKILL, "asked to stop\n")


def test_a_later_signal_ends_the_process():
    assert stops(2 * ONE_REQUEST_SEC, 10) == (-signal.SIGTERM, "")


def test_the_handlers_from_before_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requested() as stopping:
        assert signal.getsignal(signal.SIGTERM) is not before
        signal.raise_signal(signal.SIGTERM)
        assert stopping()
    assert signal.getsignal(signal.SIGTERM) is before
