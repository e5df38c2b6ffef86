"""How fast the machine is from moment to moment, told by a process beside the benchmark.

A virtual machine whose host is busy slows down or stops for tens of milliseconds, and every latency with it.
``python -m meme_debate.bench_pulse`` does the same small work every few milliseconds and notes how long the
work took by the processor's clock: time in which it only waited for a processor that others used does not
count, so what the benchmark itself takes is never called the machine's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

PAUSE = 0.004
"""Seconds between two beats."""
SLOW = 0.6
"""A beat is slow whose speed is below this share of the median's."""
AFTER = 0.05
"""Seconds after a slow beat in which what has piled up is still under way."""


@dataclass
class Pulse:
    """Beats of a stretch of time.

    Attributes:
        beats: (N, 3) start and end, seconds of the monotonic clock, and seconds of the processor.
    """

    beats: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))

    @property
    def slow(self) -> NDArray[np.bool_]:
        """Which beats were slow, (N,)."""
        took = self.beats[:, 2]
        return took * SLOW > (np.median(took) if len(took) else 0.0)

    def steady(self, spans: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
        """Which spans of time no slow beat lies in or shortly before, (M,).

        Args:
            spans: M starts and ends, seconds of the monotonic clock.

        Example:
            >>> beats = np.array([[0.0, 0.1, 0.1], [1.0, 1.3, 0.3], [2.0, 2.1, 0.1], [3.0, 3.1, 0.1]])
            >>> Pulse(beats).steady([(0.02, 0.09), (0.05, 1.1), (1.9, 2.01), (2.5, 2.9)]).tolist()
            [True, False, False, True]
        """
        starts, ends = np.array(spans, np.float64).reshape(-1, 2).T
        which = np.flatnonzero(self.slow)
        # A slow stretch reaches from the beat before to the beat after: nothing is known of what is between.
        first = self.beats[np.maximum(which - 1, 0), 1]
        last = self.beats[np.minimum(which + 1, len(self.beats) - 1), 0] + AFTER
        return np.searchsorted(last, starts) == np.searchsorted(first, ends, side="right")


@contextmanager
def pulse() -> Generator[Pulse, None, None]:
    """Take the machine's pulse while the block runs; the beats are there afterwards."""
    found = Pulse()
    with subprocess.Popen(  # noqa: S603 - our own module
        [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield found
            told, _ = process.communicate("stop\n")
            found.beats = np.array(json.loads(told), np.float64).reshape(-1, 3)
        finally:
            process.kill()


def _beat() -> tuple[float, float, float]:
    start, processor = time.monotonic(), time.thread_time()
    for _ in range(20):
        sum(range(400))
    return start, time.monotonic(), time.thread_time() - processor


def _main() -> None:
    beats: list[tuple[float, float, float]] = []
    stop = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not stop.wait(PAUSE):
        beats.append(_beat())
    json.dump(beats, sys.stdout)


if __name__ == "__main__":
    _main()
