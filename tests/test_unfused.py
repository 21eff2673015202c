"""Layers as transformers has them, with kernels that leave a batch's values on the device.

Without a GPU the kernels run under Triton's interpreter. What they are compared with is PyTorch's
attention row by row in fp64, and the same network going from row to row on the host.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

pytest.importorskip("peft")

from triton_interpreter import DEVICE

# isort: split
from halfbyte.data.batch import Batch
from halfbyte.data.batching import make_batch
from halfbyte.events.types import Choice, Event, Fallback
from halfbyte.kernels.choice import ALL
from halfbyte.kernels.cross_entropy import head_loss, head_loss_reference
from halfbyte.kernels.dropout import dropout_key, dropout_keys_reference
from halfbyte.kernels.lora_linear import lora_linear
from halfbyte.kernels.loss import cross_entropy_at
from halfbyte.model.attention import varlen_attention
from halfbyte.model.causal import QLoRAModel
from halfbyte.model.varlen import DeviceRows, NoKernelError
from halfbyte.plan.device import Device
from halfbyte.recipe.data_schema import DataRecipe
from halfbyte.recipe.schema import ModelRecipe, RecipeFields, TrainingRecipe
from halfbyte.run import setup
from oracle.case import Case, Family, save_model
from oracle.ours import tokenized
from oracle.workshop import model_of

BORDERS = [0, 9, 10, 10, 33, 47, 47, 47]  # a row of one token, rows of none
FAMILIES: list[Family] = ["llama", "qwen3", "gemma3"]
CASE = Case(loss_on="answer", r=64)
H100 = Device("cuda", "a GPU", 80 * 10**9, 80 * 10**9, (9, 0), True, 1)


class NoHostReads(TorchFunctionMode):
    """Any way for the host to learn a value of a tensor is an error."""

    WAYS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")

    class Below(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = str(func)
            assert not name.startswith(("aten._local_scalar", "aten.equal", "aten.nonzero.")), name
            assert not name.startswith(("aten.masked_select", "aten._unique")), name
            return func(*args, **(kwargs or {}))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in self.WAYS, func
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> NoHostReads:
        self.below = self.Below()
        self.below.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.below.__exit__(*error)


def test_the_guard_sees_reads() -> None:
    value = torch.tensor([3, 4])
    for read in (Tensor.tolist, Tensor.nonzero, lambda t: t[0].item(), lambda t: bool(t.any())):
        with pytest.raises(AssertionError), NoHostReads():
            read(value)
    with NoHostReads():
        torch.nonzero_static(value, size=2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_and_its_gradients(kv_heads: int, window: int | None, dtype: torch.dtype) -> None:
    """Queries and keys in fp32, as out of a rotary embedding in fp32; values in ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, BORDERS[-1], 16) for heads in (4, kv_heads, kv_heads)]
    given = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]
    upstream = torch.randn(1, BORDERS[-1], 4, 16, generator=generator).to(DEVICE, dtype)
    leaves = [t.float().requires_grad_() for t in given[:2]] + [given[2].requires_grad_()]
    rows = DeviceRows(torch.tensor(BORDERS, dtype=torch.int32, device=DEVICE), 23, ALL)
    with NoHostReads():
        out, _ = varlen_attention(
            torch.nn.Module(),
            *leaves,
            None,
            scaling=0.3,
            sliding_window=window,
            row_borders=rows,
        )
        found = torch.autograd.grad(out, leaves, upstream)
    assert (out.dtype, out.shape) == (dtype, upstream.shape)
    assert [t.dtype for t in found] == [t.dtype for t in leaves]

    doubles = [t.detach().double().requires_grad_() for t in given]
    parts = []
    for start, stop in pairwise(BORDERS):
        q, k, v = (t[:, :, start:stop] for t in doubles)
        at = torch.arange(stop - start, device=DEVICE)
        apart = at[:, None] - at
        mask = (apart >= 0) & (apart < (100 if window is None else window))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True
            )
        )
    expected = torch.cat(parts, dim=2).transpose(1, 2)
    wanted = torch.autograd.grad(expected, doubles, upstream.double())
    tolerance = 4e-6 if dtype == torch.float32 else 2e-3
    for one, other in zip((out, *found), (expected, *wanted), strict=True):
        assert (one.double() - other).abs().max() <= tolerance * other.abs().max()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in found.items():
        save_model(folder, family)
    return found


def padded(folder: Path) -> Batch:
    """The two shortest rows, padded to 96 tokens, 24 labels and a third border."""
    rows = sorted(tokenized(folder, "answer"), key=len)[:2]
    return make_batch(rows, 3, tokens=96, labels=24, max_seqlen=48)


