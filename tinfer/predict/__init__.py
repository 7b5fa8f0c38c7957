"""How long an answer will be, said before it begins: predictors, and by which names they go."""

from __future__ import annotations
