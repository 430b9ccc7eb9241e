"""Several adapters on one base in memory, chosen per request.

    adapters = Adapters({"kitchen": "runs/kitchen", "bench": "runs/bench"})
    chunk = adapters.act(observation, "open the drawer", "panda", adapter="kitchen")

Each adapter is a whole policy (`adapters["kitchen"]`) with its own matrices, tables, heads, statistics, robots and settings;
only the base's tensors are the same objects in all of them. So acting with one is bit for bit what it is when loaded alone,
calls may follow one another in any order, ranks, targets and decodings may differ, and one more adapter costs what it trained.
They cannot be merged here, nor moved or cast one by one: that would be done to all.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla.actions import ActionCodec
from vla.embodiment import EmbodimentSpec
from vla.errors import CheckpointError, UsageError
from vla.fetch import fetch_policy
from vla.policy.adapters import AdapterConfig, base_fingerprint, own_name, quantize_base
from vla.policy.config import PolicyConfig
from vla.policy.folder import base_of, read_meaning, read_policy
from vla.policy.model import VLAPolicy
from vla.policy.protocol import Chunk
from vla.policy.sizes import sizes_of
from vla.schema import Observation


class Adapters:
    """Policies by name over the tensors of one base. See the module."""

    def __init__(
        self, folders: Mapping[str, str | Path] | None = None, device: str | torch.device | None = None,
        dtype: torch.dtype | None = None, attention: str | None = None, base: str | Path | None = None, unquantized: bool = False,
    ) -> None:  # fmt: skip
        """`folders`: name -> adapter, as `load_policy` takes one; the other arguments are those of `load_policy`, for all.

        Raises what `load_policy` raises, and `CheckpointError` for a policy without an adapter or one of another base.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._dtype, self._attention, self._given, self._unquantized = dtype, attention, base, unquantized
        self._below: dict[tuple, tuple[VLAPolicy, str]] = {}
        self._policies: dict[str, VLAPolicy] = {}
        for name, folder in (folders or {}).items():
            self.add(name, folder)

    # ------------------------------------------------------------------------------------------------ which there are

    def __iter__(self) -> Iterator[str]:
        return iter(self._policies)

    def __len__(self) -> int:
        return len(self._policies)

    def __contains__(self, name: object) -> bool:
        return name in self._policies

    def __getitem__(self, name: str) -> VLAPolicy:
        """The policy of this name; `UsageError` when there is none."""
        if name not in self._policies:
            near = difflib.get_close_matches(name, self._policies, 1)
            raise UsageError("adapter", found=repr(name), expected=f"one of {sorted(self._policies)}",
                             fix=f"did you mean {near[0]!r}?" if near else "load it: adapters.add(name, folder)")  # fmt: skip
        return self._policies[name]

    @property
    def base(self) -> str | None:
        """Fingerprint of the base all of them were trained on; None while there is no adapter."""
        return next((fingerprint for _, fingerprint in self._below.values()), None)

    def add(self, name: str, folder: str | Path) -> VLAPolicy:
        """Load one more adapter of the same base; returns its policy. Nothing changes when this raises."""
        if name in self._policies:
            raise UsageError("adapter", found=f"a second {name!r}", expected="a name of its own",
                             fix=f"another name, or adapters.remove({name!r}) first")  # fmt: skip
        where = fetch_policy(folder)
        entry = read_meaning(where).get("adapter") if (where / "policy.json").is_file() else None
        if entry is None:
            raise CheckpointError(where, found="a whole policy", expected="an adapter, which shares its base",
                                  fix="load it by itself: load_policy(...)")  # fmt: skip
        if self.base not in (None, entry["base"]["fingerprint"]):
            raise CheckpointError(
                where, found=f"an adapter of base {entry['base']['fingerprint'][:12]} ({entry['base']['path']})",
                expected=f"one of base {str(self.base)[:12]}, as {', '.join(sorted(self._policies))}",
                fix="give it an Adapters of its own, or load_policy(...)",
            )  # fmt: skip
        known = dict(self._below)
        try:
            policy = read_policy(where, self._dtype, self._attention, None, self._unquantized, self._under).to(self.device)
        except BaseException:
            self._below = known
            raise
        policy.shares_base = True
        self._policies[name] = policy
        return policy

    def remove(self, name: str) -> None:
        """Forget an adapter; the base stays while there is another. `UsageError` when there is none of this name."""
        self[name]
        del self._policies[name]
        if not self._policies:  # nothing is held in memory for nobody, and adapters of another base may come
            self._below.clear()

    # ------------------------------------------------------------------------------------------------ acting

    def act(
        self, observation: Observation, instruction: str, embodiment: str | None = None, *, adapter: str, **options: Any
    ) -> Chunk:
        """As `VLAPolicy.act`, by the `adapter` of this name."""
        return self[adapter].act(observation, instruction, embodiment, **options)

    def act_batch(
        self, observations: Sequence[Observation], instructions: Sequence[str], embodiment: str, *,
        adapter: str | Sequence[str], seeds: Sequence[int] | None = None, **options: Any,
    ) -> list[Chunk]:  # fmt: skip
        """As `VLAPolicy.act_batch`; `adapter` is one name for all, or one for each observation.

        Those of one adapter are one batch; adapters take their turns. Chunks come in the order of the observations.
        """
        names = [adapter] * len(observations) if isinstance(adapter, str) else list(adapter)
        if not len(names) == len(observations) == len(instructions):
            raise UsageError("act_batch()", found=f"{len(observations)} observations, {len(instructions)} instructions, "
                             f"{len(names)} adapters", expected="as many of each",
                             fix="give one adapter for each, or one name for all")  # fmt: skip
        policies = {name: self[name] for name in dict.fromkeys(names)}  # every name is known before any of them acts
        numbers = range(len(names)) if seeds is None else seeds
        chunks: dict[int, Chunk] = {}
        for name, policy in policies.items():
            rows = [i for i, other in enumerate(names) if other == name]
            said = policy.act_batch([observations[i] for i in rows], [instructions[i] for i in rows], embodiment,
                                    seeds=[numbers[i] for i in rows], **options)  # fmt: skip
            chunks |= dict(zip(rows, said, strict=True))
        return [chunks[i] for i in range(len(names))]

    # ------------------------------------------------------------------------------------------------ the base

    def _under(
        self, folder: Path, entry: dict, config: PolicyConfig, embodiments: dict[str, EmbodimentSpec], codec: ActionCodec
    ) -> tuple[VLAPolicy, str]:
        """A policy for one adapter to go on, over the tensors all share, and their fingerprint.

        Layers in fewer bits are other tensors, and a pretrained model's tables have the sizes an adapter asks for: there is
        one base for each kind of these, and what is the same in two of them is one tensor too.
        """
        settings = AdapterConfig.model_validate(entry["config"])
        how = "none" if self._unquantized else settings.quantize
        alike = ()  # a base that is a policy is the same for all
        if entry["base"]["kind"] == "model":
            alike = (sizes_of(config, embodiments, codec), config.backbone.model_dump_json())
        key = (how, None if how == "none" else settings.targets, alike)
        if key not in self._below:
            below = base_of(entry["base"], folder, self._given, config, embodiments, codec, self._attention)
            fingerprint = base_fingerprint(below)
            if how == settings.quantize:
                quantize_base(below, settings)
            self._place(below)
            for first, _ in self._below.values():
                _tie(below, first)
            self._below[key] = below, fingerprint
        below, fingerprint = self._below[key]
        return _twin(below), fingerprint

    def _place(self, below: VLAPolicy) -> None:
        """Where and as what the base is kept; what adapters bring stays as stored, for their fingerprints are of that."""
        own = {name: parameter.detach().clone() for name, parameter in below.named_parameters() if own_name(below, name)}
        (below if self._dtype is None else below.to(self._dtype)).to(self.device).eval().requires_grad_(False)
        for name, tensor in own.items():
            below.get_parameter(name).data = tensor


def _twin(policy: VLAPolicy) -> VLAPolicy:
    """A copy whose tables and heads are its own and whose other parameters are the same objects."""
    shared: dict[int, Any] = {id(p): p for name, p in policy.named_parameters() if not own_name(policy, name)}
    shared[id(policy.writer)] = policy.writer
    return copy.deepcopy(policy, shared)


def _tie(policy: VLAPolicy, first: VLAPolicy) -> None:
    """Let `policy` use the tensors of `first`, a base of the same fingerprint, wherever the two are stored alike."""
    there = dict(first.named_parameters())
    for name, mine in list(policy.named_parameters()):
        theirs = there.get(name)
        if theirs is None or own_name(policy, name) or mine is theirs:
            continue
        if type(mine.data) is type(theirs.data) and mine.shape == theirs.shape and mine.dtype == theirs.dtype:
            place, _, last = name.rpartition(".")
            module: nn.Module = policy.get_submodule(place)
            module._parameters[last] = theirs
