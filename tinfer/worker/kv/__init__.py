"""The KV hand-off: how a decode worker takes blocks straight out of a prefill worker's memory.

Step 6 of a request's life. The prefill side exports its one KV buffer and holds blocks under a
lease (`lease`); the decode side maps that buffer once per peer (`transport`), copies the blocks it
lacks (`geometry` says where they lie, `puller` drives the copy) and marks the lease done.
The package owns one invariant: a pull reports success only if the lease was valid both before and
after the copy, so a block that was reused in between is a failed load and never garbage.
Nothing here imports vllm; `geometry`, `lease` and `shm` do not import torch either.
"""
