"""One token a row as a CUDA graph, over a key-value cache of fixed size.

Launched from Python, the thousand kernels of a token of a small model take the host of an H100 some
38 ms, far longer than they run. A graph is launched as one, but all that differs from token to
token must then lie at a fixed address on the device: here the token ids and the place, which is the
column of the cache that is written. What the rows see and their positions follow from the place.

A column is written by a choice between the new and the old value of every element, since writing
by an index sorts the indices where the same bits are asked for. That passes over the cache once,
as the attention does anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from halfbyte.model.host_reads import HostReads

# Columns of the cache are brought to a multiple of this; memory-efficient attention would copy the
# mask of each layer to get there.
_ALIGNED = 16

# Share of the largest logit by which rounding may move one.
_ROUNDING = 0.05


class NotCapturedError(Exception):
    """A network's one-token pass cannot be captured; the text says why."""


class _FixedLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows, kv_heads, columns, D], written where ``here`` is true.

    ``here`` is bool [columns, 1] and ``place`` int64 [], the number of that column.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, here: Tensor, place: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self._here, self._place = here, place

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("it is made with its keys and values")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values [rows, kv_heads, 1, D]; returns all columns."""
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            torch.where(self._here, new.to(kept.dtype), kept, out=kept)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        # Of the device, as transformers' own StaticLayer says it: who wants a number waits for it.
        return self._place

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


# A layer of the prefilled cache with its keys and values [rows, kv_heads, seen, D].
Prefilled = list[tuple[Any, Any, Any]]


def contents(growing: DynamicCache) -> Prefilled:
    """What ``growing`` holds now; its layers make new tensors when they grow."""
    return [
        (layer, getattr(layer, "keys", None), getattr(layer, "values", None))
        for layer in growing.layers
    ]


class StaticStep:
    """``step(tokens)``: the logits [rows, vocab] after one more token a row, int64 [rows].

    They lie in memory that the next call writes to. Made eagerly until :meth:`capture`.
    """

    def __init__(
        self, network: Any, prefilled: Prefilled, padding: Tensor, place: int, total: int
    ) -> None:
        """``place`` columns are filled, the first ``padding`` int64 [rows] of each row with
        nothing; there will be ``total``. Raises NotCapturedError for caches of another kind."""
        windows = _windows(network, prefilled)
        rows, device = len(padding), padding.device
        columns = -(-total // _ALIGNED) * _ALIGNED
        self.network = network
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.place = torch.full((), place, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._padding = padding[:, None]
        self._columns = torch.arange(columns, device=device)
        self._here = torch.zeros(columns, 1, dtype=torch.bool, device=device)
        self._kinds = {window is not None for window in windows}
        self._window = next((window for window in windows if window is not None), None)
        self._cache = Cache(
            layers=[
                _FixedLayer(
                    # The products are made in the values' type, whatever the keys come in.
                    _widened(keys.to(values.dtype), place, columns),
                    _widened(values, place, columns),
                    self._here,
                    self.place,
                )
                for _, keys, values in prefilled
            ]
        )

    def forward(self) -> Tensor:
        """The logits after ``ids`` at ``place``; asked again it writes and returns the same."""
        columns = self._columns
        torch.eq(columns[:, None], self.place, out=self._here)
        seen = (columns >= self._padding) & (columns <= self.place)
        logits: Tensor = self.network(
            input_ids=self.ids,
            attention_mask=self._mask(seen[:, None, None]),
            position_ids=self.place - self._padding,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return logits

    def _mask(self, seen: Tensor) -> Tensor | dict[str, Tensor]:
        """``seen`` bool [rows, 1, 1, columns] as transformers takes masks that are ready."""
        if self._window is None:
            return seen
        near = seen & (self._columns > self.place - self._window)
        if self._kinds == {True}:
            return near
        return {"full_attention": seen, "sliding_attention": near}

    def __call__(self, tokens: Tensor) -> Tensor:
        self.ids.copy_(tokens[:, None])
        if self.graph is None:
            self._logits = self.forward()
        else:
            self.graph.replay()
        assert self._logits is not None
        self.place += 1
        return self._logits

    def host_reads(self) -> list[str]:
        """The operations of a pass that wait for the device."""
        with HostReads() as reads:
            self.forward()
        return sorted(set(reads.found))

    def capture(self) -> None:
        """Make a graph of :meth:`forward`, for calls from any stream; on a CPU only try it.

        Raises NotCapturedError where a pass waits for the device, and what CUDA raises where
        something else cannot be captured.
        """
        device = self._columns.device
        if device.type != "cuda":
            self._warm_up()
            return
        current = torch.cuda.current_stream(device)
        on_default = current == torch.cuda.default_stream(device)  # which cannot be captured
        stream = _capture_stream(device) if on_default else current
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                self._warm_up()
                self.graph = self._graph()
        finally:
            current.wait_stream(stream)

    def _warm_up(self) -> None:
        """Twice eagerly: kernels are compiled, and libraries set up, which no capture allows."""
        found = self.host_reads()
        if found:
            raise NotCapturedError(
                f"{type(self.network).__name__} makes the host wait for the device "
                f"({', '.join(found)})"
            )
        self.forward()

    def _graph(self) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize(self._columns.device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            self._logits = self.forward()
        except BaseException:  # Ctrl-C stops an answer, not the conversation
            with suppress(RuntimeError):  # that the capture failed is known
                graph.capture_end()
            raise
        graph.capture_end()
        return graph

    def release(self) -> None:
        """Free the cache, the graph and its memory; the step is of no use afterwards."""
        self._cache.layers.clear()
        self._logits = None
        if self.graph is not None:
            self.graph.reset()
            self.graph = None
            torch.cuda.empty_cache()


def static_step(
    network: Any,
    prefilled: Prefilled,
    padding: Tensor,
    place: int,
    total: int,
    *,
    tokens: Tensor,
    expected: Tensor,
    on_fallback: Callable[[str], None] | None,
) -> StaticStep | None:
    """A step that has done ``tokens`` int64 [rows] at ``place``, captured on a GPU.

    The other arguments are :class:`StaticStep`'s. It must have found the logits ``expected``
    [rows, vocab]; where it has not, or cannot be made, ``on_fallback`` hears why and None is
    returned.
    """
    step = None
    try:
        step = StaticStep(network, prefilled, padding, place, total)
        step.ids.copy_(tokens[:, None])
        step.capture()
        if not _near(step(tokens), expected):
            raise NotCapturedError(
                f"{type(network).__name__} says something else with a cache of fixed size"
            )
        return step
    except Exception as error:  # also whatever a network says of a cache that it does not expect
        if step is not None:
            step.release()
        if on_fallback is not None:
            on_fallback(str(error).split("\n")[0] or type(error).__name__)
        return None


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: each stream that multiplies has work space that stays."""
    return torch.cuda.Stream(device)


