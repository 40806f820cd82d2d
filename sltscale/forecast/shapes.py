"""Tensors with shapes and no content, and counting the bytes that they would take.

Floating-point numbers are torch's fake tensors; whole numbers (lengths, token ids, masks), which decide about shapes,
are real.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Saved:
    """Counts what autograd keeps, through hooks that torch calls for each tensor that is saved for a backward.

    What is let go again before the forward's end does not count: a checkpointed block saves its inputs before it is
    known whether anything inside leads to a gradient, and in a frozen tower nothing does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def counting(self) -> AbstractContextManager[Any]:
        return saved_tensors_hooks(self._keep, lambda kept: kept.tensor)

    def _keep(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self._kept.add(kept)
        return kept

    @property
    def bytes(self) -> int:
        """Of what is kept now: to be asked between forward and backward, while there is something to go back from."""
        own = {tensor.untyped_storage()._cdata for tensor in (*self._model.parameters(), *self._model.buffers())}
        storages = [kept.tensor.untyped_storage() for kept in self._kept]
        return sum({storage._cdata: storage.nbytes() for storage in storages if storage._cdata not in own}.values())


class _Kept:
    """What autograd holds in place of a tensor, for as long as it would hold that."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Shapes(FakeTensorMode):
    """Fake floating-point tensors and real whole numbers; keeps count of the bytes that are alive and, by torch's
    formulas, of the multiplications and additions. Torch's own counter of these would keep checkpointed blocks from
    being let go: it ties hooks to every module's tensors, until it is left."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()
        self._alive = self._before = self.gradients = self.peak = self.peak_with_gradients = self._apart = 0
        self.flops = self._depth = 0

    def take_in(self, model: nn.Module, bf16: bool) -> None:
        """Make fake tensors of a model's parameters and buffers, which are on the meta device."""
        known: dict[Tensor, Tensor] = {}
        for module in model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None and tensor not in known:
                    parameter = isinstance(tensor, nn.Parameter)
                    data = tensor.detach().bfloat16() if parameter and bf16 else tensor.detach()
                    whole = not data.is_floating_point()
                    made = torch.zeros(data.shape, dtype=data.dtype) if whole else self.fake(data)
                    known[tensor] = nn.Parameter(made, tensor.requires_grad) if parameter else made
                if tensor is not None:
                    own = module._parameters if name in module._parameters else module._buffers
                    own[name] = known[tensor]  # type: ignore[assignment]

    def fake(self, content: Tensor) -> Tensor:
        """As ``content``, which is on the meta device, but passing for one on the CPU."""
        made: Tensor = FakeTensor(self, content, torch.device("cpu"))
        self.note(made)
        return made

    def restart(self, besides: Tensor | None = None) -> None:
        """Count from here on: what is alive now, but for ``besides``, is the model's."""
        gc.collect()
        self._before = self._alive - (0 if besides is None else besides.nbytes)
        self.gradients = self.peak = self.peak_with_gradients = self.flops = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._depth += 1
        try:
            found = self._dispatch(func, types, args, kwargs or {})
        finally:
            self._depth -= 1
        # What torch makes on the way to a result's shape, and only the first time, no kernel makes.
        for tensor in tree_leaves(found) if self._depth == 0 else ():
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return found

    def _dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors) and (tensors or _counts(func, args, kwargs)):
            return func(*args, **kwargs)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [piece for index in args[1] for piece in _places(index)])
        found = super().dispatch(func, types, args, kwargs)
        if self._depth == 1 and func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=found)
        return found

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = None
            self._alive += size
            weakref.finalize(storage, self._gone, size)
        self._apart = max(self._apart, self._alive)
        beside = self._alive - self._before
        self.peak = max(self.peak, beside)
        self.peak_with_gradients = max(self.peak_with_gradients, beside + self.gradients)

    @contextmanager
    def apart(self) -> Iterator[Callable[[], int]]:
        """A function that tells the most bytes that were alive at a time inside, beside what was alive before."""
        before = self._apart = self._alive
        yield lambda: self._apart - before

    def _gone(self, size: int) -> None:
        self._alive -= size


def _counts(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function that makes a tensor out of nothing makes one of whole numbers."""
    made = func(*args, **{**kwargs, "device": torch.device("meta")}) if "device" in kwargs else None
    return isinstance(made, Tensor) and not made.is_floating_point()


def _places(index: Tensor | None) -> Sequence[Tensor | None]:
    """A real mask picks a known number of elements, but torch has no shape for what a mask picks of a fake tensor."""
    if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
        return index.nonzero().unbind(1)
    return [index]


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Dropout and attention keep what they keep on CUDA. In place of torch's own functions, and not in a mode of
    torch's: those are out of force while a backward computes checkpointed blocks again."""
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    def fused_attention(*inputs: Any, **options: Any) -> Tensor:
        return attention(*inputs, **{**options, "dropout_p": 0.0})

    F.dropout, F.scaled_dot_product_attention = fused_dropout, fused_attention
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attention
