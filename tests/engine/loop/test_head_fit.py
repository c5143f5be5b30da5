"""`HeadFit`: the number of threads of its solver."""

import threadpoolctl
import torch

import tuneforge as tf
from tuneforge.builtin.targets import ClassTargets


def num_blas_threads():
    return max(pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas")


def test_the_solver_uses_as_many_threads_as_pytorch_and_leaves_their_number(tune, monkeypatch):
    threads, solve = [], ClassTargets.fit_head

    def observe(self, features, targets, *, l2):
        threads.append(num_blas_threads())
        return solve(self, features, targets, l2=l2)

    monkeypatch.setattr(ClassTargets, "fit_head", observe)
    with threadpoolctl.threadpool_limits(4, user_api="blas"):
        tune([tf.HeadFit("fit")])
        assert num_blas_threads() == 4
    assert threads == [torch.get_num_threads()]
