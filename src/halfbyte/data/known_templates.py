"""Chat templates that were looked at, and take no more time and memory than their conversations.

They are rendered in this process; any other is rendered in the worker of
:mod:`halfbyte.data.template_process`, to the same text.
"""

from __future__ import annotations

import hashlib

# SHA-256 of the text in UTF-8: the model whose template it is. Those that write the date stand here
# a second time as they are with the date pinned.
KNOWN = {
    "e068a6cce9f6ce24f4f4f2e9b2b952ddde693a7137ff54f5089eefef06b08d39": "chatml-generation",
    "56a1447ad31926fdc21fb07e56e5642bd9c850c4f52d8c8af7bbe5f079a84f5f": "deepseek-r1-distill",
    "c182da8741af2eeb7dc5427f7d49832365a30b4bffe483e4760a13721e43a87b": "falcon-3",
    "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6": "gemma-2",
    "7de1c58e208eda46e9c7f86397df37ec49883aeece39fb961e0a6b24088dd3c4": "gemma-3",
    "3c71df5f659987462c882bf9e295b597dc19902467a7312ea382c5896681bc02": "granite-3.3",
    "bf2b94e60f5a30142665f088a2d7f1b296373f67d6c839508dadede061af5edb": "granite-3.3",
    "9524df67b77a7b25a2dfee898f75b316a157eb9d855b51e32aeac79d7c8a83ce": "granite-4",
    "6d65c8804847ad74eea912dd7eca3dc1cf7a457b53a77f47d841a14121910963": "lfm-2.5",
    "e8d5b5a546d3f19df16a5320c614fab05bdc4edd50e850f1afd947b503ea41cf": "llama-2",
    "e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65": "llama-3.1",
    "5816fce10444e03c2e9ee1ef8a4a1ea61ae7e69e438613f3b17b69d0426223a4": "llama-3.2",
    "9f36058501ebe1f04ecd6bde7ee7ec59b72da865eb610ab4e77ff300eb63fcdc": "llama-3.2",
    "e4676cb56dffea7782fd3e2b577cfaf1e123537e6ef49b3ec7caa6c095c62272": "mistral-nemo",
    "1c7824843177327a1305640eb670b6c5056c5bc6e4f43daab48adbdb4d17791b": "mistral-v0.3",
    "fe689ffbd6a4e2d0532d7480696b065b10e0e1eff3f9b9fc4bea415761e4bf4a": "olmo-2",
    "78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90": "phi-3.5",
    "fe4120415a3858b873955c92ce3a103a95bc97c2cb00b72e62659aaf0f891ee5": "phi-4",
    "cd8e9439f0570856fd70470bf8889ebd8b5d1107207f67a5efb46e342330527f": "qwen-2.5",
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": "qwen-3",
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788": "smollm-2",
    "79895d64f007020ad8d68e6c9845971fa98dfc03e1e711721abded0541e07b3f": "smollm-3",
    "2dfca20434518ed72537e1a7ab7d760829ac2626aba9aac14c2fa89076e4b68a": "smollm-3",
    "66291cf0045c2425a3a667cf3cbb7af2b11f09e025c02f97245323ab79119362": "zephyr",
}


def is_known(template: str) -> bool:
    """Whether ``template`` is one of them, to the letter."""
    return hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest() in KNOWN
