"""Make the tiny Llama model that the tests and examples serve: seeded, in well under a second.

A model with the usual small initialisation answers every prompt with one constant token, and a
server that loses, repeats or mixes up KV blocks would pass with it. So the weights here are large
(embedding std 1.0, head std 0.3, layers std 0.2): every token depends on the whole prompt.

The tokenizer has one token per byte and a few special ones, without merges. Bytes that cannot stand
in UTF-8 text, control characters and special tokens get small rows in the output head: greedy
output then reads as characters, some of several bytes, and rarely ends by itself.

numpy, safetensors and tokenizers only: importing this costs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import TensorSpec, serialize_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SEED = 20
NUM_LAYERS = 4
HIDDEN_SIZE = 128
INTERMEDIATE_SIZE = 256
NUM_HEADS = 4
NUM_KV_HEADS = 2  # two, so that tensor parallelism of 2 splits them
HEAD_DIM = 32  # Source: the smallest head size that vLLM's CPU attention takes
MAX_TOKENS = 32768
EMBEDDING_STD = 1.0
HEAD_STD = 0.3
WEIGHT_STD = 0.2
# Rows of tokens that text should hardly ever contain; 0.05 keeps them possible when sampling.
RARE_HEAD_STD = 0.05

NUM_BYTES = 256
END, PAD, BOS = "<|end|>", "<|pad|>", "<|bos|>"
ROLES = ("system", "user", "assistant", "tool")
# An even number, so that the vocabulary of 264 splits over 2, 4 or 8 ranks.
SPECIAL_TOKENS = (END, PAD, BOS, *(f"<|{role}|>" for role in ROLES), "<|reserved|>")
VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)

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

Weights = dict[str, NDArray[np.float32]]


def ensure_tiny_model(cache_dir: Path | None = None) -> Path:
    """Return the folder of the tiny model, made on first use below `cache_dir`.

    The default is $XDG_CACHE_HOME/tinfer or ~/.cache/tinfer. The folder's name holds a hash of this
    file, so a changed script makes another folder; processes that make it at once agree on one.
    """
    if cache_dir is None:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        cache_dir = Path(cache) / "tinfer"
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    final = cache_dir / f"tiny-{digest}"
    if final.is_dir():
        return final
    cache_dir.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="tiny-unfinished-", dir=cache_dir))
    try:
        make_tiny_model(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(final)
    except OSError:
        if not final.is_dir():  # otherwise another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return final


def make_tiny_model(folder: Path) -> None:
    """Write config, weights (bfloat16) and tokenizer into `folder`, creating it."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _model_config())
    ids = _special_ids()
    generation = {"bos_token_id": ids[BOS], "eos_token_id": ids[END], "pad_token_id": ids[PAD]}
    _write_json(folder / "generation_config.json", generation)
    # The specs hold bare addresses: `rounded` has to outlive the write.
    rounded = {name: to_bfloat16(values) for name, values in _weights().items()}
    specs = {
        name: TensorSpec(
            dtype="bfloat16", shape=bits.shape, data_ptr=bits.ctypes.data, data_len=bits.nbytes
        )
        for name, bits in rounded.items()
    }
    serialize_file(specs, str(folder / "model.safetensors"), {"format": "pt"})
    _tokenizer().save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config())


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even, as its 16 bits; no NaN or infinity."""
    bits = values.view(np.uint32)
    bias = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + bias) >> np.uint32(16)).astype(np.uint16)


def _special_ids() -> dict[str, int]:
    return {token: NUM_BYTES + index for index, token in enumerate(SPECIAL_TOKENS)}


def _model_config() -> dict[str, Any]:
    ids = _special_ids()
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
        "bos_token_id": ids[BOS],
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }


def _weights() -> Weights:
    """Return every tensor by its Hugging Face name, `[out, in]` as in torch.nn.Linear."""
    # RandomState: numpy promises that its streams never change, for Generator it does not.
    random = np.random.RandomState(SEED)

    def normal(std: float, *shape: int) -> NDArray[np.float32]:
        return (random.standard_normal(shape) * std).astype(np.float32)

    ones = np.ones(HIDDEN_SIZE, np.float32)
    query_size, kv_size = NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM
    weights: Weights = {"model.embed_tokens.weight": normal(EMBEDDING_STD, VOCAB_SIZE, HIDDEN_SIZE)}
    for layer in range(NUM_LAYERS):
        for name, shape in (
            ("self_attn.q_proj", (query_size, HIDDEN_SIZE)),
            ("self_attn.k_proj", (kv_size, HIDDEN_SIZE)),
            ("self_attn.v_proj", (kv_size, HIDDEN_SIZE)),
            ("self_attn.o_proj", (HIDDEN_SIZE, query_size)),
            ("mlp.gate_proj", (INTERMEDIATE_SIZE, HIDDEN_SIZE)),
            ("mlp.up_proj", (INTERMEDIATE_SIZE, HIDDEN_SIZE)),
            ("mlp.down_proj", (HIDDEN_SIZE, INTERMEDIATE_SIZE)),
        ):
            weights[f"model.layers.{layer}.{name}.weight"] = normal(WEIGHT_STD, *shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = ones
    weights["model.norm.weight"] = ones
    head = normal(HEAD_STD, VOCAB_SIZE, HIDDEN_SIZE)
    head[_rare_ids()] *= RARE_HEAD_STD / HEAD_STD
    weights["lm_head.weight"] = head
    return weights


def _rare_ids() -> list[int]:
    """Token ids that readable text does without: control bytes, bytes never in UTF-8, specials."""
    control = [byte for byte in range(0x20) if byte != ord("\n")] + [0x7F]
    # Also left out: leads of three and four bytes, which random continuations rarely complete.
    never = [0xC0, 0xC1, *range(0xE0, 0x100)]
    return control + never + list(range(NUM_BYTES, VOCAB_SIZE))


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


def main() -> None:
    """Make the model in the folder named on the command line, or in the cache; print the path."""
    if len(sys.argv) > 2:
        sys.exit("usage: python -m tinfer.tiny_model.make [DIR]")
    if len(sys.argv) == 2:
        folder = Path(sys.argv[1])
        make_tiny_model(folder)
    else:
        folder = ensure_tiny_model()
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
