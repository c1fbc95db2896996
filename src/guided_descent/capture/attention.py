"""Attention logits: the largest logit of each head, read off the attention calls of a model while it trains."""

from __future__ import annotations

import difflib
import inspect
import math
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Sink = Callable[[Mapping[str, Tensor]], None]

#: An additive mask of this or less takes a pair out of the attention; -1e4 is what old half-precision code adds.
MASKED = -1e4
#: Logits held at a time, and the fewest queries in a chunk.
BUDGET, LEAST = 2**24, 16

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    budget: int = BUDGET,
) -> Tensor:
    """The largest logit ``scale q.k`` of each head over batch, queries and keys, pairs that are masked out left aside.

    What a floating mask adds to a pair that it leaves in (a position bias) is no part of the logit. Works through the
    queries in chunks, so that the logits are never held at once.

    Args:
        query: ``[..., H, L, E]``.
        key: ``[..., K, S, E]``; head ``h`` reads key head ``h // (H / K)``.
        attn_mask: Broadcastable to ``[..., H, L, S]``; of bool, true for the pairs that take part, or floating and
            added, where ``MASKED`` and below takes a pair out.
        is_causal: Whether query ``i`` reads keys ``0..i`` only.
        scale: Factor of the products; ``None`` is ``1 / sqrt(E)``.
        budget: Logits held at a time.

    Returns:
        ``[H]``, at least float32; ``-inf`` for a head with no pair.

    Example:
        >>> q = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])
        >>> max_logits(q, q, scale=1.0).tolist()
        [4.0, 9.0]
    """
    query, key = (x if x.ndim > 2 else x.unsqueeze(0) for x in (query, key))
    heads, length, width = query.shape[-3:]
    shared, keys = key.shape[-3:-1]
    if shared == 0 or heads % shared:
        raise ValueError(f"{heads} query heads cannot share {shared} key heads; the first must be a multiple")
    scale = width**-0.5 if scale is None else scale
    mask = None if attn_mask is None else attn_mask.expand(*attn_mask.shape[:-2], length, keys)
    peak = torch.full((heads,), -math.inf, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    if query.numel() == 0 or key.numel() == 0:
        return peak
    batch = max(math.prod(query.shape[:-3]), math.prod(key.shape[:-3]))
    chunk = max(LEAST, budget // (batch * heads * keys))
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        last = min(stop, keys) if is_causal else keys
        q = (query[..., start:stop, :] * scale).reshape(*query.shape[:-3], shared, -1, width)  # [..., K, group c, E]
        logits = q @ key[..., :last, :].mT
        logits = logits.view(*logits.shape[:-3], heads, stop - start, last)
        if is_causal:
            rows, columns = (torch.arange(a, b, device=q.device) for a, b in ((start, stop), (0, last)))
            logits.masked_fill_(rows[:, None] < columns, -math.inf)
        if mask is not None:
            given = mask[..., start:stop, :last]
            out = ~given if given.dtype == torch.bool else given <= MASKED
            logits = logits.masked_fill(out, -math.inf)
        peak = torch.maximum(peak, logits.amax((-2, -1)).reshape(-1, heads).amax(0))
    return peak


class _Seen(Exception):
    """Ends a probe."""


class _Watch(TorchFunctionMode):
    """Looks at every attention call made while it is active, and leaves all calls as they are."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.peak: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.see(*args, **kwargs)
        elif func is F.multi_head_attention_forward:
            self.probe(args, kwargs)
        return func(*args, **kwargs)

    def see(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """Fold one call in."""
        if query.is_nested or key.is_nested:
            return
        found = max_logits(query.detach(), key.detach(), attn_mask, is_causal, scale)
        if self.peak is not None and self.peak.shape != found.shape:
            raise ValueError(
                f"{self.name!r} calls attention with {len(self.peak)} and with {len(found)} heads: name the modules "
                "inside it, which have one number of heads each"
            )
        self.peak = found if self.peak is None else torch.maximum(self.peak, found)

    @torch.no_grad()
    def probe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the projections of torch's own multi-head attention up to the attention call, whichever it will make.

        The function may go on to compute its weights by hand. A twin of it whose attention call is replaced sees the
        queries and keys in both cases.
        """

        def attention(*args: Any, **kwargs: Any) -> None:
            self.see(*args, **kwargs)
            raise _Seen

        whole = F.multi_head_attention_forward
        names = {"scaled_dot_product_attention": attention, "has_torch_function": lambda tensors: False}
        twin = types.FunctionType(whole.__code__, whole.__globals__ | names, whole.__name__, whole.__defaults__)
        given = _SIGNATURE.bind(*args, **kwargs).arguments | {"need_weights": False}
        try:
            twin(**given)
        except _Seen:
            return


class AttentionLogits:
    """Reports the largest attention logit of every head of the named modules, forward by forward.

    Inside the named modules it sees every ``torch.nn.functional.scaled_dot_product_attention`` and every
    ``nn.MultiheadAttention``, also those that return weights. Only modules in training mode are looked at, so that an
    evaluation between two steps does not count. What it costs, without gradient: the products ``q k^T`` once more, in
    chunks, and for ``nn.MultiheadAttention`` also the input projections.

    It does not see a hand-written ``softmax(q @ k.T)``, ``flex_attention``, attention of other libraries, nested
    tensors, or anything inside ``torch.compile``: compute the maxima there and give them to the optimizer's ``note``. A
    module that makes no call it can see is reported once, by a warning.

    Args:
        model: The model.
        modules: Full names of its attention modules, each with one number of heads.
        sink: Called after each forward of a module with ``{name: maxima [H]}``, detached, on the module's device, over
            this forward alone: the maximum over micro-batches and ranks is the receiver's.

    Raises:
        ValueError: A name is no module of the model.

    Example:
        >>> attention, seen = nn.MultiheadAttention(4, 2), {}
        >>> watcher = AttentionLogits(nn.ModuleDict({"attn": attention}), ["attn"], seen.update)
        >>> x = torch.ones(3, 1, 4)
        >>> _ = attention(x, x, x)
        >>> watcher.remove()
        >>> {name: len(value) for name, value in seen.items()}
        {'attn': 2}
    """

    def __init__(self, model: nn.Module, modules: Sequence[str], sink: Sink) -> None:
        found = dict(model.named_modules(remove_duplicate=False))
        for name in modules:
            if name not in found:
                near = ", ".join(map(repr, difflib.get_close_matches(name, found, n=3, cutoff=0.0)))
                raise ValueError(f"the model has no module {name!r}; the nearest names are {near}")
        self._sink = sink
        self._running: list[tuple[nn.Module, _Watch | None, ExitStack]] = []  # forwards, the innermost last
        self._blind: set[str] = set()
        self._handles: list[Any] = []
        for name in modules:
            self._handles.append(found[name].register_forward_pre_hook(self._enterer(name)))
            self._handles.append(found[name].register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Take all hooks away; a forward that is running is no longer looked at."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._running:
            self._running.pop()[2].close()

    def _enterer(self, name: str) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, args: Any) -> None:
            watch, active = _Watch(name) if module.training else None, ExitStack()
            if watch is not None:
                active.enter_context(watch)
            self._running.append((module, watch, active))

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._running or self._running[-1][0] is not module:
            return  # the forward failed before it was looked at
        _, watch, active = self._running.pop()
        active.close()
        if watch is None:
            return
        if watch.peak is not None:
            self._sink({watch.name: watch.peak})
        elif watch.name not in self._blind:
            self._blind.add(watch.name)
            warnings.warn(
                f"{watch.name!r} made no attention call that can be seen: compute the largest logit of each head there "
                "and give it to the optimizer with note('max_logits', ...)",
                stacklevel=2,
            )
