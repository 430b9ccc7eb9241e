"""Folders in OpenVLA's layout for tests: names and shapes as the published checkpoint has them, written out by hand.

Nothing here uses the model's own code: what it reads and what it should hold come from two sources.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

Shapes = dict[str, tuple[int, ...]]
Q01 = [-0.02872725307941437, -0.04170349963009357, -0.026093858778476715, -0.08092105075716972, -0.09288699507713317,
       -0.20718276381492615, 0.0]  # fmt: skip
Q99 = [0.028309678435325586, 0.040855254605412394, 0.040161586627364146, 0.08192047759890528, 0.07792850524187081,
       0.20382574498653397, 1.0]  # fmt: skip
TINY = {
    "dino": dict(width=16, depth=3, mlp=64, patches=4, heads=2),
    "siglip": dict(width=24, depth=4, mlp=89, patches=4, heads=2),
    "text": dict(width=32, mlp=48, layers=2, heads=4),
}
FULL = {
    "dino": dict(width=1024, depth=24, mlp=4096, patches=256),
    "siglip": dict(width=1152, depth=27, mlp=4304, patches=256),
    "text": dict(width=4096, mlp=11008, layers=32),
}
"""openvla-7b."""


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def pair(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def blocks(prefix: str, width: int, depth: int, mlp: int, scaled: bool) -> Shapes:
    shapes: Shapes = {}
    for i in range(depth):
        at = f"{prefix}blocks.{i}."
        shapes |= pair(f"{at}norm1", width) | pair(f"{at}norm2", width)
        shapes |= linear(f"{at}attn.qkv", 3 * width, width) | linear(f"{at}attn.proj", width, width)
        shapes |= linear(f"{at}mlp.fc1", mlp, width) | linear(f"{at}mlp.fc2", width, mlp)
        if scaled:
            shapes |= {f"{at}ls1.scale_factor": (width,), f"{at}ls2.scale_factor": (width,)}
    return shapes


def dino(prefix: str, width: int, depth: int, mlp: int, patches: int, heads: int = 0) -> Shapes:
    shapes: Shapes = {f"{prefix}cls_token": (1, 1, width), f"{prefix}reg_token": (1, 4, width),
                      f"{prefix}pos_embed": (1, patches, width), f"{prefix}patch_embed.proj.weight": (width, 3, 14, 14),
                      f"{prefix}patch_embed.proj.bias": (width,)}  # fmt: skip
    return shapes | blocks(prefix, width, depth, mlp, True) | pair(f"{prefix}norm", width)


def siglip(prefix: str, width: int, depth: int, mlp: int, patches: int, heads: int = 0) -> Shapes:
    shapes: Shapes = {f"{prefix}pos_embed": (1, patches, width), f"{prefix}patch_embed.proj.weight": (width, 3, 14, 14),
                      f"{prefix}patch_embed.proj.bias": (width,)}  # fmt: skip
    shapes |= blocks(prefix, width, depth, mlp, False) | pair(f"{prefix}norm", width)
    pool = f"{prefix}attn_pool."
    shapes |= {f"{pool}latent": (1, 1, width)} | linear(f"{pool}q", width, width) | linear(f"{pool}kv", 2 * width, width)
    shapes |= linear(f"{pool}proj", width, width) | pair(f"{pool}norm", width)
    return shapes | linear(f"{pool}mlp.fc1", mlp, width) | linear(f"{pool}mlp.fc2", width, mlp)


def llama(width: int, mlp: int, layers: int, vocab: int, heads: int = 0) -> Shapes:
    base = "language_model."
    shapes: Shapes = {f"{base}model.embed_tokens.weight": (vocab, width), f"{base}lm_head.weight": (vocab, width),
                      f"{base}model.norm.weight": (width,)}  # fmt: skip
    for i in range(layers):
        at = f"{base}model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        shapes |= {f"{at}mlp.gate_proj.weight": (mlp, width), f"{at}mlp.up_proj.weight": (mlp, width),
                   f"{at}mlp.down_proj.weight": (width, mlp)}  # fmt: skip
        shapes |= {f"{at}input_layernorm.weight": (width,), f"{at}post_attention_layernorm.weight": (width,)}
    return shapes


def layout(sizes: dict[str, dict[str, int]], vocab: int, fused: bool = True) -> Shapes:
    """name -> shape of every tensor of a checkpoint; `vocab` is the padded one."""
    base, d = "vision_backbone.", sizes["text"]["width"]
    if fused:
        vision = sizes["dino"]["width"] + sizes["siglip"]["width"]
        shapes = dino(f"{base}featurizer.", **sizes["dino"]) | siglip(f"{base}fused_featurizer.", **sizes["siglip"])
        shapes |= linear("projector.fc1", 4 * vision, vision) | linear("projector.fc2", d, 4 * vision)
        shapes |= linear("projector.fc3", d, d)
    else:
        shapes = siglip(f"{base}featurizer.", **sizes["siglip"])
        shapes |= linear("projector.fc1", d, sizes["siglip"]["width"]) | linear("projector.fc2", d, d)
    return shapes | llama(**sizes["text"], vocab=vocab)


def random_tensors(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Numbers that keep signals alive: gains near 1, matrices by their fan-in."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=draw)
        if len(shape) == 1:
            noise = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        elif "embed" not in name and "token" not in name and "latent" not in name:
            noise *= 1.5 * torch.Size(shape[1:]).numel() ** -0.5
        tensors[name] = noise.to(dtype)
    return tensors


def tokenizer_of(vocab: int, empty: int | None = None) -> Tokenizer:
    """Llama's kind of tokenizer with `vocab` pieces and `<PAD>` after them; `empty` is the id of the lone word boundary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [chr(c) for c in range(33, 127)] + ["\n"]
    rest = (chr(0xF0000 + i) for i in range(vocab))
    if empty is None:
        pieces.append("\u2581")
    while len(pieces) < vocab:
        pieces.append("\u2581" if len(pieces) == empty else next(rest))
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True,
                                     fuse_unk=True))  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])  # pyright: ignore
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyright: ignore
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])  # pyright: ignore # fmt: skip
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>", "<PAD>")])
    return tokenizer


