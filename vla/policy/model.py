"""The vision-language-action policy: a backbone whose vocabulary carries the codec's symbols.

Two decodings (RT-2, Brohan et al. 2023 / OpenVLA, Kim et al. 2024, and OpenVLA-OFT, Kim et al. 2025):
    autoregressive   prefix, <act>, s_0 .. s_{N-2}  ->  s_0 .. s_{N-1}   causal over the action positions
    parallel         prefix, slot_0 .. slot_{N-1}   ->  s_0 .. s_{N-1}   one pass, bidirectional over them
The prefix (images, text, robot, state, end query) attends to itself in both directions, and never to the actions. An answer in
words (`vla/answers.py`) is a prefix whose last part is causal.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerFast

import vla
from vla.actions import ActionCodec
from vla.answers import Question
from vla.backbones import NanoVLM
from vla.batch import Batch, Encoder, Example, collate
from vla.embodiment import EmbodimentSpec
from vla.errors import CheckpointError, UsageError
from vla.normalize import Normalizer
from vla.policy.choose import Chooser
from vla.policy.config import Decode, PolicyConfig
from vla.policy.protocol import Chunk, Loss, LossWeights
from vla.prompt import PROMPTS
from vla.resample import chunk_steps, source_step, to_robot_steps
from vla.schema import Observation, Window


class VLAPolicy(nn.Module):
    """A vision-language model that speaks actions. See the module docstring for the sequence layout."""

    def __init__(
        self, config: PolicyConfig, model: NanoVLM, tokenizer: PreTrainedTokenizerFast,
        embodiments: dict[str, EmbodimentSpec], normalizers: dict[str, dict[str, Normalizer]], codec: ActionCodec,
        provenance: dict | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.model, self.tokenizer, self.codec = config, model, tokenizer, codec
        self.embodiments, self.normalizers = embodiments, normalizers
        self.saved_meaning: dict | None = None
        self.provenance = provenance or {}
        """Where the policy comes from: datasets, fingerprints, recorded seeds, instructions."""
        layout = {name: model.config.special_id(name) for name in ("image", "state", "end", "pad", "soft", "say", "eos")}
        self.encoder = Encoder(
            embodiments=embodiments, normalizers=normalizers, codec=codec, prompt=config.prompt, tokenize=_Tokenize(tokenizer),
            layout=layout | {"image_tokens": model.config.image_tokens, "soft_tokens": model.config.soft_tokens},
            image_size=model.config.image_size, horizon=config.chunk, action_dim=model.config.num_slots // config.chunk,
            state_dim=model.config.state_dim,
        )  # fmt: skip
        d = model.config.text_config.hidden_size
        self.end_head = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, self.encoder.state_dim))
        centres = codec.centres if codec.centres is not None else np.zeros(0, np.float32)
        self.centres: Tensor
        self.register_buffer("centres", torch.from_numpy(centres), persistent=False)

    def adopt(self, other: VLAPolicy) -> VLAPolicy:
        """Take over the heads of a policy of the same sizes; returns self."""
        self.end_head.load_state_dict(other.end_head.state_dict())
        return self.to(other.device).train(other.training)

    # ------------------------------------------------------------------------------------------------ learning

    def encode(self, window: Window | Question, augment: bool = False, seed: int = 0) -> Example:
        """Window or Question -> Example; with `augment`, images and state are varied as a function of (seed, window.n)."""
        return self.encoder.window(window, self.config.augment if augment else None, seed)

    def collate(self, examples: list[Example]) -> Batch:
        return collate(examples, self.encoder.layout["pad"])

    def forward(self, batch: Batch) -> Loss:
        """The losses, as sums and counts (DDP wraps `forward`, so this is it)."""
        hidden = self._hidden(batch)
        logits = self._symbol_logits(hidden[:, -batch.symbols.shape[1] :]).float()  # (B, N, K)
        valid = batch.valid.flatten(1)  # (B, N)
        log_p = logits.log_softmax(-1)
        if self.config.soft_sigma and self.codec.centres is not None:
            distance = (batch.unit.flatten(1)[..., None] - self.centres) / self.config.soft_sigma
            entropies = -(torch.softmax(-0.5 * distance.square(), -1) * log_p).sum(-1)
        else:
            entropies = -log_p.gather(-1, batch.symbols[..., None])[..., 0]
        end = self.end_head(hidden[:, -batch.symbols.shape[1] - 1]).float()  # (B, S)
        end_losses = F.smooth_l1_loss(end, batch.end, reduction="none", beta=0.1)
        said = batch.labels != -100
        if not len(batch.images):
            # No picture in this batch (questions in words alone): the tower still takes part, with nothing to learn, so
            # that every rank reduces the same gradients and a checkpoint knows every parameter's state.
            entropies = entropies + sum(0.0 * p.sum() for p in self.parameters() if p.requires_grad)
        words = F.cross_entropy(self._word_logits(hidden[:, : batch.ids.shape[1]][said]), batch.labels[said], reduction="sum")
        return Loss(
            action=(entropies * valid).sum(), action_count=valid.sum(),
            end=(end_losses * batch.end_valid).sum(), end_count=batch.end_valid.sum(),
            correct=((logits.argmax(-1) == batch.symbols) & valid).sum(), answer=words, answer_count=said.sum(),
        )  # fmt: skip

    @property
    def loss_weights(self) -> LossWeights:
        """Of the losses beside the actions'."""
        return LossWeights(self.config.end_weight, self.config.answer_weight)

    def loss(self, batch: Batch) -> Loss:
        """Same as calling the policy."""
        return self(batch)

    def action_logits(self, batch: Batch) -> Tensor:
        """(B, N, K). Autoregressive policies are teacher-forced with `batch.symbols`."""
        return self._symbol_logits(self._hidden(batch)[:, -batch.symbols.shape[1] :])

    def _hidden(self, batch: Batch) -> Tensor:
        """Last hidden states (B, T + N, d) of prefix and action positions."""
        B, N = batch.symbols.shape
        config = self.model.config
        if self.config.decoding == "parallel":
            tail = torch.arange(config.slot_ids.start, config.slot_ids.start + N, device=batch.ids.device).expand(B, N)
        else:
            start = torch.full((B, 1), config.special_id("act"), device=batch.ids.device)
            history = batch.symbols[:, :-1] + config.action_ids.start
            history = history.masked_fill(batch.hidden[:, :-1], config.special_id("act"))
            tail = torch.cat([start, history], dim=1)
        mask, positions = self._attention(batch, N)
        hidden = self.model.hidden(
            torch.cat([batch.ids, tail], dim=1), batch.images, batch.state, slots=batch.slots, robots=batch.robot,
            attention_mask=mask, position_ids=positions,
        ).last_hidden_state  # fmt: skip
        assert hidden is not None
        return hidden

    def _attention(self, batch: Batch, N: int) -> tuple[Tensor, Tensor]:
        """Additive mask (B, 1, T + N, T + N) and positions (B, T + N) for a batch's prefixes and N action positions."""
        prefix = batch.mask
        B, T = prefix.shape
        allowed = torch.zeros(B, T + N, T + N, dtype=torch.bool, device=prefix.device)
        earlier = torch.ones(T + N, T, dtype=torch.bool, device=prefix.device).tril()
        allowed[:, :, :T] = prefix[:, None, :] & (earlier | ~batch.causal[:, None, :])
        tail = torch.ones(N, N, dtype=torch.bool, device=prefix.device)
        allowed[:, T:, T:] = tail if self.config.decoding == "parallel" else tail.tril()
        positions = (prefix.cumsum(-1) - 1).clamp(min=0)
        after = positions[:, -1:] + 1 + torch.arange(N, device=prefix.device)
        return _additive(allowed, self._dtype), torch.cat([positions, after], dim=1)

    def _symbol_logits(self, hidden: Tensor) -> Tensor:
        """Only the rows of the head that are actions: a malformed chunk cannot be expressed."""
        ids = self.model.config.action_ids
        return F.linear(hidden, self.model.lm_head.weight[ids.start : ids.stop])

    def _word_logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., words), float: the rows of the head that are words or control ids, never an action."""
        return F.linear(hidden, self.model.lm_head.weight[: self.model.config.slot_ids.start]).float()

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    # ------------------------------------------------------------------------------------------------ acting

    @property
    def chunk(self) -> int:
        """H, in policy steps; see `steps` for a robot's own."""
        return self.config.chunk

    @property
    def execute(self) -> int:
        return self.config.execute

    def steps(self, embodiment: str) -> tuple[int, int]:
        """(steps of a chunk, steps carried out before looking again) at the control rate of `embodiment`."""
        config = self.config
        return chunk_steps(config.chunk_seconds, config.chunk, config.execute, self.embodiments[embodiment].control_hz)

    @property
    def decode(self) -> Decode:
        return self.config.decode

    @property
    def recorded_seeds(self) -> dict[str, dict[str, list[list[int]]]]:
        """suite -> task -> [first, last] ranges of every seed seen in training."""
        return self.provenance.get("recorded_seeds", {})

    @property
    def instructions(self) -> list[str]:
        """Every sentence of the training data."""
        return self.provenance.get("instructions", [])

    def act(self, observation: Observation, instruction: str, embodiment: str | None = None, **options: Any) -> Chunk:
        """One chunk for one observation. `embodiment` may be left out when the policy knows only one robot."""
        if embodiment is None:
            if len(self.embodiments) != 1:
                raise UsageError("act()", found="no embodiment", expected=f"one of {sorted(self.embodiments)}",
                                      fix="pass embodiment=...")  # fmt: skip
            embodiment = next(iter(self.embodiments))
        return self.act_batch([observation], [instruction], embodiment, **options)[0]

    @torch.inference_mode()
    def act_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], embodiment: str,
        decode: Decode | None = None, seeds: Sequence[int] | None = None, drop_state: bool = False,
    ) -> list[Chunk]:  # fmt: skip
        """Chunks for several observations of one kind of robot, at its own control rate.

        `decode` overrides the policy's own; `seeds` (one per observation, default 0, 1, ...) decide what "sample" draws.
        Raises `DataError` for an observation that does not fit the embodiment, `CheckpointError` for an unknown robot.
        """
        if embodiment not in self.embodiments:
            raise CheckpointError("act()", found=f"embodiment {embodiment!r}", expected=f"one of {sorted(self.embodiments)}",
                                  fix="use a policy trained on this robot")  # fmt: skip
        pairs = zip(observations, instructions, strict=True)
        batch = self.collate([self.encoder.observation(o, i, embodiment, drop_state) for o, i in pairs]).to(self.device)
        dims = self.embodiments[embodiment].action_dim
        choose = Chooser(decode or self.config.decode, self.codec, self.centres, range(len(batch)) if seeds is None else seeds)
        if self.config.decoding == "parallel":
            choose(self._symbol_logits(self._hidden(batch)[:, -batch.symbols.shape[1] :]))
        else:
            self._decode_steps(batch, choose, dims)
        normalizer = self.normalizers[embodiment]["action"]
        shape = (len(batch), self.chunk, self.encoder.action_dim)
        unit, confidence, symbols = (np.concatenate(part, axis=1).reshape(shape)[..., :dims] for part in choose.parts)
        actions, spec, (n, _) = normalizer.from_unit(unit), self.embodiments[embodiment], self.steps(embodiment)
        held = source_step(n, self.chunk)
        return [Chunk(to_robot_steps(actions[i], n, spec), confidence[i][held].astype(np.float32), symbols[i][held])
                for i in range(len(batch))]  # fmt: skip

    @torch.inference_mode()
    def answer(self, image: np.ndarray | None, question: str, most: int = 64) -> str:
        """What the policy says to a question about a picture ((h, w, 3) uint8, or none), greedily, at most `most` tokens."""
        said: list[int] = []
        layout = self.encoder.layout
        example = self.encoder.question(Question(image, question, ""))
        while len(said) < most:
            ids = np.concatenate([example.ids, np.array(said, np.int64)])
            causal = np.concatenate([example.causal, np.ones(len(said), bool)])
            grown = replace(example, ids=ids, causal=causal, labels=np.full(len(ids), -100, np.int64))
            hidden = self._hidden(self.collate([grown]).to(self.device))
            word = int(self._word_logits(hidden[:, len(ids) - 1])[0].argmax())
            if word == layout["eos"]:
                break
            said.append(word)
        return str(self.tokenizer.decode([i for i in said if i < self.model.config.text_vocab_size])).strip()

    def _decode_steps(self, batch: Batch, choose: Chooser, dims: int) -> None:
        """Constrained greedy (or sampled) decoding: the prefix once, then one symbol at a time over a cache.

        `dims` is the robot's own number of action dimensions, at most A.
        """
        A, zero = self.encoder.action_dim, int(self.codec.encode(np.zeros((1, 1)))[0])
        B, N = batch.symbols.shape
        T = batch.ids.shape[1]
        config = self.model.config
        mask, positions = self._attention(batch, N)
        cache = DynamicCache(config=config.text_config)
        self.model.hidden(
            batch.ids, batch.images, batch.state, slots=batch.slots, robots=batch.robot, attention_mask=mask[:, :, :T, :T],
            position_ids=positions[:, :T], past_key_values=cache, use_cache=True,
        )  # fmt: skip
        ids = torch.full((B, 1), config.special_id("act"), device=batch.ids.device)
        for i in range(N):
            hidden = self.model.hidden(
                ids, attention_mask=mask[:, :, T + i : T + i + 1, : T + i + 1], position_ids=positions[:, T + i : T + i + 1],
                past_key_values=cache, use_cache=True,
            ).last_hidden_state  # fmt: skip
            symbols = choose(self._symbol_logits(hidden))
            if i % A >= dims:  # training fed a padded dimension's zero here, so acting does too
                symbols = torch.full_like(symbols, zero)
            ids = symbols + config.action_ids.start

    # ------------------------------------------------------------------------------------------------ identity

    def describe(self) -> dict:
        """The content of `policy.json`: everything but weights and tokenizer."""
        return {
            "format": 1,
            "config": self.config.model_dump(mode="json"),
            "embodiments": {k: v.model_dump(mode="json") for k, v in self.embodiments.items()},
            "normalizers": {k: {part: n.to_json() for part, n in v.items()} for k, v in self.normalizers.items()},
            "codec": self.codec.to_json(),
            "prompt": {"version": self.config.prompt, "template": PROMPTS[self.config.prompt]},
            "image": {"size": self.encoder.image_size, "resize": "bilinear, antialiased", "layout": "RGB in [-1, 1]"},
            "provenance": self.provenance,
            "versions": {"tendon-vla": vla.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                         "python": platform.python_version()},
        }  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """sha256 over weights, tokenizer and meaning (`describe()` without versions): equal ones act alike.

        A loaded policy keeps the meaning it was saved with, so a later version with more settings does not disown it.
        """
        return self.fingerprint_with(self.saved_meaning or self.describe())

    def fingerprint_with(self, meaning: dict) -> str:
        """The fingerprint of these weights under the `meaning` of a `policy.json`."""
        digest = hashlib.sha256()
        kept = {k: v for k, v in meaning.items() if k not in ("versions", "fingerprint")}
        digest.update(json.dumps(kept, sort_keys=True).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class _Tokenize:
    """Text -> ids without special tokens; a class, because loader workers must pickle it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, T) bool -> (B, 1, T, T) 0 or a very negative number (finite: a padded row stays free of NaN)."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -1e9)[:, None]
