"""How much of everything a client may send: the numbers, and where each comes from.

Those of one endpoint or server, which a start can set, are in `ApiOptions`. What is over a limit is
refused before anything is computed: 400 with the field's name, 413 for the body, 431 for the head,
408 for what comes too slowly, 429 where the place is taken by others.
"""

from __future__ import annotations

# --- sampling -------------------------------------------------------------------------------------

MAX_N = 16384  # Source: vLLM VLLM_MAX_N_SEQUENCES default
MAX_STOP_STRINGS = 4  # Source: vLLM VLLM_MAX_STOP_STRINGS default
# vLLM has no bound. As much text as the longest stop string has is held back from a stream.
MAX_STOP_CHARS = 1024
MAX_BAD_WORDS = 128  # Source: vLLM VLLM_MAX_NUM_BAD_WORDS default
# vLLM counts their tokens (VLLM_MAX_BAD_WORDS_TOTAL_TOKENS, 1024), which has to be done first.
MAX_BAD_WORD_CHARS = 1024
MAX_LOGIT_BIAS = 100.0  # Source: OpenAI, and vLLM, which clamps to it
# Both are a row of a tensor in every step; vLLM has no bound, OpenAI allows a few hundred.
MAX_LOGIT_BIAS_ENTRIES = 1024
MAX_STOP_TOKEN_IDS = 1024
# It comes back in every chunk of a stream.
MAX_REQUEST_ID_CHARS = 256
# Of a response, which repeats it. Source: OpenAI.
MAX_METADATA_ENTRIES = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# As far as the bins of lengths reach (tinfer/predict/curves.py); longer than any model's context.
MAX_EXPECTED_TOKENS = 1 << 20
MAX_DEADLINE_MS = 24 * 3600 * 1000

# --- grammars -------------------------------------------------------------------------------------

# Source: vLLM MAX_STRUCTURED_OUTPUT_JSON_NESTING and STRUCTURAL_TAG_WRAPPER_NESTING
MAX_SCHEMA_DEPTH = 64
MAX_TAG_DEPTH = MAX_SCHEMA_DEPTH + 16
# A worker reads a grammar between two steps: 50 ms for a schema of 64 KB, in xgrammar 0.2.8 on one
# AMD EPYC core (November 2026). Compiling it takes ten times that, on a thread beside the steps.
MAX_GRAMMAR_BYTES = 64 << 10
MAX_REGEX_BYTES = 8 << 10
MAX_CHOICES = 4096
MAX_WHITESPACE_PATTERN_BYTES = 256

# --- HTTP -----------------------------------------------------------------------------------------

# A body has at most that many objects and arrays inside each other: room for the deepest structural
# tag, and far from where the recursion of whatever reads it afterwards would end.
MAX_JSON_DEPTH = 128
MAX_BODY_BYTES = 32 << 20
# Of all bodies together that are on their way: 32 of the largest size.
MAX_ARRIVING_BYTES = 1 << 30
# Of the request line, and of a header with its name. Source: aiohttp's defaults, nginx's 8k.
MAX_HEADER_BYTES = 8190
MAX_HEADERS = 128  # Source: aiohttp's default; vLLM's is 256
# How long a connection may be open without a whole request head. Longer than proxies and clients
# keep theirs (nginx 60 s, load balancers 60 s, httpx 5 s), so that they close first.
KEEP_ALIVE_S = 75.0
# From the head of a request to the end of its body. Source: nginx client_body_timeout, which counts
# between two reads only.
BODY_TIMEOUT_S = 60.0
# After an answer to a request whose body was not read: what still comes is thrown away meanwhile.
LINGER_S = 5.0