def _windows(network: Any, prefilled: Prefilled) -> list[int | None]:
    """How many tokens each layer sees, None for all; one size of window at most."""
    config = network.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ())
    # A chunk's cache is a window's; only the mask differs.
    chunked = getattr(config, "attention_chunk_size", None) is not None
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    windows = [getattr(layer, "sliding_window", None) for layer, _, _ in prefilled]
    if (
        chunked
        or not types <= {"full_attention", "sliding_attention"}
        or len(windows) != config.num_hidden_layers
        or any(type(layer) not in known for layer, _, _ in prefilled)
        or len(set(windows) - {None}) > 1
    ):
        raise NotCapturedError(
            f"{type(network).__name__} keeps or sees something else than all tokens or the last few"
        )
    return windows


def _widened(kept: Tensor, place: int, columns: int) -> Tensor:
    """[rows, kv_heads, columns, D] with the columns ``kept`` up to ``place``.

    The others are 0: attention gives them the weight 0, and 0 times what memory happens to hold
    may be NaN.
    """
    rows, heads, seen, width = kept.shape
    out = kept.new_zeros(rows, heads, columns, width)
    out[:, :, place - seen : place] = kept
    return out


def _near(ours: Tensor, theirs: Tensor) -> bool:
    """Whether logits are the same but for the rounding of 16-bit products."""
    apart = (ours.float() - theirs.float()).abs().max().item()
    return apart <= _ROUNDING * theirs.float().abs().max().item()
