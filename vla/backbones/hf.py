"""Any `AutoModelForImageTextToText` as a backbone, by looking at what it does and not at what it is called.

What differs between families is found out at load (`hf_probe.py`): how its prefix attends, where positions start, what its image
processor returns. Ours are small tables beside it: ids from V on (state, soft tokens, slots, symbols) reach the model as an
ordinary id whose embedding a hook replaces by position, so models that look for image ids or keep embeddings per layer stay
undisturbed.
Only the symbols' rows of the head are computed.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import Cache, DynamicCache

from vla.backbones.config import HFConfig
from vla.backbones.hf_probe import Habits, probe
from vla.backbones.hf_writer import HFWriter, open_processor
from vla.backbones.protocol import Sizes
from vla.errors import CheckpointError, UsageError
from vla.fetch import fetch_model

TABLES = "tables.safetensors"
_ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}


def build(config: HFConfig, sizes: Sizes) -> tuple[HFBackbone, HFWriter]:
    """A pretrained model with room for actions.

    Raises `CheckpointError` when it cannot be had or imitated, `UsageError` when it cannot serve."""
    return _assemble(str(fetch_model(config.path)), None, config, sizes, None, None)


def load(
    folder: Path, config: HFConfig, sizes: Sizes, dtype: torch.dtype | None, attention: str | None
) -> tuple[HFBackbone, HFWriter]:
    """Model and writer of a saved policy."""
    model, writer = _assemble(str(folder), None, config, sizes, dtype, attention)
    tables = load_file(folder / TABLES)
    own = {n: p for n, p in model.named_parameters() if not n.startswith("vlm.")}
    if wrong := sorted(own.keys() ^ tables.keys()) + [n for n in own.keys() & tables.keys() if own[n].shape != tables[n].shape]:
        raise CheckpointError(folder / TABLES, found=f"other tables: {wrong}", expected="those policy.json asks for",
                              fix="copy the whole folder again")  # fmt: skip
    with torch.no_grad():
        for name, tensor in tables.items():
            own[name].data = tensor.to(own[name].device)
    return model, writer


def _assemble(
    path: str, revision: str | None, config: HFConfig, sizes: Sizes, dtype: torch.dtype | None, attention: str | None
) -> tuple[HFBackbone, HFWriter]:
    processor = open_processor(path, revision)
    try:
        vlm = _open_model(path, revision, dtype, attention or config.attention)
    except Exception as error:
        raise CheckpointError(path, found=f"{type(error).__name__}: {error}",
                              expected="a vision-language model in safetensors that transformers knows natively",
                              fix="check the path; pickles, and code beside the weights, are never used") from error  # fmt: skip
    if getattr(vlm.config, "is_encoder_decoder", False):
        raise UsageError("policy.backbone.path", found=f"{vlm.config.model_type}, an encoder-decoder",
                         expected="a decoder that reads pictures and text in one sentence",
                         fix="another model")  # fmt: skip
    known, rows = len(processor.tokenizer), vlm.get_input_embeddings().weight.shape[0]
    if known > rows:
        raise CheckpointError(path, found=f"a tokenizer of {known} ids over {rows} embeddings", expected="a vocabulary that fits",
                              fix="weights and tokenizer are not of one model: get both again")  # fmt: skip
    writer = HFWriter(processor, config, rows, getattr(vlm.config, "image_token_id", None), sizes)
    model = HFBackbone(vlm, writer, config, sizes)
    model.habits = probe(model, writer, config.probe_image)
    return model, writer


def _open_model(path: str, revision: str | None, dtype: torch.dtype | None, attention: str) -> Any:
    def opened(attention: str) -> Any:
        return AutoModelForImageTextToText.from_pretrained(
            path, revision=revision, dtype=dtype or "auto", attn_implementation=attention, trust_remote_code=False,
            use_safetensors=True,
        )  # fmt: skip

    try:
        return opened(attention)
    except ValueError as error:
        if attention == "eager" or "attention implementation" not in str(error):
            raise
        return opened("eager")  # the family has only this one


class HFBackbone(nn.Module):
    """See the module; the methods are those of `vla.backbones.protocol.Backbone`."""

    prefix_reads_tail = False

    def __init__(self, vlm: Any, writer: HFWriter, config: HFConfig, sizes: Sizes) -> None:
        super().__init__()
        self.vlm = vlm.eval()
        self.ids, self.state_dim, self.num_slots = writer.ids, sizes.state, sizes.slots
        self.vocabulary, self.max_cameras = writer.ids.words, writer.most_pictures
        self._pictures = writer.processor.image_processor
        self._types = writer.types
        self._takes = set(inspect.signature(type(vlm).forward).parameters)
        self.habits = Habits()
        embed, head = vlm.get_input_embeddings(), vlm.get_output_embeddings()
        text = vlm.config.get_text_config()
        self.no_parallel = ""  # `probe` may know better
        self.layers_changed()
        self._softcap = getattr(text, "final_logit_softcapping", None)
        with torch.no_grad():
            probe_ids = torch.arange(min(1024, self.vocabulary), device=embed.weight.device)
            sample = embed(probe_ids).float()  # as the model sees them: some scale inside the table
            self.hidden_size, spread, mean = sample.shape[-1], sample.std().item(), sample.mean(0)

            def fresh(count: int) -> nn.Parameter:
                return nn.Parameter(mean + spread * 0.5 * torch.randn(count, sample.shape[-1], device=mean.device))

            if config.symbols == "least-used":
                rows = least_used(writer.processor.tokenizer, self.vocabulary, sizes.symbols).to(embed.weight.device)
                self.symbols_in = nn.Parameter(embed(rows).float().clone())
                self.symbols_out = nn.Parameter(head.weight[rows].float().clone())
            else:
                self.symbols_in = fresh(sizes.symbols)
                out = head.weight.float()
                self.symbols_out = nn.Parameter(out.mean(0) + out.std() * 0.5 * torch.randn(sizes.symbols, out.shape[-1]).to(out))
            self.queries = fresh(2)  # end, act
            self.slots = fresh(sizes.slots)
            self.robots = nn.Embedding(sizes.robots, sizes.soft_tokens * self.hidden_size) if sizes.soft_tokens else None
            if self.robots is not None:
                self.robots.weight.copy_(fresh(sizes.robots * sizes.soft_tokens).view(sizes.robots, -1))
            d = self.hidden_size
            self.state_in = nn.Sequential(nn.Linear(sizes.state, d), nn.GELU(), nn.Linear(d, d)) if sizes.state_token else None
        self._splice: tuple[Tensor, Tensor] | None = None
        embed.register_forward_hook(self._replace)

    def layers_changed(self) -> None:
        """Look again at which kinds of layers there are."""
        kinds = getattr(self.vlm.config.get_text_config(), "layer_types", None)
        self._recurrent = set(kinds or ()) - _ATTENDING

    # ---------------------------------------------------------------------------------------------- what is learned where

    @property
    def tables(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.named_parameters() if not name.startswith("vlm."))

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = {"vision": [], "projector": [], "language": []}
        inner = self.vlm.model
        for name, child in inner.named_children():
            low = name.lower()
            part = ("projector" if any(w in low for w in ("projector", "connector", "merger", "multi_modal"))
                    else "vision" if any(w in low for w in ("vision", "visual", "image")) else "language")  # fmt: skip
            found[part] += [f"vlm.model.{name}"] if any(True for _ in child.parameters()) else []
        return {part: tuple(names) for part, names in found.items()}

    @property
    def adapted(self) -> nn.Module:
        return self.vlm

    def train(self, mode: bool = True) -> HFBackbone:
        """As any module's; but the statistics in a convolutional tower are the pretrained model's and stay."""
        super().train(mode)
        for module in self.vlm.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def get_input_embeddings(self) -> Any:
        return self.vlm.get_input_embeddings()

    def add_robots(self, count: int) -> None:
        table = self.robots
        assert table is not None
        rows = nn.Embedding(table.num_embeddings + count, table.embedding_dim, device=table.weight.device)
        with torch.no_grad():
            rows.weight[: table.num_embeddings] = table.weight
            noise = torch.randn(count, table.embedding_dim).to(table.weight) * table.weight.std().item() * 0.1
            rows.weight[table.num_embeddings :] = table.weight.mean(0) + noise
        self.robots = rows

    def save_pretrained(self, folder: Path) -> None:
        self.vlm.save_pretrained(folder)
        own = {n: p.detach().contiguous() for n, p in self.named_parameters() if not n.startswith("vlm.")}
        save_file(own, folder / TABLES)

    # ---------------------------------------------------------------------------------------------- the sentence

    def prefix_attention(self, ids: Tensor, mask: Tensor, causal: Tensor) -> tuple[Tensor, Tensor]:
        """As the model itself does it, found out at load; `causal` is moot, for its own prefix is causal or asks no question."""
        T = mask.shape[1]
        earlier = torch.ones(T, T, dtype=torch.bool, device=mask.device).tril()
        if self.habits.prefix == "both":
            allowed = earlier | ~causal[:, None, :]
        elif self.habits.prefix == "pictures":
            at = ids == self.ids.image
            block = ((at.cumsum(-1) - 1) // self.ids.image_tokens + 1) * at  # two pictures may stand side by side
            allowed = earlier | ((block[:, :, None] == block[:, None, :]) & at[:, None, :])
        else:
            allowed = earlier.expand(len(ids), T, T)
        return mask[:, None, :] & allowed, self._positions(ids, mask)

    def _positions(self, ids: Tensor, mask: Tensor) -> Tensor:
        rope = getattr(self.vlm.model, "get_rope_index", None)
        if rope is None or self.habits.grid is None:
            return (mask.cumsum(-1) - 1).clamp(min=0) + self.habits.first
        pictures = int((ids == self.ids.image).sum()) // self.ids.image_tokens
        known = {"input_ids": torch.where(ids < self.vocabulary, ids, self.ids.pad), "attention_mask": mask.long(),
                 "image_grid_thw": self.habits.grid.to(ids.device).expand(pictures, -1) if pictures else None,
                 "mm_token_type_ids": (ids == self.ids.image).int()}  # fmt: skip
        takes = inspect.signature(rope).parameters
        positions = rope(**{name: value for name, value in known.items() if name in takes})[0]
        return positions.clamp(min=0)

    @property
    def attention_only(self) -> bool:
        return not self.habits.mask_by_layer  # layers of several kinds: some of them may not attend at all

    def tail_positions(self, positions: Tensor, tail: int) -> Tensor:
        steps = torch.arange(1, tail + 1, device=positions.device)
        if positions.ndim == 3:  # (3, B, T): text goes on after the furthest of the three
            last = positions.amax(dim=(0, 2))
            return torch.cat([positions, (last[:, None] + steps).expand(3, -1, -1)], dim=-1)
        return torch.cat([positions, positions[:, -1:] + steps], dim=-1)

    def parallel_tail(self, n: int) -> list[int]:
        return list(self.ids.slots[:n])

    def _replace(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if self._splice is None or output.shape[:-1] != self._splice[0].shape:
            return output
        ours, rows = self._splice
        return torch.where(ours[..., None], rows.to(output.dtype), output)

    def _rows(self, ids: Tensor, states: Tensor | None, robots: Tensor | None) -> Tensor:
        """(B, T, d): what stands at the positions that are ours; anything elsewhere."""
        table = torch.cat([self.queries, self.slots, self.symbols_in])  # ids V + 2 onwards
        rows = F.embedding((ids - self.vocabulary - 2).clamp(min=0), table)
        if self.state_in is not None and states is not None:
            told = self.state_in(states.to(self.queries.dtype))
            rows = torch.where((ids == self.ids.state)[..., None], told[:, None].to(rows.dtype), rows)
        if self.robots is not None and robots is not None:
            at = ids == self.ids.soft
            which = (at.cumsum(-1) - 1).clamp(0, self.ids.soft_tokens - 1)
            known = self.robots(robots).view(len(ids), self.ids.soft_tokens, -1)
            soft = known.gather(1, which[..., None].expand(-1, -1, known.shape[-1]))
            rows = torch.where(at[..., None], soft.to(rows.dtype), rows)
        return rows

    def picture_inputs(self, images: Tensor) -> dict[str, Any]:
        """(I, 3, s, s) uint8 -> what the model's own image processor makes of them, on their device."""
        out = self._pictures(images=list(images), return_tensors="pt", device=images.device)
        dtype = self.get_input_embeddings().weight.dtype
        return {name: value.to(images.device, dtype if value.is_floating_point() else None)
                for name, value in out.items() if name in self._takes and isinstance(value, Tensor)}  # fmt: skip

    def types(self, ids: Tensor) -> dict[str, Tensor]:
        """Inputs that tell words from pictures, where the model's processor gives them."""
        at = ids == self.ids.image
        return {name: torch.where(at, picture, word) for name, (word, picture) in self._types.items() if name in self._takes}

    def hidden(
        self, input_ids: Tensor, images: Tensor | None = None, states: Tensor | None = None, *,
        slots: Tensor | None = None, robots: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None, use_cache: bool = False,
    ) -> Any:  # fmt: skip
        ours = input_ids >= self.vocabulary
        plain = torch.where(ours, self.habits.filler, input_ids)
        inputs: dict[str, Any] = {} if images is None or not len(images) else self.picture_inputs(images)
        inputs |= self.types(input_ids)
        mask: Any = attention_mask
        if attention_mask is not None and self.habits.mask_by_layer:
            mask = {kind: attention_mask for kind in _ATTENDING}
            if self._recurrent:  # they take no mask of pairs, only which tokens are there: the last one reads all of those
                there = (attention_mask[:, 0, -1, -input_ids.shape[1] :] > -1).long()
                mask |= dict.fromkeys(self._recurrent, there)
        self._splice = (ours, self._rows(input_ids, states, robots)) if ours.any() else None
        try:
            return self.vlm.model(
                input_ids=plain, attention_mask=mask, position_ids=position_ids, past_key_values=past_key_values,
                use_cache=use_cache, **inputs,
            )  # fmt: skip
        finally:
            self._splice = None

    def symbol_logits(self, hidden: Tensor) -> Tensor:
        return self._capped(F.linear(hidden, self.symbols_out.to(hidden.dtype)))

    def word_logits(self, hidden: Tensor) -> Tensor:
        return self._capped(self.vlm.get_output_embeddings()(hidden)).float()

    def _capped(self, logits: Tensor) -> Tensor:
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def new_cache(self) -> Cache:
        # Without the config every layer keeps everything: the masks say who reads what.
        return DynamicCache(config=self.vlm.config.get_text_config()) if self._recurrent else DynamicCache()


def least_used(tokenizer: Any, rows: int, count: int) -> Tensor:
    """(count,) ids for symbols: rows no token has, then the last of the ordinary ones (merges are learned by frequency)."""
    spare = list(range(rows - 1, len(tokenizer) - 1, -1))
    special = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    ordinary = [i for i in range(min(len(tokenizer), rows) - 1, -1, -1) if i not in special]
    chosen = (spare + ordinary)[:count]
    if len(chosen) < count:
        raise UsageError("policy.codec", found=f"{count} symbols", expected=f"at most {len(chosen)}, the vocabulary's size",
                         fix="policy.backbone.symbols=new")  # fmt: skip
    return torch.tensor(chosen)