def statistics(width: int = 7, proprio: int | None = None, seed: int = 0) -> dict:
    """One dataset's entry; the width of 7 with bridge_orig's published quantiles."""
    draw = torch.Generator().manual_seed(seed)
    low = Q01 if width == 7 else (-torch.rand(width, generator=draw)).tolist()
    high = Q99 if width == 7 else (torch.rand(width, generator=draw) + 0.1).tolist()
    mask = [True] * (width - 1) + [False] if width == 7 else [True] * width
    action = {"mean": [0.0] * width, "std": [0.1] * width, "max": [1.0] * width, "min": [-1.0] * width, "q01": low, "q99": high,
              "mask": mask}  # fmt: skip
    state = {k: [0.0] * width for k in ("mean", "std", "max", "min", "q01", "q99")}
    if proprio:
        state = {"mean": [0.0] * proprio, "std": [1.0] * proprio, "max": [2.0] * proprio, "min": [-2.0] * proprio,
                 "q01": [-1.5] * proprio, "q99": [1.25] * proprio}  # fmt: skip
    return {"action": action, "proprio": state, "num_transitions": 2135463, "num_trajectories": 60064}


def write_tiny(
    folder: Path, *, fused: bool = True, vocab: int = 640, empty: int | None = None, shards: int = 1, seed: int = 0,
    dtype: torch.dtype = torch.float32, norm_stats: dict | None = None, sizes: dict | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A small folder in OpenVLA's layout; returns its tensors. Pictures of 28 x 28 are 4 tokens each."""
    sizes = sizes or TINY
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(layout(sizes, vocab + 64, fused), seed, dtype)
    names = sorted(tensors)
    parts = [names[i::shards] for i in range(shards)]
    table = {}
    for i, part in enumerate(parts, 1):
        name = "model.safetensors" if shards == 1 else f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in part}, folder / name, metadata={"format": "pt"})
        table |= dict.fromkeys(part, name)
    if shards > 1:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    text, towers = sizes["text"], ["dino", "siglip"] if fused else ["siglip"]
    ids = {"dino": "vit_large_patch14_reg4_dinov2.lvd142m", "siglip": "vit_so400m_patch14_siglip_224"}
    side = 14 * round(sizes["siglip"]["patches"] ** 0.5)
    config = {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla",
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig",
                     "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction"},
        "vision_backbone_id": "dinosiglip-vit-so-224px" if fused else "siglip-vit-so400m",
        "llm_backbone_id": "llama2-7b-pure" if fused else "vicuna-v15-7b",
        "arch_specifier": "no-align+fused-gelu-mlp" if fused else "no-align+gelu-mlp", "use_fused_vision_backbone": fused,
        "image_resize_strategy": "resize-naive", "timm_model_ids": [ids[t] for t in towers],
        "timm_override_act_layers": [None for _ in towers], "image_sizes": [side for _ in towers],
        "tower_args": [{"embed_dim": sizes[t]["width"], "depth": sizes[t]["depth"], "num_heads": sizes[t]["heads"]}
                       for t in towers],
        "hf_llm_id": "meta-llama/Llama-2-7b-hf", "llm_max_length": 2048, "pad_token_id": vocab, "pad_to_multiple_of": 64,
        "n_action_bins": 256, "output_projector_states": False, "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.40.1",
        "text_config": {"model_type": "llama", "vocab_size": vocab + 64, "pad_token_id": vocab, "hidden_size": text["width"],
                        "intermediate_size": text["mlp"], "num_hidden_layers": text["layers"],
                        "num_attention_heads": text["heads"], "torch_dtype": "bfloat16"},
        "norm_stats": norm_stats if norm_stats is not None else {"bridge_orig": statistics(), "kuka": statistics(seed=1)},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    mean = {"dino": [0.485, 0.456, 0.406], "siglip": [0.5, 0.5, 0.5]}
    std = {"dino": [0.229, 0.224, 0.225], "siglip": [0.5, 0.5, 0.5]}
    images = {"image_processor_type": "PrismaticImageProcessor", "image_resize_strategy": "resize-naive",
              "input_sizes": [[3, side, side] for _ in towers], "interpolations": ["bicubic" for _ in towers],
              "means": [mean[t] for t in towers], "stds": [std[t] for t in towers],
              "use_fused_vision_backbone": fused}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    tokenizer_of(vocab, empty).save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<PAD>",
               "auto_map": {"AutoProcessor": "processing_prismatic.PrismaticProcessor"},
               "processor_class": "PrismaticProcessor"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "added_tokens.json").write_text(json.dumps({"<PAD>": vocab}))
    return tensors


