"""The files around the built-in model's weights: config, byte-level tokenizer, chat template.

The tokenizer has one token per byte and a few special ones, without merges: a text of n bytes is n
tokens. The special tokens start at id 256.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

NUM_LAYERS = 4
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 640
NUM_HEADS = 8
NUM_KV_HEADS = 4  # splits over 2 or 4 tensor-parallel ranks
HEAD_DIM = 32  # Source: the smallest head size that vLLM's CPU attention takes
MAX_TOKENS = 32768

NUM_BYTES = 256
END, PAD, BOS = "<|end|>", "<|pad|>", "<|bos|>"
ROLES = ("system", "user", "assistant", "tool")
# An even number, so that the vocabulary of 264 splits over 2, 4 or 8 ranks.
SPECIAL_TOKENS = (END, PAD, BOS, *(f"<|{role}|>" for role in ROLES), "<|reserved|>")
VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
SPECIAL_IDS = {token: NUM_BYTES + index for index, token in enumerate(SPECIAL_TOKENS)}

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] or [] -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def encode_turn(role: str, text: str) -> list[int]:
    """Token ids of one message, exactly as the chat template and the tokenizer make them."""
    return [SPECIAL_IDS[f"<|{role}|>"], *text.encode(), SPECIAL_IDS[END]]


def model_config() -> dict[str, Any]:
    """What config.json says."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_TOKENS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": SPECIAL_IDS[BOS],
        "eos_token_id": SPECIAL_IDS[END],
        "pad_token_id": SPECIAL_IDS[PAD],
    }


def write_files(folder: Path) -> None:
    """Write everything but the weights into `folder`, creating it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config()
    _write_json(folder / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # What it does has one right answer, and at a temperature of 1 it slips in one of twenty.
    sampling = {"do_sample": True, "temperature": 0.1}
    _write_json(folder / "generation_config.json", {**ids, **sampling})
    _tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())


def _byte_characters() -> list[str]:
    """Return the printable stand-in of each byte in a byte-level tokenizer.json.

    Source: the byte-level alphabet of GPT-2 that `tokenizers` uses: printable Latin-1 stands for
    itself, the others are moved to U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters, num_moved = [], 0
    for byte in range(NUM_BYTES):
        characters.append(chr(byte if byte in printable else 0x100 + num_moved))
        num_moved += byte not in printable
    return characters


def _tokenizer() -> Tokenizer:
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": MAX_TOKENS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
