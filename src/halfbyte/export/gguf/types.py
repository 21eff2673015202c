"""The types that a GGUF file's weights can be written in."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from halfbyte.errors import ModelError

_Kind = GGMLQuantizationType


@dataclass(frozen=True)
class WeightType:
    """A type by its name, as llama.cpp's programs take it in capitals.

    ``kind`` is what the matrices are written in by the ``gguf`` package; None where llama.cpp's own
    quantizer chooses one for each tensor. A file of this type counts as the model that it was made
    of up to ``error``, the relative error of each matrix (Frobenius), and up to ``largest_kl``, the
    mean Kullback–Leibler divergence of its logits (nats a token).
    """

    name: str
    number: LlamaFileType
    kind: GGMLQuantizationType | None
    error: float
    largest_kl: float

    @property
    def by_llama_cpp(self) -> bool:
        """Whether llama.cpp's quantizer is needed."""
        return self.kind is None

    @property
    def ends_kind(self) -> GGMLQuantizationType:
        """What embedding and head are written in: in 4 and 5 bits they would lose most."""
        assert self.kind is not None
        return _Kind.Q8_0 if GGML_QUANT_SIZES[self.kind][1] < 34 and self.quantized else self.kind

    @property
    def quantized(self) -> bool:
        """Whether weights share scales in blocks."""
        return self.kind is None or GGML_QUANT_SIZES[self.kind][0] > 1


# Bounds: of matrices about twice what normally distributed weights lose, of logits two to ten times
# what SmolLM2-135M was measured to lose, which being small loses most (docs/exporting.md). Matrices
# tell what is wrong in one layer, logits what is wrong in all.
_SIMPLE = {
    "f32": (LlamaFileType.ALL_F32, _Kind.F32, 1e-5, 1e-5),
    "f16": (LlamaFileType.MOSTLY_F16, _Kind.F16, 1e-3, 1e-4),
    "bf16": (LlamaFileType.MOSTLY_BF16, _Kind.BF16, 5e-3, 2e-3),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, _Kind.Q8_0, 0.015, 0.02),
    "q5_1": (LlamaFileType.MOSTLY_Q5_1, _Kind.Q5_1, 0.1, 0.5),
    "q5_0": (LlamaFileType.MOSTLY_Q5_0, _Kind.Q5_0, 0.1, 0.5),
    "q4_1": (LlamaFileType.MOSTLY_Q4_1, _Kind.Q4_1, 0.2, 1.5),
    "q4_0": (LlamaFileType.MOSTLY_Q4_0, _Kind.Q4_0, 0.2, 1.5),
}
_BY_LLAMA_CPP = {
    "q6_k": (LlamaFileType.MOSTLY_Q6_K, 0.05, 0.1),
    "q5_k_m": (LlamaFileType.MOSTLY_Q5_K_M, 0.1, 0.5),
    "q5_k_s": (LlamaFileType.MOSTLY_Q5_K_S, 0.1, 0.5),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, 0.2, 1.0),
    "q4_k_s": (LlamaFileType.MOSTLY_Q4_K_S, 0.2, 1.0),
    "iq4_nl": (LlamaFileType.MOSTLY_IQ4_NL, 0.2, 1.0),
    "iq4_xs": (LlamaFileType.MOSTLY_IQ4_XS, 0.2, 1.0),
    "q3_k_l": (LlamaFileType.MOSTLY_Q3_K_L, 0.35, 1.5),
    "q3_k_m": (LlamaFileType.MOSTLY_Q3_K_M, 0.35, 1.5),
    "q3_k_s": (LlamaFileType.MOSTLY_Q3_K_S, 0.35, 1.5),
    "q2_k": (LlamaFileType.MOSTLY_Q2_K, 0.6, 2.5),
}
# Types that llama.cpp makes only by an importance matrix, measured with texts; or without one so
# badly that no answer is left (IQ3: 3 nats).
_BY_IMPORTANCE = (
    *("iq1_m", "iq1_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "q2_k_s"),
    *("iq3_xxs", "iq3_xs", "iq3_s", "iq3_m"),
)

TYPES = {
    **{name: WeightType(name, *rest) for name, rest in _SIMPLE.items()},
    **{n: WeightType(n, number, None, *rest) for n, (number, *rest) in _BY_LLAMA_CPP.items()},
}


def weight_type(name: str) -> WeightType:
    """The type called ``name``, in letters of any size. Raises ModelError for one that is none."""
    asked = name.strip().lower()
    if asked in TYPES:
        return TYPES[asked]
    if asked in _BY_IMPORTANCE:
        raise ModelError(
            f"--type {asked} needs an importance matrix, which halfbyte does not make: choose "
            "q2_k, q3_k_m or q4_k_m."
        )
    [near] = difflib.get_close_matches(asked, TYPES, n=1, cutoff=0.0)
    raise ModelError(
        f"--type {name} is no type of GGUF; the nearest is {near}, and there are "
        f"{', '.join(TYPES)}."
    )
