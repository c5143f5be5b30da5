"""A module's forward pass as a graph: what it computes, what it leaves alone, and what it refuses."""

import copy
import json
import math
import operator

import pytest
import torch
from tiny import TinyNet, tiny_net
from torch import nn
from torch.nn import functional as F

from tuneforge import FolderError
from tuneforge.engine.model.graph_codec import NotPortableError, decode, encode, find_function, name_function
from tuneforge.engine.model.model import call_module, extract_logits
from tuneforge.engine.model.module_graph import ModuleGraph


class Tied(nn.Module):
    """Shares a weight, and returns features beside the logits."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.other.weight = self.one.weight

    def forward(self, inputs, mask=None):
        features = self.other(self.one(inputs)) if mask is None else inputs * mask
        return self.head(features.view(features.size(0), -1)), features


class Frozen(nn.Module):
    """Computes its backbone without gradients, and has constants that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("shift", torch.arange(8.0), persistent=False)
        self.scale = torch.full((8,), 2.0)

    def forward(self, inputs):
        with torch.no_grad():
            features = self.backbone(inputs).clamp(min=-math.inf, max=4.0)
        return self.head(features * self.scale + self.shift.to(features.device))


class Named(nn.Module):
    """Takes two inputs by name and returns a mapping."""

    def __init__(self):
        super().__init__()
        self.wide, self.deep, self.head = nn.Linear(4, 8), nn.Embedding(5, 8), nn.Linear(8, 3)

    def forward(self, deep, wide):
        return {"features": wide, "logits": self.head(self.wide(wide) + self.deep(deep).mean(1))}


class Recurrent(nn.Module):
    """Has a layer that only `torch.export` traces."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs[:, None].expand(-1, 4, -1))[0][:, -1])


class Counting(nn.Module):
    """Changes its attributes and a buffer in every forward pass."""

    def __init__(self):
        super().__init__()
        self.head, self.calls, self.seen, self.last = nn.Linear(8, 3), 0, [], None
        self.register_buffer("total", torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        self.seen.append(inputs.shape[0])
        self.last = inputs
        self.total.add_(1)
        return self.head(inputs)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, inputs):
        return self.head(inputs if inputs.sum() > 0 else -inputs)


class Noisy(Branching):
    def forward(self, inputs):
        return self.head(inputs + torch.rand(8))


class ThroughNumpy(Branching):
    def forward(self, inputs):
        return self.head(torch.from_numpy(inputs.detach().numpy()))


def batch(size, *, named=False):
    generator = torch.Generator().manual_seed(size)
    if named:
        return {"wide": torch.randn(size, 4), "deep": torch.randint(5, (size, 2), generator=generator)}
    return torch.randn(size, 8, generator=generator)


def rebuild(module, example):
    """Return the module as another process would build it: from JSON and tensors."""
    graph = ModuleGraph.trace(module, example)
    record = json.loads(json.dumps(graph.to_record(), allow_nan=False))
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items() if name not in graph.aliases}
    return ModuleGraph.from_record(record, graph.constants).build(weights)


@pytest.mark.parametrize("kind", [TinyNet, Tied, Frozen, Named, Recurrent])
def test_rebuilt_module_computes_the_same_logits_at_any_batch_size(kind):
    torch.manual_seed(0)
    module = kind()
    rebuilt = rebuild(module, batch(2, named=kind is Named))
    module.eval()
    for size in (1, 2, 7):
        inputs = batch(size, named=kind is Named)
        with torch.no_grad():
            expected = extract_logits(call_module(module, inputs))
            assert torch.allclose(call_module(rebuilt, inputs), expected, atol=1e-6)
    own, other = (dict(each.named_parameters()) for each in (module, rebuilt))
    assert {name: tuple(each.shape) for name, each in own.items()} == {
        n: tuple(each.shape) for n, each in other.items()
    }


def test_rebuilt_module_can_be_copied_and_exported():
    rebuilt = rebuild(tiny_net(), batch(2))
    assert torch.equal(copy.deepcopy(rebuilt)(batch(5)), rebuilt(batch(5)))
    exported = torch.export.export(rebuilt.eval(), (batch(2),), strict=False).module()
    assert torch.equal(exported(batch(2)), rebuilt(batch(2)))


def test_a_module_is_left_as_it_was():
    module = Counting().train()
    before, state = copy.deepcopy(vars(module)), torch.get_rng_state()
    ModuleGraph.trace(module, batch(2))
    assert (module.calls, module.seen, module.last, module.total.item()) == (0, [], None, 0.0)
    assert vars(module).keys() == before.keys()
    assert module.training
    assert module.head.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [Branching, Noisy, ThroughNumpy])
def test_a_module_without_a_graph_is_refused_with_the_reason(kind):
    with pytest.raises(NotPortableError, match=r"cannot be traced|cannot hold"):
        ModuleGraph.trace(kind(), batch(2))


def test_a_graph_that_no_longer_computes_what_the_module_does_is_found():
    module = Frozen()
    graph = ModuleGraph.trace(module, batch(2))
    graph.check(module, [batch(4)])
    module.scale = torch.full((8,), 3.0)
    with pytest.raises(NotPortableError, match="cannot hold"):
        graph.check(module, [batch(4)])


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, -math.inf, "mean", (1, [2.0, None]), {"dim": 1}, slice(None, 2, None), ..., torch.float16,
     torch.channels_last, torch.strided],
)  # fmt: skip
def test_arguments_survive_json(value):
    assert decode(json.loads(json.dumps(encode(value))), {}, torch.device("cpu")) == value


@pytest.mark.parametrize("function", [F.linear, torch.cat, operator.getitem, torch.ops.aten.relu.default, torch.zeros])
def test_functions_are_found_again_by_name(function):
    node = {"op": "call_function", "target": name_function(function)}
    assert find_function(node) is function


@pytest.mark.parametrize(
    ("op", "target"),
    [
        ("call_function", "torch.load"),
        ("call_function", "builtins.exec"),
        ("call_function", "os.system"),
        ("call_function", "aten.from_file.default"),
        ("call_method", "__reduce_ex__"),
        ("call_module", "head"),
    ],
)
def test_a_graph_that_calls_anything_but_functions_of_tensors_is_refused(op, target):
    with pytest.raises(FolderError, match="only functions of tensors"):
        find_function({"op": op, "target": target})


@pytest.mark.parametrize(
    "node", [("call_function", "getattr", [{"node": "x"}, "__class__"]), ("call_method", "numel", ["text"])]
)
def test_attributes_and_methods_are_those_of_tensors(node):
    op, target, args = node
    function = find_function({"op": op, "target": target})
    with pytest.raises(FolderError, match="only functions of tensors"):
        function(*decode(args, {"x": torch.zeros(1)}, torch.device("cpu")))
