"""Generation against transformers' own ``generate`` and logits processors."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from generation_case import FAMILIES, NEW, PROMPTS, build, oracle, ours
from halfbyte.errors import ModelError
from halfbyte.generate.answer import answer
from halfbyte.generate.cached_attention import ready_to_generate
from halfbyte.generate.prompt import end_ids, prompt_ids
from halfbyte.generate.sampling import Sampling, next_token, penalize, probabilities
from halfbyte.generate.text_stream import TextStream
from halfbyte.model.attention import NAME as TRAINING_ATTENTION
from halfbyte.model.attention import use_varlen_attention


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # Matrices this small gain nothing from threads, and lose much where cores are shared.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_transformers(family: str) -> None:
    model = build(family)
    use_varlen_attention(model)
    alone = [ours(model, [prompt])[0] for prompt in PROMPTS]
    assert alone == [oracle(model, [prompt])[0] for prompt in PROMPTS]
    assert ours(model, PROMPTS) == oracle(model, PROMPTS) == alone
    assert all(len(row) == NEW and len(set(row)) > 8 for row in alone), "the test shows nothing"
    assert len({tuple(row) for row in alone}) == len(alone)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_transformers_on_a_gpu(family: str) -> None:
    model = build(family).to("cuda")
    use_varlen_attention(model)
    assert ours(model, PROMPTS) == oracle(model, PROMPTS)
    drawn = ours(model, PROMPTS, temperature=1.0)
    assert drawn == ours(model, PROMPTS, temperature=1.0) != ours(model, PROMPTS)


def test_each_row_ends_where_transformers_ends_it() -> None:
    model = build("llama")
    whole = oracle(model, PROMPTS)
    ends = [whole[0][5], whole[2][17]]
    found = ours(model, PROMPTS, ends=frozenset(ends))
    for row, padded in zip(found, oracle(model, PROMPTS, ends), strict=True):
        assert padded == row + [0] * (len(padded) - len(row))
    assert len({len(row) for row in found}) > 1


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_p": 1e-6},
        {"temperature": 0.5, "top_k": 20, "top_p": 0.6, "repetition_penalty": 1.4},
    ],
)
def test_the_distribution_is_that_of_transformers(setting: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 200, generator=generator) * 4
    seen = torch.randint(0, 200, (3, 30), generator=generator)
    s = Sampling(**setting)  # type: ignore[arg-type]
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(float(s.repetition_penalty)),
            TemperatureLogitsWarper(float(s.temperature)),
            *([TopKLogitsWarper(int(s.top_k))] if s.top_k else []),
            TopPLogitsWarper(s.top_p),
        ]
    )
    expected = processors(seen, logits).softmax(-1)
    for row in range(3):
        given = probabilities(penalize(logits[row], seen[row], s.repetition_penalty), s)
        torch.testing.assert_close(given, expected[row], rtol=1e-5, atol=1e-8)
        assert torch.equal(given > 0, expected[row] > 0)


def test_tokens_are_drawn_from_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampling = Sampling(temperature=1.5, top_k=3)
    generator = torch.Generator().manual_seed(0)
    seen = torch.tensor([0])
    drawn = torch.stack([next_token(logits, seen, sampling, generator) for _ in range(4000)])
    shares = drawn.bincount(minlength=4) / 4000
    # Four standard deviations of a share of 4,000 draws are at most 0.032.
    torch.testing.assert_close(shares, probabilities(logits, sampling), rtol=0, atol=0.032)
    assert shares[3] == 0


def test_a_seed_decides_a_row_whatever_else_is_drawn() -> None:
    model = build("qwen3")
    setting = {"temperature": 1.0, "top_p": 0.95}
    state = torch.random.get_rng_state()
    first = ours(model, PROMPTS, **setting)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    torch.rand(3)
    assert ours(model, PROMPTS, **setting) == first
    assert ours(model, PROMPTS[:2], **setting) == first[:2]
    assert ours(model, [PROMPTS[0]] * 2, **setting)[0] != ours(model, [PROMPTS[0]] * 2)[0]


def test_no_token_is_drawn_from_nan() -> None:
    broken = torch.tensor([0.0, float("nan")])
    with pytest.raises(ModelError, match="not numbers"):
        next_token(broken, torch.tensor([0]), Sampling(temperature=1.0), torch.Generator())


def test_the_model_comes_back_as_it_was() -> None:
    model = build("gemma3")
    use_varlen_attention(model)
    model.train()
    held_out = {"input_ids": torch.tensor([PROMPTS[0]]), "row_borders": [0, 7, 19]}
    before = model(**held_out, use_cache=False).logits
    ours(model, PROMPTS[:2])
    with pytest.raises(KeyboardInterrupt), ready_to_generate(model):
        raise KeyboardInterrupt
    assert model.training
    assert all(
        m.config._attn_implementation == TRAINING_ATTENTION
        for m in model.modules()
        if hasattr(m, "config")
    )
    assert torch.equal(model(**held_out, use_cache=False).logits, before)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    return model, AutoTokenizer.from_pretrained(tiny_model)


def test_answers_are_in_order_and_stream_as_they_are(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompts = ["Say the number 3 in words, and then another.", "One", "The number is 12.", "Ü"]
    heard = [""] * len(prompts)

    def on_text(row: int, piece: str) -> None:
        heard[row] += piece

    together = answer(model, tokenizer, prompts, max_new_tokens=24, on_text=on_text)
    for prompt, given, text in zip(prompts, together, heard, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
        assert given.tokens == len(expected)
        assert given.ended == (expected[-1].item() in end_ids(model, tokenizer))
        full = tokenizer.decode(expected, skip_special_tokens=True)
        assert given.text == full.rstrip("\ufffd") == text
        assert given.prompt_tokens == ids.shape[1]
        assert given.prompt_cut == 0


def test_answers_are_repeated_by_the_seed(tiny: tuple[Any, Any]) -> None:
    def texts(seed: int) -> list[str]:
        given = answer(*tiny, ["One", "One"], max_new_tokens=24, temperature=2.0, seed=seed)
        return [one.text for one in given]

    first = texts(3)
    assert texts(3) == first
    assert first[0] != first[1], "the same prompt twice draws anew"
    assert texts(4)[0] == first[1], "prompt i draws from seed + i"


def test_a_prompt_longer_than_the_model_takes_keeps_its_end(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    room = model.config.max_position_embeddings
    text = "€" * room  # three byte tokens each
    (given,) = answer(model, tokenizer, [text], max_new_tokens=10)
    assert given.prompt_tokens == room - 10
    assert given.prompt_cut == 3 * room - given.prompt_tokens
    assert given.tokens <= 10
    with pytest.raises(ValueError, match="no tokens"):
        answer(model, tokenizer, [""], max_new_tokens=10)


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_text_comes_in_whole_characters(kind: str, tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1] if kind == "byte level" else _like_llama()
    text = "Grüße, 世界! 👩‍👩‍👧 two  spaces\n\tnaïve ☕☕ — end. 🎉"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.end() == tokenizer.decode(ids) == text
    assert sum(bool(piece) for piece in pieces) > 30, "it came in a few lumps"

    cut = TextStream(tokenizer)  # in the midst of the last character
    assert "".join([*map(cut.push, ids[:-1]), cut.end()]) == text[:-1]


def test_bytes_that_are_no_text_stream_too(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        ids = torch.randint(3, 300, (60,), generator=draw).tolist()
        stream = TextStream(tokenizer)
        given = "".join([*map(stream.push, ids), stream.end()])
        assert given == tokenizer.decode(ids).rstrip("\ufffd")
    endless = TextStream(tokenizer)
    bad = tokenizer.convert_tokens_to_ids("ÿ")  # the byte 0xFF, in no character
    assert "".join(endless.push(bad) for _ in range(500)).strip("\ufffd") == ""
    assert len(endless._window) < 200, "each token would cost more than the one before it"


def _like_llama() -> Any:
    """A tokenizer made of the parts of Llama 2's: a space before the first word, which decoding
    takes off again, a token for each byte of a rare character, BOS and EOS added to a text."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary += [*string.ascii_letters, *string.punctuation, "\n", "ü"]
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    backend = Tokenizer(
        models.BPE(numbers, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_a_prompt_has_one_beginning_and_no_end() -> None:
    tokenizer = _like_llama()
    prompt = "### Instruction:\nSay yes."
    ids = prompt_ids(tokenizer, prompt)
    assert [*ids, 2] == tokenizer(prompt)["input_ids"]
    assert ids[0] == 1
    assert prompt_ids(tokenizer, "<s>" + prompt).count(1) == 1


def test_a_turn_of_the_template_ends_an_answer(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token="<|endoftext|>")
    bare = build("llama")
    assert end_ids(bare, other) == {end, turn}
    bare.generation_config.eos_token_id = [7, 8]
    assert end_ids(bare, other) == {end, turn, 7, 8}
    other.chat_template = "{{ raise_exception('no') }}"
    assert end_ids(bare, other) == {end, 7, 8}
    assert end_ids(model, tokenizer) == {turn}
