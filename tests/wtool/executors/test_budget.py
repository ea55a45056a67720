"""What is in flight stays within the bound, nothing waits forever, and results do not depend on it."""

import threading
import time

import pytest
import torch

from wtool.dtypes import TensorInfo
from wtool.errors import UsageError
from wtool.executors.budget import Budget
from wtool.plan import Step


def used_by(limit: int | None, sizes: list[int]) -> int:
    """The most bytes that were held at once, by a thread for each size."""
    budget, guard, held, most = Budget(limit), threading.Lock(), 0, 0

    def work(nbytes: int) -> None:
        nonlocal held, most
        with budget.room(nbytes):
            with guard:
                held += nbytes
                most = max(most, held)
            time.sleep(0.002)
            with guard:
                held -= nbytes

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return most


def test_threads_stay_within_the_bound() -> None:
    assert 1 <= used_by(10, [3, 4, 5, 6, 7, 10, 1, 1, 2] * 5) <= 10


def test_what_is_larger_than_the_bound_runs_alone() -> None:
    assert used_by(10, [12, 3, 12, 3, 12]) <= 12


def test_without_a_bound_nobody_waits() -> None:
    together = threading.Barrier(4, timeout=20)
    budget = Budget(None)

    def work() -> None:
        with budget.room(1 << 40):
            together.wait()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not together.broken


def test_room_is_given_back_after_an_error() -> None:
    budget = Budget(10)
    with pytest.raises(ValueError), budget.room(10):
        raise ValueError
    with budget.room(10):
        pass


def test_a_step_that_never_fits_is_refused_before_it_is_begun() -> None:
    info = TensorInfo("F32", (1000,))
    steps = [Step((), {"small": TensorInfo("F32", (1,))}, torch.clone), Step((), {"large": info}, torch.clone, 96)]
    Budget(4096).check(steps)
    with pytest.raises(UsageError, match=r"4\.1 kB is too little: 'large' alone takes 4\.1 kB"):
        Budget(4095).check(steps)
    Budget(None).check(steps)
