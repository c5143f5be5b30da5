"""Dynamic batching: bounds in rows, waits that are measured and never added up, and no company for the lone."""

import threading
import time

import pytest
import torch
from tuneforge_serve.server.dynamic_batcher import DynamicBatcher
from tuneforge_serve.server.request_body import RequestError


class Doubling:
    """Doubles its rows, notes the size of each forward pass, and can be held up."""

    def __init__(self) -> None:
        self.sizes = []
        self.free = threading.Event()
        self.free.set()
        self.busy = threading.Event()

    def outputs(self, stored):
        self.sizes.append(len(stored))
        self.busy.set()
        assert self.free.wait(10)
        if bool((stored < 0).any()):
            raise ValueError("a negative row")
        return 2 * stored


@pytest.fixture
def make():
    made = []

    def build(**given):
        made.append(DynamicBatcher(**{"max_batch_size": 8, "max_queue_size": 100, "max_wait_s": 0.0, **given}))
        return made[-1]

    yield build
    for each in made:
        each.close()


def rows(count, value=1.0):
    return torch.full((count, 2), float(value))


def held_up(batches, model):
    """Occupy the thread, so that what follows waits together."""
    model.free.clear()
    model.busy.clear()
    first = batches.submit(model, rows(1))
    assert model.busy.wait(10)
    model.sizes.clear()
    return first


def test_a_batch_is_bounded_in_rows_whatever_the_sizes_of_its_requests(make):
    batches, model = make(max_batch_size=8), Doubling()
    held_up(batches, model)
    sizes = [3, 3, 3, 1, 8, 20, 2]
    futures = [batches.submit(model, rows(size, value)) for value, size in enumerate(sizes)]
    assert batches.num_queued_rows == sum(sizes)
    model.free.set()
    done = [each.result(10) for each in futures]
    assert max(model.sizes) == 8
    assert sum(model.sizes) == sum(sizes)
    assert len(model.sizes) < len(sizes)
    for value, (size, each) in enumerate(zip(sizes, done, strict=True)):
        assert torch.equal(each.outputs, rows(size, 2 * value))
    assert done[0].batch_size == done[1].batch_size == 7  # 3 + 3 + 1: the third 3 does not fit, the 1 does
    assert batches.num_queued_rows == 0


def test_a_lone_request_never_waits_for_company(make):
    batches, model = make(max_wait_s=5.0), Doubling()
    for _ in range(3):
        began = time.perf_counter()
        with batches.expect_request() as submit:
            done = submit(model, rows(1)).result(10)
        assert time.perf_counter() - began < 1
        assert done.queue_s < 0.5


def test_a_request_waits_for_one_that_is_on_its_way_and_both_are_one_batch(make):
    batches, model = make(max_wait_s=5.0), Doubling()
    with batches.expect_request():
        first = batches.submit(model, rows(1))
        time.sleep(0.05)
        assert not first.done()
        second = batches.submit(model, rows(1))
    done = [first.result(10), second.result(10)]
    assert [each.batch_size for each in done] == [2, 2]
    assert 0.04 < done[0].queue_s < 2
    assert model.sizes == [2]


def test_the_longest_wait_counts_from_the_oldest_request_and_is_not_added_up(make):
    batches, model = make(max_wait_s=0.2, max_batch_size=1000), Doubling()
    with batches.expect_request():  # something is on its way all the time
        futures = []
        began = time.perf_counter()
        while not (futures and futures[0].done()) and time.perf_counter() - began < 5:
            futures.append(batches.submit(model, rows(1)))
            time.sleep(0.05)
        first = futures[0].result(10)
    assert 0.19 < first.queue_s < 0.4
    assert first.batch_size > 1
    assert all(each.result(10).queue_s < 0.4 for each in futures)


def test_a_full_batch_does_not_wait(make):
    batches, model = make(max_wait_s=30.0, max_batch_size=4), Doubling()
    with batches.expect_request():
        futures = [batches.submit(model, rows(2)) for _ in range(2)]
        assert all(each.result(10).queue_s < 5 for each in futures)


def test_versions_and_shapes_never_share_a_batch(make):
    batches, old, new = make(), Doubling(), Doubling()
    held_up(batches, old)
    futures = [batches.submit(model, rows(1, value)) for value, model in enumerate([old, new, old, new])]
    wide = batches.submit(old, torch.ones(1, 3))
    old.free.set()
    for value, each in enumerate(futures):
        assert torch.equal(each.result(10).outputs, rows(1, 2 * value))
    assert wide.result(10).outputs.shape == (1, 3)
    assert old.sizes == [2, 1]
    assert new.sizes == [2]


def test_a_request_that_breaks_the_model_fails_no_other(make):
    batches, model = make(), Doubling()
    held_up(batches, model)
    futures = [batches.submit(model, rows(1, value)) for value in (1, -1, 2)]
    model.free.set()
    assert torch.equal(futures[0].result(10).outputs, rows(1, 2))
    assert torch.equal(futures[2].result(10).outputs, rows(1, 4))
    with pytest.raises(ValueError, match="negative"):
        futures[1].result(10)


def test_a_full_queue_says_when_to_come_back_and_what_nobody_waits_for_is_not_computed(make):
    batches, model = make(max_queue_size=4), Doubling()
    held_up(batches, model)
    futures = [batches.submit(model, rows(2)) for _ in range(2)]
    with pytest.raises(RequestError, match="4 rows wait") as refused:
        batches.submit(model, rows(1))
    assert refused.value.status == 503
    assert refused.value.headers == {"Retry-After": "1"}
    with pytest.raises(RequestError):
        batches.check_capacity()
    assert futures[0].cancel()
    model.free.set()
    futures[1].result(10)
    assert model.sizes == [2]


def test_closing_answers_what_waits():
    batches, model = DynamicBatcher(max_batch_size=1, max_queue_size=100, max_wait_s=0.0), Doubling()
    held_up(batches, model)
    futures = [batches.submit(model, rows(1)) for _ in range(5)]
    model.free.set()
    batches.close()
    assert all(each.done() for each in futures)


def test_what_is_done_aside_is_done_in_the_same_thread_before_what_waits(make):
    batches, model = make(), Doubling()
    held_up(batches, model)
    waits = batches.submit(model, rows(2))
    aside = batches.run_task(lambda: (threading.current_thread().name, list(model.sizes)))
    broken = batches.run_task(lambda: 1 / 0)
    model.free.set()
    assert aside.result(10) == ("forward", [])
    with pytest.raises(ZeroDivisionError):
        broken.result(10)
    assert waits.result(10).batch_size == 2


class Squeezed:
    """A model that loses the axis of a batch of one."""

    def outputs(self, stored):
        return stored.squeeze(0)


def test_a_model_that_answers_with_other_rows_fails_its_own_requests_only(make):
    batches, good = make(), Doubling()
    for _ in range(3):
        with pytest.raises(ValueError, match=r"outputs \(2,\) for 1 row"):
            batches.submit(Squeezed(), rows(1)).result(10)
    cancelled = batches.run_task(lambda: time.sleep(0.05))
    second = batches.run_task(lambda: None)
    second.cancel()
    cancelled.result(10)
    assert batches.submit(good, rows(1)).result(10).batch_size == 1


def test_nothing_is_taken_aside_once_it_is_closed(make):
    batches = make()
    batches.close()
    with pytest.raises(RequestError, match="stopping"):
        batches.run_task(lambda: None)
