"""Train the built-in model: seeded, resumable, on CPU cores, on conversations made as it goes.

    python -m tinfer.tiny_model.train --work DIR [--out FOLDER]

Every step's batch follows from the seed and the step's number alone, and the weights, the optimizer
states and the number of steps done are saved now and then, so that an interrupted run goes on where
it stopped. transformers' own Llama is what is trained; the matrices of its layers with Muon, the
embedding, the head and the norms with AdamW (both from torch.optim).

Checkpoints are safetensors files: nothing here is pickled.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tinfer.tiny_model import attention, files, tasks
from tinfer.tiny_model.precision import HAS_FAST_BFLOAT16, orthogonalize_in_float32
from tinfer.tiny_model.words import SYSTEM_PROMPTS

SEED = 20
NUM_STEPS = 8800
TOKENS_PER_STEP = 6144
MAX_CONVERSATION_TOKENS = 1024
# Steps whose conversations are drawn together and sorted by length, so that little is padding.
STEPS_PER_POOL = 16
# Found by short runs of this script; Muon's is per matrix, scaled to the RMS of an AdamW update.
MUON_LR = 8e-3
ADAMW_LR = 3e-3
WARMUP_STEPS = 50
# The learning rate comes down four times: the factor it stays at, until which step, and the step
# at which it has come down to zero. Copying is learnt while the rate is high, exactness only as it
# falls.
DESCENTS = ((1.0, 1500, 3000), (0.3, 3000, 4000), (0.5, 6400, 8000), (0.5, 8300, 8800))
# After the first, every answer counts by the root of its length, and its end thrice: otherwise a
# sum of two digits hardly counts beside a hundred numbers in a row, nor does stopping at the right
# place. After the second, the tasks that lag behind are drawn more often.
WEIGHTED_FROM = 3000
END_WEIGHT = 3.0
EVEN_MIX_FROM = 4000
WEIGHT_DECAY = 0.02
SAVE_EVERY_STEPS = 100
IGNORED = -100  # label of tokens without a loss; Source: torch.nn.functional.cross_entropy

Conversation = tuple[list[int], list[int]]


def conversation(rng: random.Random, mix: tasks.Mix = tasks.COPYING_FIRST) -> Conversation:
    """Token ids and labels of one conversation: a loss on every token of the answers, the end
    token included, and on nothing else."""
    ids: list[int] = []
    labels: list[int] = []
    if rng.random() < 0.2:
        ids += files.encode_turn("system", rng.choice(SYSTEM_PROMPTS))
        labels += [IGNORED] * len(ids)
    for _ in range(rng.choice((1, 1, 1, 1, 1, 2, 2, 3, 5))):
        example = tasks.draw(rng, mix=mix)
        asked = files.encode_turn("user", example.prompt)
        answered = files.encode_turn("assistant", example.answer)
        if ids and len(ids) + len(asked) + len(answered) > MAX_CONVERSATION_TOKENS:
            break
        ids += asked + answered
        labels += [IGNORED] * (len(asked) + 1) + answered[1:]
    return ids, labels


def batches(pool: int) -> list[list[Conversation]]:
    """The batches of one pool of steps, in their order; the same for the same number."""
    rng = random.Random(f"{SEED} pool {pool}")
    is_late = pool * STEPS_PER_POOL >= EVEN_MIX_FROM
    mix = tasks.EVEN_MIX if is_late else tasks.COPYING_FIRST
    drawn: list[Conversation] = []
    num_tokens = 0
    while num_tokens < STEPS_PER_POOL * TOKENS_PER_STEP:
        drawn.append(conversation(rng, mix))
        num_tokens += len(drawn[-1][0])
    drawn.sort(key=lambda one: len(one[0]))
    cut: list[list[Conversation]] = [[] for _ in range(STEPS_PER_POOL)]
    filled = 0
    for one in drawn:
        cut[filled * STEPS_PER_POOL // num_tokens].append(one)
        filled += len(one[0])
    rng.shuffle(cut)
    return cut


def batch_of(step: int) -> list[Conversation]:
    """The conversations of one step."""
    return batches(step // STEPS_PER_POOL)[step % STEPS_PER_POOL]


def weights_of(labels: list[int]) -> list[float]:
    """The weight of each token's loss from `WEIGHTED_FROM` on; 0 where there is no loss."""
    weights = [0.0] * len(labels)
    start = 0
    for position, label in enumerate(labels):
        if label == IGNORED:
            start = position + 1
        elif label == files.SPECIAL_IDS[files.END]:
            length = position + 1 - start
            weights[start : position + 1] = [length**-0.5] * length
            weights[position] *= END_WEIGHT
    return weights


def padded(batch: list[Conversation]) -> tuple[Tensor, Tensor]:
    """`[num_conversations, longest]` int64 ids and labels. Padding stands on the right, where a
    causal model needs no mask for it."""
    longest = max(len(ids) for ids, _ in batch)
    pad = files.SPECIAL_IDS[files.PAD]
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch])
    labels = torch.tensor([own + [IGNORED] * (longest - len(own)) for _, own in batch])
    return ids, labels


