"""A policy: an observation and an instruction in, a chunk of actions in robot units out.

`Policy` is the protocol that teachers, students, evaluation and serving share. `VLAPolicy` is a vision-language backbone
whose vocabulary carries the codec's symbols, together with everything it needs to act by itself: embodiments,
statistics, codec, prompt version, image preparation.

Two decodings (RT-2, Brohan et al. 2023 / OpenVLA, Kim et al. 2024, and OpenVLA-OFT, Kim et al. 2025):
    autoregressive   prefix, <act>, s_0 .. s_{N-2}  ->  s_0 .. s_{N-1}   causal over the action positions
    parallel         prefix, slot_0 .. slot_{N-1}   ->  s_0 .. s_{N-1}   one pass, bidirectional over them
The prefix (images, text, state, end query) attends to itself in both directions, and never to the actions.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

import vla
from vla.actions import ActionCodec, BinCodec, codec_from_json
from vla.backbones import NanoProcessor, NanoVLM, NanoVLMConfig, build_tokenizer
from vla.batch import AugmentConfig, Batch, Encoder, Example, collate
from vla.config import Config, validate
from vla.embodiment import EmbodimentSpec
from vla.errors import CheckpointError
from vla.mixture import Mixture, generator
from vla.normalize import Normalizer, Scheme, Stats
from vla.prompt import PROMPTS, act_prompt
from vla.schema import Observation, Window

Decode = Literal["argmax", "mean", "sample"]
"""How a symbol becomes a number: the likeliest bin, the expectation over the bins, or a draw."""


class NanoConfig(Config):
    """Sizes of the embedded backbone."""

    kind: Literal["nano"] = "nano"
    hidden: int = Field(default=128, ge=16)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=2, ge=1)
    mlp: int = Field(default=384, ge=16)
    image_size: int = Field(default=64, ge=32, multiple_of=16)
    tower_channels: tuple[int, int, int] = (32, 64, 128)
    keypoints: int = Field(default=64, ge=0)
    """Channels of the instruction-FiLM-ed spatial-softmax token; 0 is the plain stem."""
    text_vocab: int = Field(default=512, ge=300)


class CodecConfig(Config):
    kind: Literal["bins"] = "bins"
    bins: int = Field(default=256, ge=2)
    variant: Literal["uniform", "openvla"] = "uniform"


class NormalizationConfig(Config):
    action: Scheme = "q99"
    state: Scheme = "bounds"


class PolicyConfig(Config):
    """Everything that makes a policy, apart from data."""

    backbone: NanoConfig = NanoConfig()
    codec: CodecConfig = CodecConfig()
    normalization: NormalizationConfig = NormalizationConfig()
    chunk: int = Field(default=8, ge=1)
    """H: steps predicted at once."""
    execute: int = Field(default=4, ge=1)
    """Steps of a chunk that are carried out before looking again."""
    decoding: Literal["parallel", "autoregressive"] = "parallel"
    decode: Decode = "mean"
    soft_sigma: float = Field(default=0.02, ge=0)
    """Standard deviation, in unit space, of the Gaussian around the true action that the bins are taught; 0: hard labels."""
    end_weight: float = Field(default=1.0, ge=0)
    """Weight of the auxiliary loss "where does this episode end", read off the demonstration itself."""
    prompt: str = "plain-1"
    augment: AugmentConfig = AugmentConfig()


@dataclass(frozen=True)
class Chunk:
    """What a policy wants to do next."""

    actions: np.ndarray  # (H, A) float32, robot units
    confidence: np.ndarray  # (H, A) float32 in [0, 1]: 1 - entropy / log K
    symbols: np.ndarray  # (H, A) int64


@dataclass(frozen=True)
class Loss:
    """Sums and counts, so that ranks can divide by the *global* number of valid elements."""

    action: Tensor  # sum of cross-entropies over valid symbols
    action_count: Tensor
    end: Tensor  # sum of smooth-L1 over valid final-state dimensions
    end_count: Tensor
    correct: Tensor  # symbols whose argmax is right

    def total(self, end_weight: float, action_count: Tensor, end_count: Tensor) -> Tensor:
        """The scalar to minimise, given the counts to divide by."""
        return self.action / action_count.clamp(min=1) + end_weight * self.end / end_count.clamp(min=1)


class Policy(Protocol):
    """What a teacher, a student and a server's backend have in common."""

    embodiments: dict[str, EmbodimentSpec]
    chunk: int
    execute: int

    def act_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], embodiment: str,
        decode: Decode | None = None, seeds: Sequence[int] | None = None, drop_state: bool = False,
    ) -> list[Chunk]: ...  # fmt: skip


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
        self.provenance = provenance or {}
        """Where the policy comes from: datasets, fingerprints, recorded seeds, instructions."""
        layout = {name: model.config.special_id(name) for name in ("image", "state", "end", "pad")}
        self.encoder = Encoder(
            embodiments=embodiments, normalizers=normalizers, codec=codec, prompt=config.prompt,
            tokenize=_Tokenize(tokenizer), layout=layout | {"image_tokens": model.config.image_tokens},
            image_size=model.config.image_size, horizon=config.chunk,
        )  # fmt: skip
        d = model.config.text_config.hidden_size
        self.end_head = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, self.encoder.state_dim))
        centres = codec.centres if codec.centres is not None else np.zeros(0, np.float32)
        self.register_buffer("centres", torch.from_numpy(centres), persistent=False)

    # ------------------------------------------------------------------------------------------------ building

    @classmethod
    def build(cls, config: PolicyConfig, mixture: Mixture) -> VLAPolicy:
        """A fresh policy for the robots, sentences and statistics of `mixture`. Draws from torch's global generator."""
        embodiments = mixture.embodiments
        codec = BinCodec(config.codec.bins, config.codec.variant)
        sentences = sorted({text for store in mixture.stores for text in store.instructions})
        corpus = [act_prompt(text, version) for text in sentences for version in PROMPTS]
        tokenizer = build_tokenizer(corpus, config.backbone.text_vocab)
        A = max(spec.action_dim for spec in embodiments.values())
        S = max(spec.state_dim for spec in embodiments.values())
        nano = config.backbone
        model = NanoVLM(NanoVLMConfig(
            text_config=dict(hidden_size=nano.hidden, num_hidden_layers=nano.layers, num_attention_heads=nano.heads,
                             num_key_value_heads=nano.heads, intermediate_size=nano.mlp),
            text_vocab_size=nano.text_vocab, num_slots=config.chunk * A, num_symbols=codec.size,
            image_size=nano.image_size, tower_channels=nano.tower_channels, keypoints=nano.keypoints, state_dim=S,
        ))  # fmt: skip
        model.set_attn_implementation("eager")  # faster than SDPA for ~60 tokens on a CPU, equal on CUDA
        normalizers = {name: _normalizers(name, mixture, config.normalization) for name in embodiments}
        seeds: dict[str, dict[str, list[list[int]]]] = {}
        for store in mixture.stores:
            for task, numbers in store.recorded_seeds.items():
                ranges = seeds.setdefault(store.suite or store.spec.name, {}).setdefault(task, [])
                ranges += _ranges(numbers)
        datasets = [{"path": str(s.root), "robot": s.spec.name, "fingerprint": s.fingerprint, "episodes": s.num_episodes,
                     "frames": s.num_frames} for s in mixture.stores]  # fmt: skip
        provenance = {"datasets": datasets, "recorded_seeds": seeds, "instructions": sentences}
        return cls(config, model, tokenizer, embodiments, normalizers, codec, provenance)

    # ------------------------------------------------------------------------------------------------ learning

    def encode(self, window: Window, augment: bool = False, seed: int = 0) -> Example:
        """Window -> Example; with `augment`, images and state are varied as a function of (seed, window.n)."""
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
            entropies = F.nll_loss(log_p.transpose(1, 2), batch.symbols, reduction="none")
        end = self.end_head(hidden[:, -batch.symbols.shape[1] - 1]).float()  # (B, S)
        end_losses = F.smooth_l1_loss(end, batch.end, reduction="none", beta=0.1)
        return Loss(
            action=(entropies * valid).sum(), action_count=valid.sum(),
            end=(end_losses * batch.end_valid).sum(), end_count=batch.end_valid.sum(),
            correct=((logits.argmax(-1) == batch.symbols) & valid).sum(),
        )  # fmt: skip

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
            tail = torch.cat([start, batch.symbols[:, :-1] + config.action_ids.start], dim=1)
        mask, positions = self._attention(batch.mask, N)
        return self.model(
            torch.cat([batch.ids, tail], dim=1), batch.images, batch.state, attention_mask=mask, position_ids=positions
        ).last_hidden_state

    def _attention(self, prefix: Tensor, N: int) -> tuple[Tensor, Tensor]:
        """Additive mask (B, 1, T + N, T + N) and positions (B, T + N) for a prefix mask (B, T) and N action positions."""
        B, T = prefix.shape
        allowed = torch.zeros(B, T + N, T + N, dtype=torch.bool, device=prefix.device)
        allowed[:, :, :T] = prefix[:, None, :]
        tail = torch.ones(N, N, dtype=torch.bool, device=prefix.device)
        allowed[:, T:, T:] = tail if self.config.decoding == "parallel" else tail.tril()
        positions = (prefix.cumsum(-1) - 1).clamp(min=0)
        after = positions[:, -1:] + 1 + torch.arange(N, device=prefix.device)
        return _additive(allowed, self._dtype), torch.cat([positions, after], dim=1)

    def _symbol_logits(self, hidden: Tensor) -> Tensor:
        """Only the rows of the head that are actions: a malformed chunk cannot be expressed."""
        ids = self.model.config.action_ids
        return F.linear(hidden, self.model.lm_head.weight[ids.start : ids.stop])

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    # ------------------------------------------------------------------------------------------------ acting

    @property
    def chunk(self) -> int:
        return self.config.chunk

    @property
    def execute(self) -> int:
        return min(self.config.execute, self.config.chunk)

    @property
    def image_size(self) -> int:
        return self.encoder.image_size

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
                raise CheckpointError("act()", found="no embodiment", expected=f"one of {sorted(self.embodiments)}",
                                      fix="pass embodiment=...")  # fmt: skip
            embodiment = next(iter(self.embodiments))
        return self.act_batch([observation], [instruction], embodiment, **options)[0]

    @torch.inference_mode()
    def act_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], embodiment: str,
        decode: Decode | None = None, seeds: Sequence[int] | None = None, drop_state: bool = False,
    ) -> list[Chunk]:  # fmt: skip
        """Chunks for several observations of one kind of robot.

        `decode` overrides the policy's own; `seeds` (one per observation) feed "sample". Raises `DataError` for an
        observation that does not fit the embodiment, `CheckpointError` for an unknown robot.
        """
        if embodiment not in self.embodiments:
            raise CheckpointError("act()", found=f"embodiment {embodiment!r}", expected=f"one of {sorted(self.embodiments)}",
                                  fix="use a policy trained on this robot")  # fmt: skip
        pairs = zip(observations, instructions, strict=True)
        batch = self.collate([self.encoder.observation(o, i, embodiment, drop_state) for o, i in pairs]).to(self.device)
        choose = _Chooser(decode or self.config.decode, self.codec, self.centres, seeds or range(len(batch)))
        if self.config.decoding == "parallel":
            choose(self._symbol_logits(self._hidden(batch)[:, -batch.symbols.shape[1] :]))
        else:
            self._decode_steps(batch, choose)
        dims, normalizer = self.embodiments[embodiment].action_dim, self.normalizers[embodiment]["action"]
        shape = (len(batch), self.chunk, self.encoder.action_dim)
        unit, confidence, symbols = (np.concatenate(part, axis=1).reshape(shape)[..., :dims] for part in choose.parts)
        actions = normalizer.from_unit(unit)
        return [Chunk(actions[i], confidence[i].astype(np.float32), symbols[i]) for i in range(len(batch))]

    def _decode_steps(self, batch: Batch, choose: _Chooser) -> None:
        """Constrained greedy (or sampled) decoding: the prefix once, then one symbol at a time over a cache."""
        B, N = batch.symbols.shape
        T = batch.ids.shape[1]
        config = self.model.config
        mask, positions = self._attention(batch.mask, N)
        cache = DynamicCache(config=config.text_config)
        self.model(
            batch.ids, batch.images, batch.state, attention_mask=mask[:, :, :T, :T], position_ids=positions[:, :T],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        ids = torch.full((B, 1), config.special_id("act"), device=batch.ids.device)
        for i in range(N):
            hidden = self.model(
                ids, attention_mask=mask[:, :, T + i : T + i + 1, : T + i + 1], position_ids=positions[:, T + i : T + i + 1],
                past_key_values=cache, use_cache=True,
            ).last_hidden_state  # fmt: skip
            ids = choose(self._symbol_logits(hidden)) + config.action_ids.start

    # ------------------------------------------------------------------------------------------------ keeping

    def describe(self) -> dict:
        """The content of `policy.json`: everything but weights and tokenizer."""
        return {
            "format": 1,
            "config": self.config.model_dump(mode="json"),
            "embodiments": {k: v.model_dump(mode="json") for k, v in self.embodiments.items()},
            "normalizers": {k: {part: n.to_json() for part, n in v.items()} for k, v in self.normalizers.items()},
            "codec": self.codec.to_json(),
            "prompt": {"version": self.config.prompt, "template": PROMPTS[self.config.prompt]},
            "image": {"size": self.image_size, "resize": "bilinear, antialiased", "layout": "RGB uint8, scaled to [-1, 1]"},
            "provenance": self.provenance,
            "versions": {"tendon-vla": vla.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                         "python": platform.python_version()},
        }  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """sha256 over weights and meaning (normalisers, codec, prompt): equal fingerprints act alike."""
        digest = hashlib.sha256()
        meaning = self.describe()
        for key in ("normalizers", "codec", "prompt", "image"):
            digest.update(json.dumps(meaning[key], sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write a policy folder. Not atomic by itself: `checkpoint.publish` wraps it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        NanoProcessor.of(self.model.config, self.tokenizer).save_pretrained(folder)
        save_file({k: v.contiguous() for k, v in self.end_head.state_dict().items()}, folder / "heads.safetensors")
        (folder / "policy.json").write_text(json.dumps(self.describe() | {"fingerprint": self.fingerprint}, indent=1))

    @classmethod
    def load(cls, folder: Path) -> VLAPolicy:
        """Read a policy folder; raises `CheckpointError` naming what is missing or does not fit."""
        meaning = _read_policy_json(folder)
        config = validate(meaning["config"], PolicyConfig, f"{folder / 'policy.json'}: config")
        try:
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
            tokenizer = AutoTokenizer.from_pretrained(folder)
            heads = load_file(folder / "heads.safetensors")
        except Exception as error:  # transformers and safetensors raise many kinds; all of them mean "cannot be read"
            raise CheckpointError(folder, found=f"{type(error).__name__}: {error}",
                                  expected="readable model.safetensors, heads.safetensors, tokenizer.json, config.json",
                                  fix="copy the folder again from where it was made, or use an older checkpoint") from error  # fmt: skip
        where = f"{folder / 'policy.json'}: normalizers"
        normalizers = {
            robot: {part: Normalizer.from_json(entry, f"{where}.{robot}.{part}") for part, entry in parts.items()}
            for robot, parts in meaning["normalizers"].items()
        }
        embodiments = {k: EmbodimentSpec.model_validate(v) for k, v in meaning["embodiments"].items()}
        codec = codec_from_json(meaning["codec"])
        policy = cls(config, model, tokenizer, embodiments, normalizers, codec, meaning["provenance"])
        policy.end_head.load_state_dict(heads)
        if policy.fingerprint != meaning["fingerprint"]:
            raise CheckpointError(folder, found=f"fingerprint {policy.fingerprint[:12]}",
                                  expected=f"{meaning['fingerprint'][:12]}, as policy.json says",
                                  fix="weights and policy.json are not of one save: copy the whole folder again")  # fmt: skip
        return policy.eval()


class _Tokenize:
    """Text -> ids without special tokens; a class, because loader workers must pickle it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore


class _Chooser:
    """Logits over the codec's symbols -> values, confidences, symbols, piece by piece."""

    def __init__(self, decode: Decode, codec: ActionCodec, centres: Tensor, seeds: Sequence[int]) -> None:
        self.decode, self.codec, self.centres = decode, codec, centres
        self.parts: tuple[list[np.ndarray], ...] = ([], [], [])
        self._draws = [generator(seed, 0, purpose=4) for seed in seeds] if decode == "sample" else []

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, n, K) -> symbols (B, n)."""
        p = logits.float().softmax(-1)
        entropy = -(p * p.clamp(min=1e-12).log()).sum(-1)
        if self.decode == "mean":
            values = p @ self.centres
            symbols = (values[..., None] - self.centres).abs().argmin(-1)
        else:
            if self.decode == "sample":
                draws = np.stack([rng.random(p.shape[1]) for rng in self._draws]).astype(np.float32)
                below = p.cumsum(-1) < torch.from_numpy(draws).to(p.device)[..., None]
                symbols = below.sum(-1).clamp(max=p.shape[-1] - 1)
            else:
                symbols = p.argmax(-1)
            values = self.centres[symbols]
        confidence = 1.0 - entropy / np.log(p.shape[-1])
        for part, tensor in zip(self.parts, (values, confidence, symbols), strict=True):
            part.append(tensor.cpu().numpy())
        return symbols


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T, T) bool -> (B, 1, T, T) 0 or a very negative number (finite: a padded row stays free of NaN)."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -1e9)[:, None]


def _normalizers(robot: str, mixture: Mixture, config: NormalizationConfig) -> dict[str, Normalizer]:
    """Statistics of one robot: its dataset's own; recomputed exactly from the columns when it has several datasets."""
    stores = [store for store in mixture.stores if store.spec.name == robot]
    made = {}
    for part, feature in (("action", "action"), ("state", "observation.state")):
        where = f"{stores[0].root}/meta/stats.json: {feature}"
        if len(stores) == 1:
            stats = Stats.from_json(stores[0].stats[feature], where)
        else:
            stats = Stats.of(np.concatenate([getattr(store, part) for store in stores]))
        made[part] = Normalizer(stats, getattr(config, part), where=where)
    return made


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    """[1, 2, 3, 7] -> [[1, 3], [7, 7]]."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def _read_policy_json(folder: Path) -> dict:
    path = folder / "policy.json"
    try:
        meaning = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(folder, found="no policy.json", expected="a policy folder (weights, processor, policy.json)",
                              fix="give a run folder or its policy/ folder") from None  # fmt: skip
    except ValueError as error:
        raise CheckpointError(path, found=str(error), expected="JSON", fix="copy the folder again") from error
    needed = ("config", "embodiments", "normalizers", "codec", "prompt", "provenance", "fingerprint")
    if missing := [key for key in needed if key not in meaning]:
        raise CheckpointError(path, found=f"no {missing}", expected=f"keys {list(needed)}",
                              fix="weights without these are not a policy; save it again")  # fmt: skip
    return meaning


def load_policy(path: str | Path, device: str | torch.device | None = None) -> VLAPolicy:
    """A policy from a policy folder or a run folder, ready to act. Raises `CheckpointError` when it cannot."""
    folder = Path(path)
    if (folder / "policy" / "policy.json").is_file():
        folder = folder / "policy"
    return VLAPolicy.load(folder).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