def gradients(model: QLoRAModel, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of one pass, made under the guard if the kernels are used."""
    parameters = model.lora_parameters()
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    model.network.train()
    factor = torch.tensor(0.01)
    if model.kernels is None:
        loss = model.loss_and_gradients(batch, factor)
    else:
        with NoHostReads():
            loss = model.loss_and_gradients(batch, factor)
    grads = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    return loss, grads


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_reads_nothing_and_gives_what_the_rows_one_by_one_give(
    family: Family, folders: dict[str, Path]
) -> None:
    batch = padded(folders[family])
    model = model_of(folders[family], CASE, dropout=0.1)
    position = model.position
    assert position is not None
    position.step = 7
    loss, expected = gradients(model, batch)

    model.use_kernels(ALL)
    position.keys = torch.zeros(len(model.lora), 2, dtype=torch.int32)
    dropout_keys_reference(position.seed, torch.tensor([7, 0]), position.keys)
    assert model.host_reads() is None
    found = {}
    for recompute in (False, True):
        model.use_gradient_checkpointing(recompute)
        ours, found[recompute] = gradients(model, batch)
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    for name, want in expected.items():
        got = found[False][name]
        assert want.norm() > 0
        assert (got - want).norm() <= 2e-5 * want.norm(), name
        assert torch.equal(got, found[True][name]), name


def test_what_no_kernel_does_stays_with_the_row_loop(folders: dict[str, Path]) -> None:
    small: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**small, head_dim=16, sliding_window=8))
    odd = LlamaForCausalLM(LlamaConfig(**small, head_dim=24))
    for network, reason in ((capped, "caps the scores"), (odd, "heads of 24 elements")):
        model = QLoRAModel(network, {}, torch.float32)
        with pytest.raises(NoKernelError, match=reason):
            model.use_kernels(ALL)
        assert model.kernels is None
        assert model.host_reads() == "its attention goes through the rows one by one"

    def without_window(*args: Any, window: int | None = None) -> None:
        ALL.attention(*args)

    model = model_of(folders["gemma3"], CASE)
    with pytest.raises(NoKernelError, match="does not compute its attention"):
        model.use_kernels(replace(ALL, attention=without_window))
    assert model.kernels is None


def test_a_network_that_reads_from_the_device_is_seen() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.2,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    model = QLoRAModel(LlamaForCausalLM(config), {}, torch.float32)
    model.use_kernels(ALL)
    reason = model.host_reads()
    assert reason is not None
    assert "LlamaForCausalLM makes the host wait" in reason


@pytest.mark.parametrize("kernel", [head_loss, head_loss_reference])
@pytest.mark.parametrize(("learned", "entries"), [(11, 11), (11, 16), (36, 37), (0, 4)])
def test_the_loss_at_an_index(kernel: Any, learned: int, entries: int) -> None:
    """Against PyTorch's cross-entropy in fp64 over all positions."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(37, 24, generator=generator)
    weight = torch.randn(50, 24, generator=generator)
    at = torch.randperm(36, generator=generator)[:learned].sort().values
    labels = torch.full((37,), -100)
    labels[at] = torch.randint(50, (learned,), generator=generator)
    index = torch.cat([at, torch.full((entries - learned,), 36)])
    given = [t.to(DEVICE) for t in (weight, labels, index, labels[index])]
    x = hidden.to(DEVICE).requires_grad_()
    with NoHostReads():
        loss = cross_entropy_at(x, *given, kernel, scale=0.7, softcap=4.0)
        (grad,) = torch.autograd.grad(loss * 3.0, x)
    wide = hidden.double().requires_grad_()
    z = 4.0 * torch.tanh(0.7 * wide @ weight.double().t() / 4.0)
    want = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    (want_grad,) = torch.autograd.grad(want * 3.0, wide)
    torch.testing.assert_close(loss.double().cpu(), want.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double().cpu(), want_grad, rtol=1e-4, atol=2e-5)


def test_dropout_by_the_kernel_is_dropout_by_the_mask() -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = {"x": (37, 48), "A": (8, 48), "B": (20, 8), "W": (20, 48), "dy": (37, 20)}
    values = {n: torch.randn(s, generator=generator).to(DEVICE) for n, s in shapes.items()}
    key = dropout_key(5, 3, 0, 2)
    found = []
    for given, apply in ((key, None), (torch.tensor(key, device=DEVICE).int(), ALL.apply_dropout)):
        leaves = [values[n].clone().requires_grad_() for n in ("x", "A", "B")]
        x, a, b = leaves
        with NoHostReads():
            y = lora_linear(
                x,
                lambda: values["W"],
                None,
                a,
                b,
                scale=0.5,
                dropout_p=0.25,
                key=given,
                dtype=torch.float32,
                apply=apply,
            )
            found.append((y, *torch.autograd.grad(y, leaves, values["dy"])))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)


def test_a_run_on_a_gpu_chooses_them(folders: dict[str, Path]) -> None:
    """The trainer that a run would make there, made on a CPU: three steps with and without it."""
    batch = padded(folders["qwen3"])
    ended = []
    for device in (replace(H100, kind="cpu", capability=None), H100):
        model = model_of(folders["qwen3"], CASE, dropout=0.1)
        events: list[Event] = []
        if device.kind == "cuda":
            setup._fuse(model, device, events.append, None, None)  # type: ignore[arg-type]
            assert [type(e) for e in events] == [Fallback, Choice]
            assert model.kernels is ALL
        recipe = RecipeFields(
            model=ModelRecipe(name="m"),
            data=DataRecipe(path="d"),
            training=TrainingRecipe(
                learning_rate=1e-3, warmup_steps=0, gradient_checkpointing=False
            ),
        )
        assembly: Any = SimpleNamespace(
            recipe=recipe,
            device=device,
            earlier=None,
            resolved=SimpleNamespace(steps=3, recomputed_layers=0),
        )
        trainer = setup.make_trainer(assembly, model)
        assert model.position is not None
        assert (trainer.step.dropout_keys, model.position.apply) == (
            (ALL.dropout_keys, ALL.apply_dropout) if device.kind == "cuda" else (None, None)
        )
        model.position.apply = None  # it has a test of its own, and the interpreter takes its time
        losses = [trainer.take_step(number, [batch]).loss.item() for number in (1, 2, 3)]
        ended.append((losses, trainer.parameters.data.clone()))
    (plain, weights), (ours, our_weights) = ended
    assert plain[2] < plain[0]
    assert ours == pytest.approx(plain, rel=1e-4)
    moved = (our_weights - weights).norm()
    assert moved <= 0.02 * 1e-3 * len(weights) ** 0.5  # of the way that three steps go
