"""The CPU backend: each step is one call of the compiled library.

A slot is one block of memory with huge pages. Loading a model copies it there in the layout that steps read; nothing
else is made or compiled. Fresh pages cost several times the copy, so memory of a freed slot is kept for the next model
of its size, and one place more than is in use is made ready beforehand.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from serve.engine.backend import Slots, Span
from serve.engine.memory import zeros
from serve.engine.native.library import FORMATS, SOURCE_TYPES, CShape, CSource, CStep, library, team
from serve.shape import GPT2Shape

HUGE_PAGE = 2 << 20
REST_BESIDE_STEPS = 0.5  # of a copy's time


class NativeBackend:
    """`Backend` on the cores of this machine. `weights`: a format for which `library.is_supported`."""

    def __init__(self, shape: GPT2Shape, num_slots: int, num_kv_rows: int, weights: str, *, tied: bool) -> None:
        loaded = library()
        assert loaded is not None, "ask is_supported first"
        self.shape, self.num_slots, self.tied = shape, num_slots, tied
        self._library, self._team = loaded, team()
        self._slots = Slots(num_slots)
        self._places: list[_Place | None] = [None] * num_slots
        cache = torch.float32 if weights == "float32" else torch.bfloat16
        size = (shape.n_layer, num_kv_rows, shape.n_head, shape.n_positions, shape.head_dim)
        self._keys = zeros(size, cache, torch.device("cpu"))
        self._values = zeros(size, cache, torch.device("cpu"))
        self._logits = torch.empty(0, shape.vocab_size)
        self._running: set[int] = set()  # cache rows of sequences under way
        c_shape = _c_shape(shape, tied)
        self._layout = loaded.rookery_layout_new(c_shape, FORMATS[weights])
        self._num_bytes = int(loaded.rookery_layout_bytes(self._layout))
        self._runner = loaded.rookery_runner_new(
            c_shape, FORMATS[weights], self._keys.data_ptr(), self._values.data_ptr(), num_kv_rows
        )
        finalizer = weakref.finalize(self, _free, loaded, self._layout, self._runner)
        finalizer.atexit = False  # a step may be under way when the program ends

    def acquire(self) -> int:
        return self._slots.acquire()

    def write(self, slot: int, tensors: Mapping[str, Tensor]) -> None:
        expected = self.shape.tensor_shapes()
        assert all(tuple(tensors[name].shape) == expected[name] for name in self._names()), "not this layout's tensors"
        place = self._places[slot]
        if place is None:
            place = self._places[slot] = _Place.take(self._num_bytes)
        kept = [_readable(tensors[name]) for name in self._names()]  # alive until the copy is done
        sources = (CSource * len(kept))(*[CSource(tensor.data_ptr(), SOURCE_TYPES[tensor.dtype]) for tensor in kept])
        # Beside steps with one thread and pauses: texts under way come first.
        num_threads, rest = (1, REST_BESIDE_STEPS) if self._running else (torch.get_num_threads(), 0.0)
        self._library.rookery_pack(self._layout, place.address, sources, num_threads, rest)
        if None in self._places:
            _Place.prepare(self._num_bytes)

    def clear(self, slot: int) -> None:
        place, self._places[slot] = self._places[slot], None
        if place is not None:
            place.give_back()
        self._slots.release(slot)

    def forward(self, spans: Sequence[Span]) -> Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        kv_rows: list[int] = []
        slots: list[int] = []
        bounds: list[int] = []
        head_rows: list[int] = []
        head_bounds: list[int] = []
        for span in spans:
            if not slots or slots[-1] != span.slot:
                assert not slots or slots[-1] < span.slot, "spans must be sorted by slot"
                slots.append(span.slot)
                bounds.append(len(tokens))
                head_bounds.append(len(head_rows))
            first, count = len(tokens), len(span.token_ids)
            tokens.extend(span.token_ids)
            positions.extend(range(span.past, span.past + count))
            kv_rows.extend([span.kv_row] * count)
            if span.wants_logits or span.wants_all_logits:
                head_rows.extend(range(first if span.wants_all_logits else first + count - 1, first + count))
        bounds.append(len(tokens))
        head_bounds.append(len(head_rows))
        if len(self._logits) < len(head_rows):
            self._logits = torch.empty(len(head_rows), self.shape.vocab_size)
        arrays = [_int32(a) for a in (tokens, positions, kv_rows, bounds, head_rows, head_bounds)]
        addresses = np.array([self._address(slot) for slot in slots], dtype=np.uint64)
        at = [array.ctypes.data for array in arrays]
        step = CStep(
            len(tokens), at[0], at[1], at[2], len(slots), addresses.ctypes.data, at[3], at[4], at[5],
            self._logits.data_ptr(),
        )  # fmt: skip
        self._running.update(kv_rows)
        self._library.rookery_step(self._runner, self._team, step)
        return self._logits[: len(head_rows)]

    def forget(self, kv_row: int, length: int) -> None:
        """A step reads no key beyond its own position, so the row may stay as it is."""
        self._running.discard(kv_row)

    def _address(self, slot: int) -> int:
        place = self._places[slot]
        assert place is not None, f"slot {slot} is empty"
        return place.address

    def _names(self) -> Iterator[str]:
        """The tensors in the order of pack.hpp."""
        yield "wte.weight"
        yield "wpe.weight"
        for layer in range(self.shape.n_layer):
            for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
                yield f"h.{layer}.{part}.weight"
                yield f"h.{layer}.{part}.bias"
        yield "ln_f.weight"
        yield "ln_f.bias"
        if not self.tied:
            yield "lm_head.weight"


class _Place:
    """Memory of one slot, on a huge page's border."""

    _spare: dict[int, _Place] = {}
    _preparing: set[int] = set()
    _lock = threading.Lock()

    def __init__(self, size: int) -> None:
        self.size = size
        self._map = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            self._map.madvise(mmap.MADV_HUGEPAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.address = -(-start // HUGE_PAGE) * HUGE_PAGE

    @classmethod
    def take(cls, size: int) -> _Place:
        """Memory that is ready for a slot of this size, else fresh. What slots of other sizes left goes first."""
        with cls._lock:
            place = cls._spare.pop(size, None)
            cls._spare.clear()
        return place or cls(size)

    @classmethod
    def prepare(cls, size: int) -> None:
        """Have one place of this size ready soon."""
        with cls._lock:
            if size in cls._spare or size in cls._preparing:
                return
            cls._preparing.add(size)
        threading.Thread(target=cls._prepare, args=[size], name="place", daemon=True).start()

    @classmethod
    def _prepare(cls, size: int) -> None:
        try:
            place, loaded = cls(size), library()
            assert loaded is not None
            loaded.rookery_populate(place.address, size)
            place.give_back()
        except OSError:
            pass  # no memory to spare: the next load asks for itself, and says so if it gets none
        finally:
            with cls._lock:
                cls._preparing.discard(size)

    def give_back(self) -> None:
        """Keep it for the next slot of its size, but one of each size at most."""
        with self._lock:
            self._spare[self.size] = self


def slot_bytes(shape: GPT2Shape, weights: str, *, tied: bool) -> int:
    """Bytes of one slot."""
    loaded = library()
    assert loaded is not None, "ask is_supported first"
    layout = loaded.rookery_layout_new(_c_shape(shape, tied), FORMATS[weights])
    try:
        return int(loaded.rookery_layout_bytes(layout))
    finally:
        loaded.rookery_layout_free(layout)


def _c_shape(shape: GPT2Shape, tied: bool) -> CShape:
    return CShape(
        vocab_size=shape.vocab_size,
        n_positions=shape.n_positions,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_inner=shape.n_inner,
        tanh_gelu=shape.gelu == "tanh",
        scale_attention=shape.scale_attn_weights,
        scale_by_layer=shape.scale_attn_by_inverse_layer_idx,
        tied=tied,
        epsilon=shape.layer_norm_epsilon,
    )


def _free(loaded: ctypes.CDLL, layout: int, runner: int) -> None:
    loaded.rookery_layout_free(layout)
    loaded.rookery_runner_free(runner)


def _readable(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype in SOURCE_TYPES else tensor.float()).contiguous()


def _int32(values: list[int]) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)
