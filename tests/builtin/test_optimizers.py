import subprocess
import sys

import pytest
import torch

from tuneforge import OptionError, UnknownNameError
from tuneforge.builtin.optimizers import SGD, AdamW, TorchOptimizer

REFUSED = {"LBFGS", "SparseAdam"}
KINDS = sorted(
    name
    for name, each in vars(torch.optim).items()
    if isinstance(each, type) and issubclass(each, torch.optim.Optimizer) and name != "Optimizer"
)


def groups(*, rows=3, device="cpu", dtype=torch.float32, **extra):
    torch.manual_seed(0)
    matrix = torch.randn(rows, 4, dtype=dtype, device=device).requires_grad_()
    return [{"params": [matrix], "lr": 0.1, "peak_lr": 0.1, **extra}]


def stepped(optimizer):
    (matrix,) = optimizer.param_groups[0]["params"]
    matrix.grad = torch.ones_like(matrix)
    optimizer.step()
    return matrix.detach().clone()


def test_sgd_is_bit_identical_to_torch():
    ours = SGD(momentum=0.8, nesterov=True, weight_decay=0.1).make(groups(), fused=False)
    theirs = torch.optim.SGD(groups(), momentum=0.8, nesterov=True, weight_decay=0.1)
    for _ in range(3):
        assert torch.equal(stepped(ours), stepped(theirs))


def test_adamw_is_bit_identical_to_torch():
    ours = AdamW(beta1=0.8, beta2=0.99, eps=1e-6).make(groups(), fused=False)
    theirs = torch.optim.AdamW(groups(), betas=(0.8, 0.99), eps=1e-6, weight_decay=0.01)
    for _ in range(3):
        assert torch.equal(stepped(ours), stepped(theirs))


@pytest.mark.parametrize(
    "part", [SGD(weight_decay=0.5), AdamW(weight_decay=0.5), TorchOptimizer(kind="Adam", weight_decay=0.5)]
)
def test_a_groups_own_weight_decay_beats_the_default(part):
    made = part.make([*groups(), *groups(weight_decay=0.0)], fused=True)
    assert [group["weight_decay"] for group in made.param_groups] == [0.5, 0.0]
    assert [group["lr"] for group in made.param_groups] == [0.1, 0.1]
    assert [group["peak_lr"] for group in made.param_groups] == [0.1, 0.1]


def test_sgd_with_momentum_is_not_fused_because_unfrozen_layers_have_no_momentum():
    assert not SGD(momentum=0.9).make(groups(), fused=True).param_groups[0]["fused"]


@pytest.mark.parametrize("part", [SGD(momentum=0.0), AdamW(), TorchOptimizer(kind="Adam")])
def test_fused_is_taken_where_asked_for_and_only_then(part):
    assert part.make(groups(), fused=True).param_groups[0]["fused"] is True
    assert not part.make(groups(), fused=False).param_groups[0]["fused"]


@pytest.mark.parametrize("part", [SGD(), AdamW()])
def test_tensors_without_a_fused_kernel_get_the_plain_one(part):
    made = part.make(groups(device="meta"), fused=True)
    assert not made.param_groups[0]["fused"]


def test_an_optimizer_without_fused_kernels_is_made_plain():
    assert "fused" not in TorchOptimizer(kind="RMSprop").make(groups(), fused=True).param_groups[0]


def test_the_given_groups_are_left_as_they_were():
    given = groups()
    AdamW().make(given, fused=True)
    assert set(given[0]) == {"params", "lr", "peak_lr"}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - REFUSED))
def test_every_optimizer_of_torch_moves_a_matrix(kind):
    made = TorchOptimizer(kind=kind).make(groups(weight_decay=0.0), fused=True)
    before = groups()[0]["params"][0].detach()
    assert not torch.equal(stepped(made), before)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_optimizers_that_need_something_else_say_what(kind):
    with pytest.raises(OptionError, match=r"closure|sparse gradients"):
        TorchOptimizer(kind=kind)


@pytest.mark.parametrize(("typed", "meant"), [("adamx", "Adam"), ("RMSprob", "RMSprop"), ("nadamm", "NAdam")])
def test_an_unknown_kind_offers_the_nearest(typed, meant):
    with pytest.raises(UnknownNameError, match=f"did you mean '{meant}"):
        TorchOptimizer(kind=typed)


def test_a_kind_far_from_all_lists_what_there_is():
    with pytest.raises(UnknownNameError, match=r"known: .*RMSprop"):
        TorchOptimizer(kind="gradient-descent-please")


def test_the_kind_is_found_in_any_case():
    assert isinstance(TorchOptimizer(kind="rmsprop").make(groups(), fused=False), torch.optim.RMSprop)


def test_arguments_reach_the_optimizer_in_their_own_kind():
    part = TorchOptimizer(kind="RMSprop", arguments={"alpha": 0.9, "centered": 1})
    group = part.make(groups(), fused=False).param_groups[0]
    assert group["alpha"] == 0.9
    assert group["centered"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alfa": 0.9}, "did you mean 'alpha'"),
        ({"lr": 0.1}, "the phase sets the learning rate"),
        ({"weight_decay": 0.1}, "it is a separate option"),
        ({"foreach": 1}, "torch chooses it"),
    ],
)
def test_wrong_arguments_are_refused_with_a_reason(arguments, message):
    with pytest.raises((UnknownNameError, OptionError), match=message):
        TorchOptimizer(kind="RMSprop", arguments=arguments)


def test_an_argument_that_is_a_pair_is_refused():
    with pytest.raises(OptionError, match="is not a number"):
        TorchOptimizer(kind="Adam", arguments={"betas": 0.9})


def test_an_optimizer_without_weight_decay_refuses_it_and_takes_zero():
    with pytest.raises(OptionError, match="Rprop has no weight decay"):
        TorchOptimizer(kind="Rprop", weight_decay=0.1)
    with pytest.raises(OptionError, match="Rprop has no weight decay"):
        TorchOptimizer(kind="Rprop").make(groups(weight_decay=0.1), fused=False)
    TorchOptimizer(kind="Rprop").make(groups(weight_decay=0.0), fused=False)


def test_a_value_that_torch_refuses_is_named():
    with pytest.raises(OptionError, match="Invalid alpha"):
        TorchOptimizer(kind="RMSprop", arguments={"alpha": -1.0}).make(groups(), fused=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(momentum=1.0),
        lambda: SGD(momentum=0.0, nesterov=True),
        lambda: AdamW(beta2=1.0),
        lambda: AdamW(eps=0.0),
        lambda: AdamW(weight_decay=-0.1),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(OptionError):
        make()


def test_importing_the_file_imports_no_torch():
    code = "import sys, tuneforge.builtin.optimizers, tuneforge.builtin.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
