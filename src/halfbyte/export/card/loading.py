"""How to load what a card stands beside: an adapter, a merged model, a GGUF file."""

from __future__ import annotations

import json
import shlex
from typing import Literal

from halfbyte.export.card.text import clean, fenced, hub_name, public_name
from halfbyte.recipe.schema import QuantizationRecipe

Kind = Literal["adapter", "combination", "merge", "quantized", "compressed", "mlx"]


def loading_lines(
    kind: Kind,
    base: str,
    quantization: QuantizationRecipe | None,
    place: str | None,
    file: str | None,
) -> list[str]:
    """Code for ``kind``; ``place`` is the repository (None: this folder), ``file`` the GGUF."""
    if kind == "quantized":
        return _gguf(place, file or "FILE.gguf")
    if kind == "mlx":
        return _mlx(place)
    if kind in ("merge", "compressed"):
        return _merged(place, compressed=kind == "compressed")
    return _adapter(base, quantization, place)


def with_place(card: str, place: str) -> str:
    """A card that speaks of this folder (``place`` None above) made one that speaks of ``place``.

    Only lines that :func:`loading_lines` writes are changed.
    """
    name, fetched = place.rpartition("/")[2], _fetched(place)
    return (
        card.replace('from_pretrained(".")', f"from_pretrained({_text(place)})")
        .replace('from_pretrained(base, ".")', f"from_pretrained(base, {_text(place)})")
        .replace('from_pretrained(".", dtype=', f"from_pretrained({_text(place)}, dtype=")
        .replace("\nvllm serve .\n", f"\nvllm serve {place}\n")
        .replace("\nmlx_lm.chat --model .\n", f"\nmlx_lm.chat --model {place}\n")
        .replace("```sh\nhalfbyte chat .", f"```sh\n{fetched}halfbyte chat {name}")
        .replace("```sh\nllama-cli -m ", f"```sh\n{fetched}llama-cli -m ")
    )


def _adapter(base: str, quantization: QuantizationRecipe | None, place: str | None) -> list[str]:
    on_hub = hub_name(base)
    blocks = 64 if quantization is None else quantization.block_size
    double = True if quantization is None else quantization.double_quant
    name = _text(on_hub or "BASE")
    where = _text(place or ".")
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig",
        "",
        "nf4 = BitsAndBytesConfig(",
        '    load_in_4bit=True, bnb_4bit_quant_type="nf4",',
        f"    bnb_4bit_use_double_quant={double}, bnb_4bit_compute_dtype=torch.bfloat16,",
        ")",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
        f"name = {name}",
        "base = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4)",
        f"model = PeftModel.from_pretrained(base, {where})",
    ]
    said = "It was trained on the base in 4 bits, which these lines load too; PEFT puts it on:"
    if on_hub is None:
        said = (
            "With PEFT, where `BASE` is a folder of the base model in transformers' format; it was "
            "trained on 4 bits, which these lines load too:"
        )
    if blocks != 64:
        said = f"{said[:-1]} (in blocks of 64 weights, where the training had blocks of {blocks}):"
    return [
        said,
        "",
        *fenced("\n".join(lines), "python"),
        "With halfbyte, in the format that was trained:",
        "",
        *fenced(f"{_fetched(place)}halfbyte chat {_folder(place)}{_base(base)}", "sh"),
    ]


def _merged(place: str | None, *, compressed: bool) -> list[str]:
    where = _text(place or ".")
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({where})",
        f'model = AutoModelForCausalLM.from_pretrained({where}, dtype="auto", device_map="auto")',
        "prompt = tokenizer.apply_chat_template(",
        '    [{"role": "user", "content": "Hello"}], add_generation_prompt=True,',
        '    return_tensors="pt", return_dict=True,',
        ").to(model.device)",
        "answer = model.generate(**prompt, max_new_tokens=256)",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:]))',
    ]
    said = "The adapter is in the weights: what loads the base model loads this one."
    if compressed:
        said = (
            "The adapter is in the weights, which vLLM loads as they are, and transformers where "
            "the package `compressed-tensors` is:"
        )
    return [
        said,
        "",
        *fenced("\n".join(lines), "python"),
        *fenced(f"vllm serve {place or '.'}", "sh"),
    ]


def _mlx(place: str | None) -> list[str]:
    return [
        "With mlx-lm, on a Mac or elsewhere:",
        "",
        *fenced(f"mlx_lm.chat --model {place or '.'}", "sh"),
    ]


def _gguf(place: str | None, file: str) -> list[str]:
    modelfile = file.removesuffix(".gguf") + ".Modelfile"
    lines = [f"llama-cli -m {_q(file)} --jinja -cnv", f"ollama create NAME -f {_q(modelfile)}"]
    return [
        "With llama.cpp, or with Ollama by the Modelfile beside it:",
        "",
        *fenced(_fetched(place) + "\n".join(lines), "sh"),
    ]


def _fetched(place: str | None) -> str:
    return "" if place is None else f"hf download {place} --local-dir {_folder(place)}\n"


def _folder(place: str | None) -> str:
    return "." if place is None else place.rpartition("/")[2]


def _base(base: str) -> str:
    name = public_name(base)
    return "" if hub_name(base) else f" --base {_q(name) if name.startswith('pypi:') else 'BASE'}"


def _text(text: str) -> str:
    return json.dumps(clean(text))


def _q(text: str) -> str:
    return shlex.quote(clean(text))