def learning_rate(step: int) -> float:
    """The factor of the learning rates: up in a line, then level and down in a parabola to zero,
    as often as `DESCENTS` says. A parabola, so that most of each way down is spent at low rates."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    for peak, start, end in DESCENTS:
        if step < end:
            return warm * peak * min(1.0, (end - step) / (end - start)) ** 2
    return 0.0


class Trainer:
    """The model, its two optimizers, and where they are saved."""

    def __init__(self, num_steps: int) -> None:
        torch.manual_seed(SEED)
        orthogonalize_in_float32()
        self.num_steps = num_steps
        self.step = 0
        config = LlamaConfig(**{**files.model_config(), "torch_dtype": "float32"})
        config._attn_implementation = attention.NAME
        self.model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
        self.model.train()
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
            in_layer = ".layers." in name and parameter.ndim == 2
            (matrices if in_layer else others).append(parameter)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=ADAMW_LR, weight_decay=0.0, betas=(0.9, 0.98)),
        ]
        self._full_rates = [MUON_LR, ADAMW_LR]

    def train_step(self, batch: list[Conversation]) -> float:
        """One update; returns the mean loss per answer token, in nats, without weights."""
        ids, labels = padded(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=HAS_FAST_BFLOAT16):
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            targets = labels[:, 1:]
            counted = targets != IGNORED
            logits = self.model.lm_head(hidden[counted])
        losses = functional.cross_entropy(logits.float(), targets[counted], reduction="none")
        loss = losses.mean()
        if self.step >= WEIGHTED_FROM:
            weights = torch.tensor([w for _, own in batch for w in weights_of(own) if w])
            loss = (losses * weights).sum() / weights.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = learning_rate(self.step)
        for optimizer, full in zip(self.optimizers, self._full_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return losses.mean().item()

    def save(self, path: Path) -> None:
        """Write a checkpoint; the one before stays until this one is whole."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                for key, value in state.items():
                    tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        fresh = path.with_suffix(".new")
        save_file(tensors, fresh, {"step": str(self.step), "num_steps": str(self.num_steps)})
        os.replace(fresh, path)

    def load(self, path: Path, step: int) -> None:
        """Go on from a checkpoint that `save` wrote."""
        tensors = load_file(path)
        prefix = "model."
        self.model.load_state_dict(
            {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
        )
        for number, optimizer in enumerate(self.optimizers):
            whole = optimizer.state_dict()
            for name, value in tensors.items():
                if name.startswith(f"optimizer.{number}."):
                    index, key = name.split(".")[2:]
                    whole["state"].setdefault(int(index), {})[key] = value
            optimizer.load_state_dict(whole)
        self.step = step

    def export(self, folder: Path) -> None:
        """Write the model in Hugging Face's format, weights in bfloat16."""
        files.write_files(folder)
        weights = {k: v.to(torch.bfloat16).contiguous() for k, v in self.model.state_dict().items()}
        path = folder / "model.safetensors"
        save_file(weights, path, {"format": "pt"})
        path.chmod(0o644)  # safetensors makes it private, and it is for every user of the package


def checkpoint_step(path: Path) -> int:
    """How many steps a checkpoint has behind it."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(header["__metadata__"]["step"])


def steps(trainer: Trainer) -> Iterator[tuple[int, list[Conversation]]]:
    """Every step that is still to be done, with its conversations."""
    pool = -1
    for step in range(trainer.step, trainer.num_steps):
        if step // STEPS_PER_POOL != pool:
            pool = step // STEPS_PER_POOL
            cut = batches(pool)
        yield step, cut[step % STEPS_PER_POOL]


def train(work: Path, out: Path, num_steps: int) -> None:
    """Train to the end, or go on from the checkpoint in `work`, and write the model into `out`."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint.safetensors"
    trainer = Trainer(num_steps)
    if checkpoint.exists():
        trainer.load(checkpoint, checkpoint_step(checkpoint))
    started, losses, num_tokens = time.monotonic(), [], 0
    with (work / "log.jsonl").open("a") as record:
        for step, batch in steps(trainer):
            losses.append(trainer.train_step(batch))
            num_tokens += sum(len(ids) for ids, _ in batch)
            if (step + 1) % 20 == 0:
                line = {
                    "step": step + 1,
                    "loss": round(math.fsum(losses) / len(losses), 4),
                    "seconds": round(time.monotonic() - started, 1),
                    "tokens": num_tokens,
                }
                losses.clear()
                record.write(json.dumps(line) + "\n")
                record.flush()
                sys.stderr.write(json.dumps(line) + "\n")
            if (step + 1) % SAVE_EVERY_STEPS == 0:
                trainer.save(checkpoint)
                trainer.export(out)
    trainer.save(checkpoint)
    trainer.export(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train tinfer's built-in model.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "model",
        help="folder of the model (default: the one that is shipped)",
    )
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="updates in all")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="OpenMP threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.work, arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
