"""The small model that tinfer ships: files in `MODEL_DIR`, its tasks, and how it was trained."""

from pathlib import Path

# Config, tokenizer and weights in Hugging Face's format; read-only, as package data is.
MODEL_DIR = Path(__file__).parent / "model"
