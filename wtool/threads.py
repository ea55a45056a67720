"""Threads that each compute with one torch thread, so that sums have the same digits on any number of them."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


def available_processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread for a while: many small steps only wait for one another on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def thread_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads; torch computes with one thread inside each, and on the calling thread meanwhile."""
    # A new thread computes on all of MKL's threads until it has asked torch for their number, whatever another
    # thread has set; so the first thing each does is to ask.
    with one_thread(), ThreadPoolExecutor(workers, "wtool", initializer=torch.get_num_threads) as pool:
        yield pool
