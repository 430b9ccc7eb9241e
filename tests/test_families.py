"""Real families of vision-language models, small and random, through everything a policy does with its backbone."""

import json

import numpy as np
import pytest
import torch

from tests.families import FAMILIES
from tests.test_policy import mixture, observation  # noqa: F401
from vla.batch import collate
from vla.errors import CheckpointError, VLAError
from vla.policy import AdapterConfig, PolicyConfig, build_policy, load_policy, save_policy
from vla.policy.adapters import adapt

DONE: dict[str, list[str]] = {}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    FAMILIES[request.param](folder)
    return request.param, folder


def made(family, mixture, **settings):  # noqa: F811
    torch.manual_seed(1)
    backbone = {"kind": "hf", "path": str(family[1]), "image_size": 32, **settings.pop("backbone", {})}
    config = PolicyConfig.model_validate({"backbone": backbone, "chunk": 4, "execute": 1, "soft_tokens": 2, "decode": "argmax",
                                          **settings})  # fmt: skip
    return build_policy(config, mixture)


@pytest.mark.parametrize("decoding", ["autoregressive", "parallel"])
def test_a_family_learns_acts_and_comes_back(family, mixture, tmp_path, decoding):  # noqa: F811
    policy = made(family, mixture, decoding=decoding).train()
    examples = [policy.encode(mixture.window(n)) for n in range(3)]
    batch = policy.collate(examples)
    loss = policy.loss(batch)
    loss.total(policy.loss_weights, loss.counts).backward()
    parts = {name: prefixes for name, prefixes in policy.model.parts.items() if prefixes}
    assert {"vision", "language"} <= parts.keys()
    for part, prefixes in parts.items():
        reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for n, p in policy.model.named_parameters()
                   if n.startswith(prefixes)]  # fmt: skip
        assert any(reached), f"no gradient reaches {part}"
    for name in policy.model.tables:
        if decoding == "parallel" or name != "slots":
            assert policy.model.get_parameter(name).grad is not None, name
    policy.eval()
    # Each row alone and all together, sentences of different lengths padded on the left, say the same.
    with torch.inference_mode():
        together = policy.action_logits(batch)
        for row, example in enumerate(examples):
            alone = policy.action_logits(policy.collate([example]))[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-3)
    # Decoding over a cache says what the whole pass says, given what was said.
    told = ["touch the red cube", "push the blue cube left"]
    chunks = policy.act_batch([observation(mixture)] * 2, told, "tabletop")
    for chunk, words in zip(chunks, told, strict=True):
        example = policy.encoder.observation(observation(mixture), words, "tabletop")
        whole = policy.collate([example])
        whole = type(whole)(**{**whole.__dict__, "symbols": torch.from_numpy(chunk.symbols.reshape(1, -1))})
        assert np.array_equal(policy.action_logits(whole).argmax(-1).reshape(chunk.symbols.shape).numpy(), chunk.symbols)
        assert np.isfinite(chunk.actions).all() and 0 <= chunk.confidence.min() <= chunk.confidence.max() <= 1
    save_policy(policy, tmp_path / "policy")
    again = load_policy(tmp_path / "policy", "cpu")
    assert again.fingerprint == policy.fingerprint
    with torch.inference_mode():
        assert torch.equal(again.action_logits(batch), policy.action_logits(batch))
    DONE.setdefault(family[0], []).append(decoding)


def test_a_family_takes_lora(family, mixture, tmp_path):  # noqa: F811
    policy = made(family, mixture)
    adapt(policy, AdapterConfig(rank=2), {"kind": "model", "path": str(family[1])}).train()
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    for step in range(2):  # the second matrix is zero at first, and stops the first one's gradient
        loss = policy.loss(policy.collate([policy.encode(mixture.window(step))]))
        loss.total(policy.loss_weights, loss.counts).backward()
        optimizer.step()
        optimizer.zero_grad()
    chunk = policy.eval().act(observation(mixture), "touch the red cube", "tabletop")
    save_policy(policy, tmp_path / "adapter")
    again = load_policy(tmp_path / "adapter", "cpu")
    np.testing.assert_array_equal(again.act(observation(mixture), "touch the red cube", "tabletop").actions, chunk.actions)
    DONE.setdefault(family[0], []).append("LoRA")


def test_symbols_take_spare_rows_first_then_the_least_used(family, mixture):  # noqa: F811
    policy = made(family, mixture)
    from vla.backbones.hf import least_used

    tokenizer = policy.writer.processor.tokenizer  # pyright: ignore
    rows = policy.model.vocabulary
    ids = least_used(tokenizer, rows, 256).tolist()
    assert ids[:3] == [rows - 1, rows - 2, rows - 3] and len(set(ids)) == 256
    assert not set(ids) & (set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values()))
    head = policy.model.vlm.get_output_embeddings().weight
    assert torch.equal(policy.model.symbols_out, head[ids].float())
    new = made(family, mixture, backbone={"symbols": "new"})
    assert not torch.equal(new.model.symbols_out, policy.model.symbols_out)


def test_a_model_blind_to_its_picture_is_refused(tmp_path, mixture):  # noqa: F811
    torch.manual_seed(0)
    FAMILIES["LLaVA"](tmp_path / "blind")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "blind/model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "multi_modal_projector" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="looks at its picture"):
        made(("LLaVA", tmp_path / "blind"), mixture)
    made(("LLaVA", tmp_path / "blind"), mixture, backbone={"probe_image": False})


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, mixture):  # noqa: F811
    torch.manual_seed(0)
    FAMILIES["LLaVA"](tmp_path / "m")
    tokenizer = json.loads((tmp_path / "m/tokenizer.json").read_text())
    for i in range(100):
        tokenizer["added_tokens"].append({"id": 600 + i, "content": f"<more{i}>", "single_word": False, "lstrip": False,
                                          "rstrip": False, "normalized": False, "special": False})  # fmt: skip
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match="a tokenizer of 700 ids over 640 embeddings"):
        made(("LLaVA", tmp_path / "m"), mixture)


def test_what_is_no_such_model_is_refused(tmp_path, mixture):  # noqa: F811
    with pytest.raises(VLAError):
        made(("nothing", tmp_path / "nothing"), mixture)


def test_positions_nobody_has_are_left_out_where_they_would_stand(family, mixture):  # noqa: F811
    """Four of six action dimensions, two left out of a parallel pass: the others stay where they stood, on one axis or three."""
    policy = made(family, mixture, action_dim=6).eval()
    example = policy.encode(mixture.window(0))
    if not policy.narrows:  # told by probing
        assert not policy.model.attention_only and policy.collate([example]).symbols.shape == (1, 24)
        return
    narrow, wide = policy.collate([example]), collate([example], policy.writer.ids.pad)
    assert narrow.symbols.shape == (1, 16) and wide.symbols.shape == (1, 24)
    with torch.inference_mode():
        left, whole = policy.action_logits(narrow), policy.action_logits(wide).view(4, 6, -1)[:, :4]
    torch.testing.assert_close(left.view(whole.shape), whole, rtol=1e-3, atol=1e-3)
