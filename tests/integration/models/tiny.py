"""Tiny models of transformers, with random weights and a vocabulary of a few words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "good", "bad", "film", "was", "is", "very", "not"]


def tokenizer(**options: Any) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, **({"model_max_length": 16} | options))


def bert_config(**options: Any) -> Any:
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes, **options)


def bert(kind: str, folder: Path, **options: Any) -> str:
    """A folder with Bert<kind> and its tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = bert_config(initializer_range=1.0, **options)
    getattr(transformers, f"Bert{kind}")(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
