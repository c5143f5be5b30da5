"""Which modules can be fine-tuned: the kinds that cannot are refused before anything else is done with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from tuneforge.engine.storage.safetensors_io import is_storable
from tuneforge.errors import PluginError

_FIX_BY_WRAPPER = {
    "torch._dynamo.eval_frame.OptimizedModule": "give the module from before torch.compile, and use --compile",
    "torch.nn.parallel.data_parallel.DataParallel": "give its .module; torchrun starts several processes",
    "torch.nn.parallel.distributed.DistributedDataParallel": "give its .module, and start the run with torchrun",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "give the module, and use --shard",
    "torch.optim.swa_utils.AveragedModel": "give its .module; the callback ema averages weights",
}
"""What to do instead, by the name of the class of a wrapper."""


def check_module(module: nn.Module, head: str = "") -> None:
    """Check that a module can be fine-tuned and stored.

    Args:
        module: The module.
        head: The path of the head, if it is known.

    Raises:
        PluginError: It is wrapped by torch.compile or DataParallel, or it or its head is a TorchScript or exported
            module; a layer is lazy; a tensor cannot be trained or stored as it is.
    """
    for path, child in module.named_modules():
        names = [f"{base.__module__}.{base.__qualname__}" for base in type(child).__mro__]
        if wrapper := next((name for name in names if name in _FIX_BY_WRAPPER), None):
            raise _wrapper_error(wrapper, path)
        compiled = isinstance(child, torch.jit.ScriptModule) or "torch.export._unlift._StatefulGraphModule" in names
        if compiled and (not path or f"{head}.".startswith(f"{path}.")):
            raise _compiled_error(child, path)
        for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
            _check_tensor(tensor, f"{path}.{name}".lstrip("."), child)


def check_has_values(module: nn.Module) -> None:
    """Raise `PluginError` if a parameter or buffer is on the meta device, where models are only described."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise PluginError(
                "a tensor of the model is on the meta device, so it has no values",
                where=f"'{name}' of {type(module).__name__}",
                fix="load the weights before the module is given",
            )


def check_trainable(module: nn.Module) -> None:
    """Raise `PluginError` if a parameter or buffer has no values, or was created in inference mode."""
    check_has_values(module)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_inference():
            raise PluginError(
                "a tensor of the model was created under torch.inference_mode() and cannot be trained",
                where=f"'{name}' of {type(module).__name__}",
                fix="build the module outside of inference_mode, or give copy.deepcopy(module), made outside of it",
            )


def _wrapper_error(wrapper: str, path: str) -> PluginError:
    kind = wrapper.rpartition(".")[2]
    return PluginError(
        f"the model is wrapped by {kind}" + (", that is torch.compile" if kind == "OptimizedModule" else ""),
        where=f"module '{path}'" if path else "",
        why="a wrapper gives every weight another name, so the stored weights would not fit the module itself",
        fix=_FIX_BY_WRAPPER[wrapper],
    )


def _compiled_error(child: nn.Module, path: str) -> PluginError:
    kind = "TorchScript (scripted or traced)" if isinstance(child, torch.jit.ScriptModule) else "torch.export"
    return PluginError(
        f"the {f'layer {path!r} that holds the head' if path else 'model'} is a {kind} module",
        why="its layers cannot be replaced, observed or put into eval mode one by one",
        fix="give the Python module from which it was made",
    )


def _check_tensor(tensor: Tensor, name: str, owner: nn.Module) -> None:
    """Raise `PluginError` if a parameter or buffer cannot be trained or stored."""
    where = f"'{name}' of {type(owner).__name__}"
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        raise PluginError(
            f"'{name}' of the lazy layer {type(owner).__name__} is not initialized",
            why="its shape follows from the first input",
            fix="call the module once with a batch of inputs before it is given",
        )
    if not is_storable(tensor):
        raise PluginError(
            f"a tensor of the model has the dtype {tensor.dtype} and the layout {tensor.layout}",
            where=where,
            why="weights and checkpoints are stored as safetensors, which have no such tensors: they are neither "
            "sparse nor quantized nor complex128",
            fix="convert it (.to_dense(), .to(torch.complex64)), or keep what never trains in a plain attribute",
        )
