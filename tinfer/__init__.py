"""tinfer: one command turns one multi-GPU box into a disaggregated LLM server."""

__version__ = "0.1.0"
