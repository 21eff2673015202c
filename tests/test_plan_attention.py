"""What attention takes on a T4, whose kernels count every row as long as the longest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from halfbyte.data.batch import TokenizedRow
from halfbyte.data.packing import Packs
from halfbyte.kernels import attention_efficient
from halfbyte.plan.device import Device
from halfbyte.plan.memory import Setup, step_memory
from halfbyte.plan.memory_attention import Room, backward_bytes, log_sums
from halfbyte.plan.parameters import model_shape
from halfbyte.plan.resolve import Resolved, resolve
from halfbyte.recipe.load import parse_recipe

T4 = Device("cuda", "Tesla T4", 15_600_000_000, 15_300_000_000, (7, 5), False, 2)
AMPERE = replace(T4, name="as large, and newer", capability=(8, 6), bf16_native=True)
LLAMA_3B = LlamaConfig(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    max_position_embeddings=16384,
    tie_word_embeddings=True,
    dtype="bfloat16",
)

# Taken by one backward pass of the kernels in fp16, as torch.cuda.max_memory_allocated has it on
# an H100 (PyTorch 2.11): tokens, room, heads of queries and of keys, their size, megabytes.
MEASURED = [
    (16192, Room(41, 8192), 8, 8, 64, 739.4),
    (16000, Room(80, 200), 8, 8, 64, 92.8),
    (16000, Room(82, 16000), 8, 8, 64, 2741.5),
    (16384, Room(2, 8192), 8, 8, 64, 84.4),
    (16384, Room(4, 4096), 8, 8, 64, 84.4),
    (16000, Room(80, 8192), 8, 8, 80, 2747.0),
    (16384, Room(2, 8192), 8, 8, 80, 130.6),
    (16000, Room(80, 8192), 8, 8, 96, 2759.3),
    (16192, Room(41, 8192), 8, 8, 128, 1476.1),
    (16000, Room(80, 200), 8, 8, 128, 182.7),
    (16192, Room(41, 8192), 8, 8, 256, 2995.3),
    (16192, Room(82, 8192), 32, 8, 128, 11673.8),
    (16192, Room(82, 8192), 32, 4, 64, 5842.0),
    (800, Room(4, 256), 32, 4, 64, 24.9),
]


@pytest.mark.parametrize(("tokens", "room", "heads", "kv_heads", "size", "megabytes"), MEASURED)
def test_the_backward_pass_takes_what_was_measured(
    tokens: int, room: Room, heads: int, kv_heads: int, size: int, megabytes: float
) -> None:
    # Three gradients, and two copies of keys and values where query heads share them, as before.
    wide = (3 if heads == kv_heads else 5) * 2 * tokens * heads * size
    taken = wide + backward_bytes(heads, size, 2, room)
    assert taken / 1e6 == pytest.approx(megabytes, rel=0.03)


@given(
    tokens=st.integers(1, 20_000),
    rows=st.integers(1, 100),
    longest=st.integers(1, 20_000),
    heads=st.integers(1, 40),
)
def test_log_sums_are_as_the_kernels_have_them(
    tokens: int, rows: int, longest: int, heads: int
) -> None:
    shape = attention_efficient.lse_shape(tokens, rows, longest, heads)
    assert log_sums(heads, Room(rows, min(longest, tokens))) == 4 * int(np.prod(shape))


def rows_of(lengths: list[int]) -> list[TokenizedRow]:
    return [
        TokenizedRow(np.zeros(n, np.int32), np.arange(n) > n // 2, i) for i, n in enumerate(lengths)
    ]


def resolved(
    lengths: list[int], device: Device, *, pack: int | None = None, more: str = ""
) -> Resolved:
    packing = f", packing: true, max_length: {pack}" if pack else ""
    text = f"model: {{name: m}}\ndata: {{path: d{packing}}}\n{more}"
    train = rows_of(lengths)
    return resolve(
        parse_recipe(text, "r.yaml"),
        device=device,
        model_config=LLAMA_3B,
        rows=len(lengths),
        max_length=pack or max(lengths),
        held_out=0,
        template="chat",
        formats=["instruction"],
        train=train,
        packs=Packs(np.array(lengths), pack, 42) if pack else None,
    )


def memory_warnings(found: Resolved) -> list[str]:
    return [text for text in found.warnings if "run out of memory" in text]


STATED = "training: {batch_size: 1}\n"
ONE_LONG = [8192] + [200] * 799
SHORT = [200] * 800


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.kernels.triton_shim.INSTALLED", True)


@pytest.mark.usefixtures("with_triton")
def test_a_long_row_in_a_pack_is_told_where_it_does_not_fit() -> None:
    (warning,) = memory_warnings(resolved(ONE_LONG, T4, pack=16384, more=STATED))
    # By hand: up to 81 rows in a pack and two of padding, of 8,192 tokens each in 24 heads of 128;
    # without packs one row, which the pass has anyway.
    by_hand = 4 * 24 * (83 * 8192 - 16384) * 128
    assert (
        f"--set data.packing=false, since {by_hand / 1e9:.1f} GB of it are attention's" in warning
    )
    assert "for 83 rows a pass as if each had the 8,192 tokens of the longest" in warning
    # What it says helps, and so do rows of one length, a newer GPU, and shorter packs.
    assert not memory_warnings(resolved(ONE_LONG, T4, more=STATED))
    assert not memory_warnings(resolved(SHORT, T4, pack=16384, more=STATED))
    assert not memory_warnings(resolved(ONE_LONG, AMPERE, pack=16384, more=STATED))
    assert not memory_warnings(resolved(SHORT, T4, pack=2048, more=STATED))


def test_layers_that_are_not_fused_are_planned_alike() -> None:
    """A layer's sums stay until its backward pass: of all layers, or of the one recomputed."""
    shape = model_shape(LLAMA_3B)
    plain = Setup("fp16", True, 64, True, 16, ("q_proj", "v_proj"), "adamw_8bit")
    padded = replace(plain, pads_rows=True)
    sums = 4 * 24 * (40 * 4096 - 8192)
    for checkpointing, layers in ((True, 1), (False, 28)):
        before, after = (
            step_memory(
                shape,
                setup,
                tokens=8192,
                checkpointing=checkpointing,
                keep_copy=False,
                room=Room(40, 4090),
            )
            for setup in (plain, padded)
        )
        assert after.activations - before.activations == layers * sums
        assert after.working - before.working == 4 * 24 * 40 * 4096 * 128
