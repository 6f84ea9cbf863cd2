"""A second device on a machine that has only a CPU."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

SECOND = torch.device("cuda", 1)


class Placed(torch.Tensor):
    """A CPU tensor that says it lies on `SECOND`; an operation that mixes it with a tensor of the CPU fails."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="meta"
        )
        self.inner = inner
        return self

    @property
    def device(self):
        return SECOND

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # A number as a tensor may lie on the CPU, as on a real device.
        assert all(isinstance(x, cls) or x.dim() == 0 for x in tensors), f"{function} mixes tensors of two devices"
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, cls) else x, (args, kwargs))
        return tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, function(*args, **kwargs))


class SecondDevice(TorchFunctionMode):
    """While it is on, `.to(SECOND)` and `device=SECOND` work."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.to and SECOND in (*args, kwargs.get("device")):
            return args[0] if isinstance(args[0], Placed) else Placed(args[0])
        if function is torch.Tensor.to and isinstance(args[0], Placed) and torch.device("cpu") in args:
            return args[0].inner
        if kwargs.get("device") == SECOND:
            return Placed(function(*args, **{**kwargs, "device": "cpu"}))
        return function(*args, **kwargs)


def place_on_second_device(module):
    """Move a module's parameters to `SECOND`, and its arguments and results along, as accelerate's hooks do."""
    from accelerate.utils import send_to_device

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = torch.nn.Parameter(Placed(parameter.detach()), requires_grad=False)
    module.register_forward_pre_hook(
        lambda module, args, kwargs: (send_to_device(args, SECOND), send_to_device(kwargs, SECOND)), with_kwargs=True
    )
    module.register_forward_hook(lambda module, args, output: send_to_device(output, torch.device("cpu")))
