"""Files that lie beside a model's weights, by name or pattern."""

TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
PAPERS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