def write_oft(
    folder: Path, *, dims: int = 7, proprio: int = 8, film: bool = True, rank: int = 2, keys: tuple[str, ...] = ("libero",),
    head: bool = True,
) -> dict[str, dict[str, torch.Tensor]]:  # fmt: skip
    """A small OFT folder beside `write_tiny`'s: file kind -> its tensors, without `module.`; the towers' with adapters of `rank`.

    Written as torch writes them, names as data-parallel training leaves them.
    """
    stats = {key: statistics(dims, proprio, seed) for seed, key in enumerate(keys)}
    tensors = write_tiny(folder, norm_stats={"bridge_orig": statistics()})
    (folder / "dataset_statistics.json").write_text(json.dumps(stats, indent=2))
    d = TINY["text"]["width"]
    shapes: dict[str, Shapes] = {"proprio_projector": linear("fc1", d, proprio) | linear("fc2", d, d)}
    if head:
        norms = pair("model.layer_norm1", d * dims) | pair("model.layer_norm2", d)
        shapes["action_head"] = norms | linear("model.fc1", d, d * dims) | linear("model.fc2", dims, d)
        for i in range(2):
            at = f"model.mlp_resnet_blocks.{i}.ffn."
            shapes["action_head"] |= pair(f"{at}0", d) | linear(f"{at}1", d, d)
    files = {kind: random_tensors(s, 7 + i) for i, (kind, s) in enumerate(shapes.items())}
    if film:
        files["vision_backbone"] = _filmed(tensors, d, rank)
    for kind, found in files.items():
        torch.save({f"module.{k}": v for k, v in found.items()}, folder / f"{kind}--150_checkpoint.pt")
    return {"model": tensors, **files}


def _filmed(tensors: dict[str, torch.Tensor], d: int, rank: int) -> dict[str, torch.Tensor]:
    """The towers as OFT saves them: blocks wrapped, projections with LoRA beside their base, scale and shift for each block."""
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith("vision_backbone."):
            continue
        head, dot, rest = name.partition(".blocks.")
        wrapped = f"{head}{dot}{rest.split('.')[0]}.block.{rest.partition('.')[2]}" if dot else name
        if wrapped.endswith(("attn.qkv.weight", "patch_embed.proj.weight")):
            stem = wrapped.removesuffix(".weight")
            draw = torch.Generator().manual_seed(len(found))
            down = torch.randn(rank, *tensor.shape[1:], generator=draw) * 0.1
            up = torch.randn(tensor.shape[0], rank, *[1] * (tensor.ndim - 2), generator=draw) * 0.1
            found |= {f"{stem}.base_layer.weight": tensor, f"{stem}.lora_A.default.weight": down,
                      f"{stem}.lora_B.default.weight": up}  # fmt: skip
        elif wrapped.endswith(("attn.qkv.bias", "patch_embed.proj.bias")):
            found[wrapped.replace(".bias", ".base_layer.bias")] = tensor
        else:
            found[wrapped] = tensor
    shapes: Shapes = {}
    for tower, sizes in (("featurizer", TINY["dino"]), ("fused_featurizer", TINY["siglip"])):
        for i in range(sizes["depth"]):
            at = f"vision_backbone.{tower}.blocks.{i}."
            shapes |= linear(f"{at}scale", sizes["width"], d) | linear(f"{at}shift", sizes["width"], d)
    return found | {k: 0.3 * v for k, v in random_tensors(shapes, 99).items()}
