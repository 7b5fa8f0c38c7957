"""Tensor parallelism within a worker: one engine, several processes ("ranks") that share its model.

The worker's process schedules; each rank computes its part of every layer, keeps its part of every
KV block in memory of its own, and pulls from the rank of the same number at a peer. The package
owns two invariants: no rank outlives its worker, and nothing that the processes name in the file
system outlives them.
"""
