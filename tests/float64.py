"""Float64 without the float32 casts that transformers makes inside a double model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)
_TO = (torch.Tensor.to, torch.Tensor.type)


def _wide(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float64


class _Uncast(TorchFunctionMode):
    """Casts of float64 tensors to float32 do nothing; `float()` makes float64 of integers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.float:
            return args[0].double()
        if function in _SOFTMAX and _wide(args[0]):
            kwargs["dtype"] = None
        if function in _TO and _wide(args[0]):
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


@contextmanager
def uncast() -> Iterator[None]:
    """Norms, rotary tables, softmax and constants (on which stock XGLM fails otherwise) stay in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Uncast():
            yield
    finally:
        torch.set_default_dtype(before)
