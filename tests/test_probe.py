"""What is found out about a foreign model at load, on its weights: models spoiled on purpose, each in one way."""

import types

import pytest
import torch

from tests.families import FAMILIES
from vla.backbones import build_backbone, hf
from vla.backbones.config import HFConfig
from vla.backbones.protocol import Sizes
from vla.errors import CheckpointError

SIZES = Sizes(symbols=64, slots=12, state=4, robots=1, soft_tokens=1, state_token=True, end_token=True)


@pytest.fixture(scope="module", params=["LLaVA", "LFM2-VL"])
def folder(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    FAMILIES[request.param](out)
    return out


def load(folder, monkeypatch, spoil=None, **settings):
    """The backbone, its freshly opened weights handed to `spoil` first."""
    opened = hf._open_model

    def spoiled(*args):
        vlm = opened(*args)
        if spoil is not None:
            spoil(vlm)
        return vlm

    with monkeypatch.context() as patch:
        patch.setattr(hf, "_open_model", spoiled)
        return build_backbone(HFConfig(kind="hf", path=str(folder), image_size=32, **settings), SIZES)[0]


def wrapped(module, change):
    """`module.forward`, its keywords and its output seen by `change(forward, args, kwargs)`."""
    forward = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: change(forward, args, kwargs), module)


def pairs(mask):
    """The mask of who reads whom, also where there is one for each kind of layer."""
    return mask["full_attention"] if isinstance(mask, dict) else mask


def ahead(mask) -> bool:
    """Whether a mask lets an earlier position read a later one."""
    mask = pairs(mask)
    return isinstance(mask, torch.Tensor) and mask.ndim == 4 and mask.shape[2] > 1 and bool(mask[0, 0, -2, -1] > -1)


def only_back(vlm):
    def change(forward, args, kwargs):
        mask = kwargs.get("attention_mask")
        if ahead(mask):
            strict = pairs(mask) + torch.full(pairs(mask).shape[-2:], -1e9).triu(1)
            kwargs["attention_mask"] = {**mask, "full_attention": strict} if isinstance(mask, dict) else strict
        return forward(*args, **kwargs)

    wrapped(vlm.model.language_model, change)


def leaking(vlm):
    def change(forward, args, kwargs):
        out = forward(*args, **kwargs)
        if ahead(kwargs.get("attention_mask")):
            out.last_hidden_state = out.last_hidden_state + 0.1 * out.last_hidden_state[:, -1:]
        return out

    wrapped(vlm.model.language_model, change)


def reading_padding(vlm):
    def change(forward, args, kwargs):
        out = forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
        return out

    wrapped(vlm.model.language_model, change)


def forgetting(vlm):
    def change(forward, args, kwargs):
        out = forward(*args, **kwargs)
        if kwargs["inputs_embeds"].shape[1] == 1:
            out.last_hidden_state = out.last_hidden_state * 1.01
        return out

    wrapped(vlm.model.language_model, change)


def blind_to_the_second(vlm):
    def change(forward, args, kwargs):
        features = forward(*args, **kwargs)
        return features[:1].expand_as(features)

    wrapped(vlm.model.multi_modal_projector, change)


def blind_actions(vlm):
    """Where positions look ahead, they see a grey picture."""

    def change(forward, args, kwargs):
        if ahead(kwargs.get("attention_mask")):
            at = kwargs["input_ids"] == vlm.config.image_token_id
            kwargs["attention_mask"] = kwargs["attention_mask"].clone()
            T = at.shape[1] - SIZES.slots
            kwargs["attention_mask"][:, :, T:] += torch.where(at, -1e9, 0.0)[:, None, None]
            kwargs["attention_mask"][:, :, T:, :T] = kwargs["attention_mask"][:, :, T:, :T].masked_fill(
                torch.arange(T) > int(at.nonzero()[0, 1]), -1e9)  # fmt: skip
        return forward(*args, **kwargs)

    wrapped(vlm.model, change)


def test_a_sound_model_can_do_everything_and_costs_few_passes(folder, monkeypatch):
    calls = []

    def counting(vlm):
        def change(forward, args, kwargs):
            calls.append(kwargs["input_ids"].shape[1])
            return forward(*args, **kwargs)

        wrapped(vlm.model, change)

    model = load(folder, monkeypatch, counting)
    assert model.no_parallel == "" and model.habits.prefix == "causal"
    # Convolutions need to be told what is padding, which is the second form of mask to be tried.
    assert model.habits.mask_by_layer == bool(model._recurrent)
    assert calls.count(1) == 2 and len(calls) == (25 if model._recurrent else 15), len(calls)


@pytest.mark.parametrize(("spoil", "why"), [(only_back, "does not read the ones after it"),
                                            (leaking, "what stands before the actions changes")])  # fmt: skip
def test_a_model_that_cannot_say_a_chunk_at_once_says_so(folder, monkeypatch, spoil, why):
    assert why in load(folder, monkeypatch, spoil).no_parallel


def test_action_positions_blind_to_the_picture_are_told(tmp_path, monkeypatch):
    torch.manual_seed(0)
    FAMILIES["LLaVA"](tmp_path / "m")
    assert "does not look at the picture" in load(tmp_path / "m", monkeypatch, blind_actions).no_parallel


@pytest.mark.parametrize(("spoil", "where"), [(reading_padding, "beside padding"),
                                              (forgetting, "over a cache")])  # fmt: skip
def test_a_model_that_would_act_otherwise_than_it_learned_is_refused(folder, monkeypatch, spoil, where):
    with pytest.raises(CheckpointError, match=where):
        load(folder, monkeypatch, spoil)


def test_a_model_blind_to_its_second_picture_is_refused(tmp_path, monkeypatch):
    torch.manual_seed(0)
    FAMILIES["LLaVA"](tmp_path / "m")
    with pytest.raises(CheckpointError, match="a second picture"):
        load(tmp_path / "m", monkeypatch, blind_to_the_second)
    assert load(tmp_path / "m", monkeypatch, blind_to_the_second, probe_image=False).no_parallel == ""
