"""Dynamic batching limits batcher by samples, never waits longer than allowed, and never delays a single request."""

import threading
import time

import pytest
import torch
from tuneforge_serve.server.dynamic_batcher import DynamicBatcher
from tuneforge_serve.server.request_body import RequestError


class DoublingModel:
    """Doubles its inputs, records the size of each forward pass, and can be blocked."""

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
    batchers = []

    def build(**options):
        batchers.append(DynamicBatcher(**{"max_batch_size": 8, "max_queue_size": 100, "max_wait_s": 0.0, **options}))
        return batchers[-1]

    yield build
    for each in batchers:
        each.close()


def rows(count, value=1.0):
    return torch.full((count, 2), float(value))


def block(batcher, model):
    """Occupy the thread, so that the next requests wait at the same time."""
    model.free.clear()
    model.busy.clear()
    first = batcher.submit(model, rows(1))
    assert model.busy.wait(10)
    model.sizes.clear()
    return first


def test_batch_is_limited_by_samples_for_any_sizes_of_requests(make):
    batcher, model = make(max_batch_size=8), DoublingModel()
    block(batcher, model)
    sizes = [3, 3, 3, 1, 8, 20, 2]
    futures = [batcher.submit(model, rows(size, value)) for value, size in enumerate(sizes)]
    assert batcher.num_queued_rows == sum(sizes)
    model.free.set()
    done = [each.result(10) for each in futures]
    assert max(model.sizes) == 8
    assert sum(model.sizes) == sum(sizes)
    assert len(model.sizes) < len(sizes)
    for value, (size, each) in enumerate(zip(sizes, done, strict=True)):
        assert torch.equal(each.outputs, rows(size, 2 * value))
    assert done[0].batch_size == done[1].batch_size == 7  # 3 + 3 + 1: the third 3 does not fit, the 1 does
    assert batcher.num_queued_rows == 0


def test_single_request_never_waits(make):
    batcher, model = make(max_wait_s=5.0), DoublingModel()
    for _ in range(3):
        start = time.perf_counter()
        with batcher.expect_request() as submit:
            done = submit(model, rows(1)).result(10)
        assert time.perf_counter() - start < 1
        assert done.queue_s < 0.5


def test_request_waits_for_an_expected_one_and_both_are_one_batch(make):
    batcher, model = make(max_wait_s=5.0), DoublingModel()
    with batcher.expect_request():
        first = batcher.submit(model, rows(1))
        time.sleep(0.05)
        assert not first.done()
        second = batcher.submit(model, rows(1))
    done = [first.result(10), second.result(10)]
    assert [each.batch_size for each in done] == [2, 2]
    assert 0.04 < done[0].queue_s < 2
    assert model.sizes == [2]


def test_longest_wait_counts_from_the_oldest_request(make):
    batcher, model = make(max_wait_s=0.2, max_batch_size=1000), DoublingModel()
    with batcher.expect_request():  # a request is expected all the time
        futures = []
        start = time.perf_counter()
        while not (futures and futures[0].done()) and time.perf_counter() - start < 5:
            futures.append(batcher.submit(model, rows(1)))
            time.sleep(0.05)
        first = futures[0].result(10)
    assert 0.19 < first.queue_s < 0.4
    assert first.batch_size > 1
    assert all(each.result(10).queue_s < 0.4 for each in futures)


def test_full_batch_does_not_wait(make):
    batcher, model = make(max_wait_s=30.0, max_batch_size=4), DoublingModel()
    with batcher.expect_request():
        futures = [batcher.submit(model, rows(2)) for _ in range(2)]
        assert all(each.result(10).queue_s < 5 for each in futures)


def test_versions_and_shapes_never_share_a_batch(make):
    batcher, old, new = make(), DoublingModel(), DoublingModel()
    block(batcher, old)
    futures = [batcher.submit(model, rows(1, value)) for value, model in enumerate([old, new, old, new])]
    wide = batcher.submit(old, torch.ones(1, 3))
    old.free.set()
    for value, each in enumerate(futures):
        assert torch.equal(each.result(10).outputs, rows(1, 2 * value))
    assert wide.result(10).outputs.shape == (1, 3)
    assert old.sizes == [2, 1]
    assert new.sizes == [2]


def test_request_that_breaks_the_model_fails_no_other(make):
    batcher, model = make(), DoublingModel()
    block(batcher, model)
    futures = [batcher.submit(model, rows(1, value)) for value in (1, -1, 2)]
    model.free.set()
    assert torch.equal(futures[0].result(10).outputs, rows(1, 2))
    assert torch.equal(futures[2].result(10).outputs, rows(1, 4))
    with pytest.raises(ValueError, match="negative"):
        futures[1].result(10)


def test_full_queue_is_refused_and_canceled_requests_are_not_computed(make):
    batcher, model = make(max_queue_size=4), DoublingModel()
    block(batcher, model)
    futures = [batcher.submit(model, rows(2)) for _ in range(2)]
    with pytest.raises(RequestError, match="the queue is full .4 samples") as refused:
        batcher.submit(model, rows(1))
    assert refused.value.status == 503
    assert refused.value.headers == {"Retry-After": "1"}
    with pytest.raises(RequestError):
        batcher.check_capacity()
    assert futures[0].cancel()
    model.free.set()
    futures[1].result(10)
    assert model.sizes == [2]


def test_closing_finishes_the_waiting_requests():
    batcher, model = DynamicBatcher(max_batch_size=1, max_queue_size=100, max_wait_s=0.0), DoublingModel()
    block(batcher, model)
    futures = [batcher.submit(model, rows(1)) for _ in range(5)]
    model.free.set()
    batcher.close()
    assert all(each.done() for each in futures)


def test_task_runs_in_the_forward_thread_before_waiting_requests(make):
    batcher, model = make(), DoublingModel()
    block(batcher, model)
    waits = batcher.submit(model, rows(2))
    task = batcher.run_task(lambda: (threading.current_thread().name, list(model.sizes)))
    broken = batcher.run_task(lambda: 1 / 0)
    model.free.set()
    assert task.result(10) == ("forward", [])
    with pytest.raises(ZeroDivisionError):
        broken.result(10)
    assert waits.result(10).batch_size == 2


class SqueezingModel:
    """A model that drops the sample axis of a batch of one."""

    def outputs(self, stored):
        return stored.squeeze(0)


def test_model_with_a_wrong_number_of_outputs_fails_only_its_own_requests(make):
    batcher, good = make(), DoublingModel()
    for _ in range(3):
        with pytest.raises(ValueError, match=r"outputs \(2,\) for 1 sample"):
            batcher.submit(SqueezingModel(), rows(1)).result(10)
    cancelled = batcher.run_task(lambda: time.sleep(0.05))
    second = batcher.run_task(lambda: None)
    second.cancel()
    cancelled.result(10)
    assert batcher.submit(good, rows(1)).result(10).batch_size == 1


def test_closed_batcher_refuses_tasks(make):
    batcher = make()
    batcher.close()
    with pytest.raises(RequestError, match="stopping"):
        batcher.run_task(lambda: None)
