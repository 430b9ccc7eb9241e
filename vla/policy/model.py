"""The vision-language-action policy: a backbone whose vocabulary carries the codec's symbols.

Two decodings (RT-2, Brohan et al. 2023 / OpenVLA, Kim et al. 2024, and OpenVLA-OFT, Kim et al. 2025):
    autoregressive   prefix, <act>, s_0 .. s_{N-2}  ->  s_0 .. s_{N-1}   causal over the action positions
    parallel         prefix, slot_0 .. slot_{N-1}   ->  s_0 .. s_{N-1}   one pass, bidirectional over them
How the prefix (images, text, robot, state, end query) attends to itself is the backbone's own way; the action positions read
all of it. An answer in words (`vla/answers.py`) is a prefix whose last part is causal. Symbols become actions by probabilities
over the codec's bins, by what a whole sequence of them says (FAST, VQ), or, with `head: l1`, hidden states become numbers.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import vla
from vla.actions import ActionCodec, is_sequence
from vla.answers import Question
from vla.backbones import Writer
from vla.batch import Batch, Encoder, Example, collate
from vla.embodiment import EmbodimentSpec
from vla.errors import CheckpointError, UsageError
from vla.normalize import Normalizer
from vla.policy.choose import Chosen, chooser
from vla.policy.config import Decode, PolicyConfig
from vla.policy.decoding import decode_parallel, decode_steps
from vla.policy.heads import EndHead, L1Head
from vla.policy.lesson import Lesson
from vla.policy.protocol import Chunk, Loss, LossWeights
from vla.policy.sizes import room_for
from vla.policy.words import say, score
from vla.prompt import PROMPTS
from vla.resample import chunk_steps, source_step, to_robot_steps
from vla.schema import Observation, Window

_RIGHT = 0.02  # an L1 head's number this near the true one counts as right in `token_accuracy`: what 100 bins could tell


class VLAPolicy(nn.Module):
    """A vision-language model that speaks actions. See the module docstring for the sequence layout."""

    def __init__(
        self, config: PolicyConfig, model: Any, writer: Writer, embodiments: dict[str, EmbodimentSpec],
        normalizers: dict[str, dict[str, Normalizer]], codec: ActionCodec, provenance: dict | None = None,
    ) -> None:  # fmt: skip
        """`model` is a `vla.backbones.Backbone`, `writer` its own. Raises `UsageError` when it cannot decode as asked."""
        super().__init__()
        if config.decoding == "parallel" and model.no_parallel:
            raise UsageError("policy.decoding", found="parallel", expected=f"autoregressive: {model.no_parallel}",
                             fix="policy.decoding=autoregressive, or another backbone")  # fmt: skip
        self.config, self.model, self.writer, self.codec = config, model, writer, codec
        self.embodiments, self.normalizers = embodiments, normalizers
        self.saved_meaning: dict | None = None
        self.adapter: Any = None
        """`vla.policy.adapters.Adapter` when only a part of the weights is this policy's own."""
        self.shares_base = False
        """Whether the rest of them are other policies' too (`vla/policy/sharing.py`)."""
        self.lesson: Lesson | None = None
        """What it learns from a teacher, while it does (`vla/distill/`); not a part of what is saved."""
        self.provenance = provenance or {}
        """Where the policy comes from: datasets, fingerprints, recorded seeds, instructions."""
        sequence = is_sequence(codec)
        room = room_for("action", config.action_dim, embodiments) if sequence else model.num_slots // config.chunk
        self.encoder = Encoder(
            embodiments=embodiments, normalizers=normalizers, codec=codec, writer=writer, prompt=config.prompt,
            horizon=config.chunk, slots=model.num_slots, state_dim=model.state_dim, action_dim=room,
        )  # fmt: skip
        self.end_head = EndHead(model.hidden_size, self.encoder.state_dim) if config.end_weight else None
        self.l1_head = L1Head(model.hidden_size, self.encoder.action_dim) if config.head == "l1" else None
        centres = codec.centres if codec.centres is not None else np.zeros(0, np.float32)
        self.centres: Tensor
        self.register_buffer("centres", torch.from_numpy(centres), persistent=False)

    @property
    def heads(self) -> nn.ModuleDict:
        """What is learned beside the backbone."""
        found = {"end": self.end_head, "l1": self.l1_head}
        return nn.ModuleDict({name: head for name, head in found.items() if head is not None})

    def adopt(self, other: VLAPolicy) -> VLAPolicy:
        """Take over the heads of a policy of the same sizes; returns self."""
        self.heads.load_state_dict(other.heads.state_dict())
        return self.to(other.device).train(other.training)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> VLAPolicy:
        """`vla.policy.load_policy` by the name Hugging Face gave such functions: a folder, a run, or `user/name[@revision]`."""
        from vla.policy.folder import load_policy

        return load_policy(name, **options)

    # ------------------------------------------------------------------------------------------------ learning

    def encode(self, window: Window | Question, augment: bool = False, seed: int = 0) -> Example:
        """Window or Question -> Example; with `augment`, images and state are varied as a function of (seed, window.n)."""
        return self.encoder.window(window, self.config.augment if augment else None, seed)

    def collate(self, examples: list[Example]) -> Batch:
        return collate(examples, self.writer.ids.pad, self.narrows)

    @property
    def narrows(self) -> bool:
        """Whether action positions that no robot of a batch has can be left out. Nothing reads them then; not so where the words
        before attend to every position (OFT), where layers convolve, where numbers are read off all of a step's at once, where
        one follows another, or where a symbol is not one dimension's."""
        return (self.config.decoding == "parallel" and self.l1_head is None and self.model.attention_only
                and not self.model.prefix_reads_tail and not is_sequence(self.codec))  # fmt: skip

    def positions_of(self, batch: Batch) -> Tensor:
        """(N,): where the action positions of a batch stand among the H * A of the policy's widest robot."""
        A, a = self.encoder.action_dim, batch.unit.shape[-1]
        step = torch.arange(batch.unit.shape[1], device=batch.ids.device)
        return (step[:, None] * A + torch.arange(a, device=batch.ids.device)).flatten()

    def tail_of(self, batch: Batch) -> Tensor:
        """(M,): the ids at the action positions of a parallel pass."""
        tail = torch.tensor(self.model.parallel_tail(self.model.num_slots), device=batch.ids.device)
        return tail[self.positions_of(batch)] if self.narrows else tail

    def forward(self, batch: Batch) -> Loss:
        """The losses, as sums and counts (DDP wraps `forward`, so this is it)."""
        output, T = self.output(batch), batch.ids.shape[1]
        hidden: Tensor = output.last_hidden_state
        acts = hidden[:, T : T + batch.symbols.shape[1]]
        valid = batch.said  # (B, N)
        if self.l1_head is not None:
            wrong = (self.l1_head(acts).float() - batch.unit).abs().flatten(1)
            action, right = (wrong * valid).sum(), wrong < _RIGHT
        else:
            logits = self.model.symbol_logits(acts).float()  # (B, N, K)
            entropies, right = self._entropies(logits, batch), logits.argmax(-1) == batch.symbols
            if self.lesson is not None:
                entropies = self.lesson(logits, batch, entropies, self.centres, output)
            action = (entropies * valid).sum()
        end, end_count = action.new_zeros(()), batch.end_valid.sum()
        if self.end_head is not None:
            told = self.end_head(hidden[:, T - 1]).float()  # (B, S)
            end = (F.smooth_l1_loss(told, batch.end, reduction="none", beta=0.1) * batch.end_valid).sum()
        said = batch.labels != -100
        words = action.new_zeros(())
        if said.any():
            words = F.cross_entropy(self.model.word_logits(hidden[:, :T][said]), batch.labels[said], reduction="sum")
        if not len(batch.images) or self._has_idle_parts:
            # Not every part takes part in every batch (questions in words alone have no picture): it is added with nothing
            # to learn, so that every rank reduces the same gradients and a checkpoint knows every parameter's state.
            action = action + sum(0.0 * p.sum() for p in self.parameters() if p.requires_grad)
        return Loss(
            action=action, action_count=valid.sum(), end=end, end_count=end_count, correct=(right & valid).sum(),
            answer=words, answer_count=said.sum(),
        )  # fmt: skip

    @property
    def _has_idle_parts(self) -> bool:
        """Whether weights may lie outside what a batch uses: foreign models bring pooling heads and last blocks nobody reads."""
        return self.config.backbone.kind not in ("nano", "student") or self.config.state == "none" or self.l1_head is not None

    def _entropies(self, logits: Tensor, batch: Batch) -> Tensor:
        """(B, N, K) -> (B, N): against the true symbol, or a Gaussian over the bins around the true action."""
        log_p = logits.log_softmax(-1)
        if self.config.soft_sigma and self.codec.centres is not None:
            distance = (batch.unit.flatten(1)[..., None] - self.centres) / self.config.soft_sigma
            return -(torch.softmax(-0.5 * distance.square(), -1) * log_p).sum(-1)
        return -log_p.gather(-1, batch.symbols[..., None])[..., 0]

    @property
    def loss_weights(self) -> LossWeights:
        """Of the losses beside the actions'."""
        return LossWeights(self.config.end_weight, self.config.answer_weight)

    def loss(self, batch: Batch) -> Loss:
        """Same as calling the policy."""
        return self(batch)

    def action_logits(self, batch: Batch) -> Tensor:
        """(B, N, K). Autoregressive policies are teacher-forced with `batch.symbols`."""
        return self.model.symbol_logits(self.acts(batch))

    def acts(self, batch: Batch) -> Tensor:
        """Hidden states (B, N, d) from which the symbols are read."""
        T = batch.ids.shape[1]
        return self._hidden(batch)[:, T : T + batch.symbols.shape[1]]

    def _hidden(self, batch: Batch) -> Tensor:
        """Last hidden states (B, T + M, d) of prefix and action positions; symbols are read at the first N of those."""
        return self.output(batch).last_hidden_state

    def output(self, batch: Batch) -> Any:
        """What the backbone says of a batch: `last_hidden_state` as `_hidden` returns it, and what else it has (a student's
        `sentence` and `seen`)."""
        B, N = batch.symbols.shape
        ids = self.writer.ids
        if self.config.decoding == "parallel":
            tail = self.tail_of(batch).expand(B, -1)
        else:
            start = torch.full((B, 1), ids.act, device=batch.ids.device)
            history = ids.of_symbols(batch.symbols[:, :-1]).masked_fill(batch.hidden[:, :-1], ids.act)
            tail = torch.cat([start, history], dim=1)
        mask, positions = self.attention(batch, tail.shape[1])
        return self.model.hidden(
            torch.cat([batch.ids, tail], dim=1), batch.images, batch.state, slots=batch.slots, robots=batch.robot,
            attention_mask=mask, position_ids=positions,
        )  # fmt: skip

    def attention(self, batch: Batch, M: int) -> tuple[Tensor, Tensor]:
        """Additive mask (B, 1, T + M, T + M) and positions for a batch's prefixes and M action positions."""
        prefix, parallel = batch.mask, self.config.decoding == "parallel"
        B, T = prefix.shape
        allowed = torch.zeros(B, T + M, T + M, dtype=torch.bool, device=prefix.device)
        allowed[:, :T, :T], positions = self.model.prefix_attention(batch.ids, prefix, batch.causal)
        allowed[:, T:, :T] = prefix[:, None, :]
        tail = torch.ones(M, M, dtype=torch.bool, device=prefix.device)
        if self.narrows:
            there = torch.arange(M, device=prefix.device) % batch.unit.shape[-1] < batch.dims[:, None]
            allowed[:, T:, T:] = there[:, None]
        else:
            allowed[:, T:, T:] = tail if parallel else tail.tril()
        if parallel and self.model.prefix_reads_tail:
            full = torch.cat([prefix, prefix.new_ones(B, M)], dim=1)[:, None]
            speaks = batch.causal.any(-1)[:, None, None]  # an answer in words may not read ahead
            allowed[:, :T] = torch.where(speaks, allowed[:, :T], full)
        if self.narrows:  # a position stands where it would among the widest robot's
            kept = torch.cat([torch.arange(T, device=prefix.device), T + self.positions_of(batch)])
            return _additive(allowed, self.dtype), self.model.tail_positions(positions, self.model.num_slots)[..., kept]
        return _additive(allowed, self.dtype), self.model.tail_positions(positions, M)

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

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
        batch = self.batch_of(observations, instructions, embodiment, drop_state)
        return self.chunks(self.decide(batch, decode, seeds), embodiment)

    def batch_of(
        self, observations: Sequence[Observation], instructions: Sequence[str], embodiment: str, drop_state: bool = False
    ) -> Batch:
        """Observations of one kind of robot as a batch to act on. Raises as `act_batch`."""
        if embodiment not in self.embodiments:
            raise CheckpointError("act()", found=f"embodiment {embodiment!r}", expected=f"one of {sorted(self.embodiments)}",
                                  fix="use a policy trained on this robot")  # fmt: skip
        pairs = zip(observations, instructions, strict=True)
        return self.collate([self.encoder.observation(o, i, embodiment, drop_state) for o, i in pairs]).to(self.device)

    def chunks(self, chosen: Chosen, embodiment: str) -> list[Chunk]:
        """What was decided, in the robot's units and at its rate."""
        spec, (n, _), (unit, confidence, symbols) = self.embodiments[embodiment], self.steps(embodiment), chosen
        actions = self.normalizers[embodiment]["action"].from_unit(unit[..., : spec.action_dim])
        confidence, held = confidence[..., : spec.action_dim], source_step(n, self.chunk)
        if not is_sequence(self.codec):
            symbols = [row[held, : spec.action_dim] for row in symbols]
        return [Chunk(to_robot_steps(actions[i], n, spec), confidence[i][held].astype(np.float32), symbols[i])
                for i in range(len(unit))]  # fmt: skip

    @torch.inference_mode()
    def decide(
        self, batch: Batch, decode: Decode | None = None, seeds: Sequence[int] | None = None, acts: Tensor | None = None
    ) -> Chosen:
        """What is done, before it is in robot units, for a batch of one kind of robot: unit (B, H, A) in [-1, 1], confidence
        (B, H, A), NaN of an L1 head, and the symbols of each row. `decode` and `seeds` as in `act_batch`; `acts`: what
        `acts(batch)` returned, where decoding is parallel and somebody has asked already."""
        dims = batch.dims.cpu().numpy()
        if self.l1_head is not None:
            acts = self.acts(batch) if acts is None else acts
            unit = self.l1_head(acts).float().clamp(-1, 1).cpu().numpy()
            return unit, np.full(unit.shape, np.nan, np.float32), list(self.codec.encode(unit).reshape(unit.shape))
        seeds = range(len(batch)) if seeds is None else seeds
        choose = chooser(decode or self.config.decode, self.codec, self.centres, dims, seeds)
        if acts is not None:
            choose(self.model.symbol_logits(acts))
        elif self.config.decoding == "parallel":
            decode_parallel(self, batch, choose)
        else:
            decode_steps(self, batch, choose, int(dims.max()))
        return choose.result(self.chunk)

    def answer(self, image: np.ndarray | None, question: str, most: int = 64) -> str:
        """What the policy says to a question about a picture ((h, w, 3) uint8, or none), greedily, at most `most` tokens."""
        return say(self, image, question, most=most).text

    def score_answers(self, image: np.ndarray | None, question: str, candidates: Sequence[str]) -> np.ndarray:
        """(n,) float64: the log-likelihood of each of `candidates` as the whole answer to a question about a picture."""
        return score(self, image, question, candidates)

    # ------------------------------------------------------------------------------------------------ identity

    def describe(self) -> dict:
        """The content of `policy.json`: everything but weights and tokenizer."""
        adapter = {} if self.adapter is None else {"adapter": self.adapter.describe()}
        return {
            "format": 1, **adapter,
            "config": self.config.model_dump(mode="json"),
            "embodiments": {k: v.model_dump(mode="json") for k, v in self.embodiments.items()},
            "normalizers": {k: {part: n.to_json() for part, n in v.items()} for k, v in self.normalizers.items()},
            "codec": self.codec.to_json(),
            "prompt": {"version": self.config.prompt, "template": PROMPTS[self.config.prompt]},
            "image": self.writer.image.to_json(),
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
        digest.update(self.writer.state_bytes())
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("lesson.")}
        if self.adapter is not None:  # the rest is the base's, and its fingerprint is in the meaning
            own = {name: own[name] for name in self.adapter.trained}
        for name, tensor in sorted(own.items()):
            digest.update(name.encode())
            wide = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()  # the numbers, however stored
            digest.update(wide.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, T) bool -> (B, 1, T, T) 0 or a very negative number (finite: a padded row stays free of NaN)."""
    least = max(-1e9, torch.finfo(dtype).min)
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, least)[:, None]
