"""What the custom operators of every backend share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Operator:
    """An operator of torch.library, for compilers and whatever else looks at operators, that eager calls pass by.

    torch.library takes some 100 us to call an operator and its gradient; a plain call runs the implementation as an
    autograd.Function of the same backward. It is plain if nobody watches: no compiler, no dispatch mode, no function transform, no
    subclass of Tensor among the arguments.
    """

    def __init__(self, name: str, implementation: Callable[..., Any]):
        self.implementation = implementation
        self.library = torch.library.custom_op(name, implementation, mutates_args=())
        self.register_fake = self.library.register_fake
        self._function: type[torch.autograd.Function] | None = None

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        self.library.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            output = self.implementation(*args)
            setup_context(ctx, args, output)  # as a method of its own it would be called by way of inspect.signature
            return output

        methods = dict(forward=staticmethod(forward), backward=staticmethod(backward))
        self._function = type(self.library._name, (torch.autograd.Function,), methods)

    def refuse_autograd(self, backward: Callable[..., Any]) -> None:
        """`backward` is what a call that autograd records has to say."""
        self.library.register_autograd(backward)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not _plain(args):
            return self.watched(*args)
        if not records(*_tensors(args)):
            return self.implementation(*args)
        return self.watched(*args) if self._function is None else self._function.apply(*args)

    def watched(self, *args: Any) -> Any:
        return self.library._opoverload(*args)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """A decorator: the function as the operator `name`; it must not mutate its arguments, nor return one of them."""
    return lambda implementation: Operator(name, implementation)


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _plain(args: Iterable[Any]) -> bool:
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
    return not watched and all(type(x) is Tensor or type(x) is nn.Parameter for x in _tensors(args))


def refuse_double_backward(backward_op: Operator) -> None:
    """Make differentiating a backward operator a clear error instead of a silent zero."""
    name = backward_op.library._qualname.replace("::", ".").removesuffix("_backward")

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name}: double backward is not implemented; use backend='reference' for second derivatives")

    backward_op.refuse_autograd(refuse)


def records(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
