"""Small random checkpoints of real families, with the true architecture and a true processor: all of it made here, offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

tf: Any = transformers  # its lazily made classes carry no types a checker can follow
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template of the usual kind; IMAGE becomes what the family writes for a picture."""


def tokenizer(special: list[str], **roles: str) -> Any:
    """Bytes and a few merges, and the special tokens a family needs. Exactly 600 ids, so that 40 rows of 640 stay spare."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", *special]
    text = ["pick up the red cube and put it into the bowl, then push the green one to the left of the drawer"] * 4
    text += [f"{a}{b}{c} " * 2 for a in "abcdefghij" for b in "klmnopqrst" for c in "uvwxyz"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(text, trainers.BpeTrainer(vocab_size=600 - len(names), initial_alphabet=alphabet,
                                                      show_progress=False, min_frequency=1))  # fmt: skip
    made = tf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", **roles)
    made.add_special_tokens({"additional_special_tokens": names[3:]})  # pyright: ignore
    return made


TEXT: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, vocab_size=640, max_position_embeddings=512, pad_token_id=0,
                            bos_token_id=1, eos_token_id=2)  # fmt: skip
VISION: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def smolvlm(folder: Path) -> None:
    words = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    words += [f"<row_{r}_col_{c}>" for r in range(1, 3) for c in range(1, 3)]
    tok = tokenizer(words)
    pictures = tf.SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False)
    processor = tf.SmolVLMProcessor(pictures, tok, tf.SmolVLMVideoProcessor(), image_seq_len=4,
                                    chat_template=CHAT.replace("IMAGE", "<image>"))  # fmt: skip
    config = tf.SmolVLMConfig(
        text_config=dict(model_type="llama", **TEXT), vision_config=dict(**VISION, image_size=32, patch_size=8), scale_factor=2,
        image_token_id=tok.convert_tokens_to_ids("<image>"), tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    _save(folder, tf.SmolVLMForConditionalGeneration(config), processor)


def _qwen(folder: Path, kind: str) -> None:
    tok = tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    sides = {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
    ids = {f"{a}_token_id": tok.convert_tokens_to_ids(f"<|{b}|>")
           for a, b in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
                        ("vision_end", "vision_end"))}  # fmt: skip
    template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    vision = dict(depth=2, hidden_size=32, num_heads=4, patch_size=8, spatial_merge_size=2, temporal_patch_size=2,
                  out_hidden_size=32, intermediate_size=64)  # fmt: skip
    if kind == "2.5":
        pictures = tf.Qwen2VLImageProcessor(size=sides, patch_size=8, merge_size=2, temporal_patch_size=2)
        video = tf.Qwen2VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2)
        processor: Any = tf.Qwen2_5_VLProcessor(pictures, tok, video, chat_template=template)
        rope = dict(rope_type="default", mrope_section=[1, 1, 2], rope_theta=10000.0)
        config: Any = tf.Qwen2_5_VLConfig(
            text_config=dict(**TEXT, rope_parameters=rope),
            vision_config=dict(**vision, window_size=32, fullatt_block_indexes=[1]), **ids)  # fmt: skip
        model: Any = tf.Qwen2_5_VLForConditionalGeneration(config)
    else:
        pictures = tf.Qwen2VLImageProcessor(size=sides, patch_size=8, merge_size=2, temporal_patch_size=2)
        video = tf.Qwen3VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2)
        processor = tf.Qwen3VLProcessor(pictures, tok, video, chat_template=template)
        rope = dict(rope_type="default", mrope_section=[2, 1, 1], mrope_interleaved=True, rope_theta=10000.0)
        config = tf.Qwen3VLConfig(
            text_config=dict(**TEXT, head_dim=8, rope_parameters=rope),
            vision_config=dict(**vision, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]), **ids)  # fmt: skip
        model = tf.Qwen3VLForConditionalGeneration(config)
    _save(folder, model, processor)


def qwen2_5_vl(folder: Path) -> None:
    _qwen(folder, "2.5")


def qwen3_vl(folder: Path) -> None:
    _qwen(folder, "3")


def paligemma2(folder: Path) -> None:
    tok = tokenizer(["<image>", *[f"<loc{i:04d}>" for i in range(4)]])
    pictures = tf.SiglipImageProcessor(size={"height": 32, "width": 32})
    pictures.image_seq_length = 16  # pyright: ignore
    processor = tf.PaliGemmaProcessor(pictures, tok)
    config = tf.PaliGemmaConfig(
        text_config=dict(model_type="gemma2", **TEXT | {"vocab_size": 1800}, head_dim=8, query_pre_attn_scalar=8,
                         sliding_window=64),
        vision_config=dict(model_type="siglip_vision_model", **VISION, image_size=32, patch_size=8),
        image_token_index=tok.convert_tokens_to_ids("<image>"), projection_dim=32,
    )  # fmt: skip
    _save(folder, tf.PaliGemmaForConditionalGeneration(config), processor)


def gemma3(folder: Path) -> None:
    tok = tokenizer(["<start_of_image>", "<end_of_image>", "<image_soft_token>"])
    for name, word in (("boi", "<start_of_image>"), ("eoi", "<end_of_image>"), ("image", "<image_soft_token>")):
        setattr(tok, f"{name}_token", word)
        setattr(tok, f"{name}_token_id", tok.convert_tokens_to_ids(word))
    words = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    tok.init_kwargs |= words
    tok._set_model_specific_special_tokens(words)  # pyright: ignore
    pictures = tf.Gemma3ImageProcessor(size={"height": 32, "width": 32}, image_seq_length=4)
    processor = tf.Gemma3Processor(pictures, tok, image_seq_length=4, chat_template=CHAT.replace("IMAGE", "<start_of_image>"))
    config = tf.Gemma3Config(
        text_config=dict(**TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=64,
                         layer_types=["sliding_attention", "full_attention"]),
        vision_config=dict(**VISION, image_size=32, patch_size=8), mm_tokens_per_image=4,
        image_token_index=tok.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tok.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tok.convert_tokens_to_ids("<end_of_image>"),
    )  # fmt: skip
    _save(folder, tf.Gemma3ForConditionalGeneration(config), processor)


def internvl(folder: Path) -> None:
    words = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>")
    tok = tokenizer(list(words.values()))
    tok._set_model_specific_special_tokens(words)  # pyright: ignore
    tok.init_kwargs |= words
    pictures = tf.GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=False)
    processor = tf.InternVLProcessor(pictures, tok, tf.InternVLVideoProcessor(), image_seq_length=4,
                                     chat_template=CHAT.replace("IMAGE", "<IMG_CONTEXT>\n"))  # fmt: skip
    config = tf.InternVLConfig(
        text_config=dict(model_type="qwen2", **TEXT), image_seq_length=4, downsample_ratio=0.5,
        vision_config=dict(**VISION, image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )  # fmt: skip
    _save(folder, tf.InternVLForConditionalGeneration(config), processor)


def llava_onevision(folder: Path) -> None:
    tok = tokenizer(["<image>", "<video>"])
    pictures = tf.LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 32]])
    processor = tf.LlavaOnevisionProcessor(pictures, tok, tf.LlavaOnevisionVideoProcessor(), num_image_tokens=16,
                                           vision_feature_select_strategy="full",
                                           chat_template=CHAT.replace("IMAGE", "<image>"))  # fmt: skip
    config = tf.LlavaOnevisionConfig(
        text_config=dict(model_type="qwen2", **TEXT), image_grid_pinpoints=[[32, 32]],
        vision_config=dict(model_type="siglip_vision_model", **VISION, image_size=32, patch_size=8, vision_use_head=False),
        image_token_index=tok.convert_tokens_to_ids("<image>"), video_token_index=tok.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    _save(folder, tf.LlavaOnevisionForConditionalGeneration(config), processor)


def llava(folder: Path) -> None:
    tok = tokenizer(["<image>"])
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = tf.LlavaProcessor(pictures, tok, patch_size=8, vision_feature_select_strategy="default",
                                  num_additional_image_tokens=1,
                                  chat_template=CHAT.replace("IMAGE", "<image>\n"))  # fmt: skip
    config = tf.LlavaConfig(
        text_config=dict(model_type="llama", **TEXT), image_token_index=tok.convert_tokens_to_ids("<image>"),
        vision_config=dict(model_type="clip_vision_model", **VISION, image_size=32, patch_size=8, projection_dim=32),
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    _save(folder, tf.LlavaForConditionalGeneration(config), processor)


def lfm2_vl(folder: Path) -> None:
    """Short convolutions between attention layers: part of it only looks back."""
    tok = tokenizer(["<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"])
    pictures = tf.Lfm2VlImageProcessor(encoder_patch_size=8, downsample_factor=2, min_image_tokens=4, max_image_tokens=4,
                                       do_image_splitting=False, use_thumbnail=False, tile_size=32,
                                       size={"height": 32, "width": 32})  # fmt: skip
    processor = tf.Lfm2VlProcessor(pictures, tok, chat_template=CHAT.replace("IMAGE", "<image>"))
    config = tf.Lfm2VlConfig(
        text_config=dict(model_type="lfm2", **TEXT | {"num_hidden_layers": 3}, layer_types=["conv", "full_attention", "conv"],
                         block_auto_adjust_ff_dim=False, conv_L_cache=3),
        vision_config=dict(model_type="siglip2_vision_model", **VISION, num_patches=16, patch_size=8, vision_use_head=False),
        image_token_id=tok.convert_tokens_to_ids("<image>"), projector_hidden_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    _save(folder, tf.Lfm2VlForConditionalGeneration(config), processor)


def fastvlm(folder: Path) -> None:
    tok = tokenizer(["<image>"])
    pictures = tf.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.0] * 3,
                                     image_std=[1.0] * 3)  # fmt: skip
    processor = tf.LlavaProcessor(pictures, tok, patch_size=32, vision_feature_select_strategy="full",
                                  num_additional_image_tokens=0, chat_template=CHAT.replace("IMAGE", "<image>\n"))  # fmt: skip
    config = tf.FastVlmConfig(
        text_config=dict(model_type="qwen2", **TEXT), image_token_index=tok.convert_tokens_to_ids("<image>"), image_seq_length=4,
        vision_config=dict(model_type="timm_wrapper", architecture="fastvit_t8", do_pooling=True, global_pool="avg",
                           hidden_size=64, model_args=dict(inference_mode=True, layers=(1, 1, 1, 1), embed_dims=(8, 8, 16, 32))),
    )  # fmt: skip
    _save(folder, tf.FastVlmForConditionalGeneration(config), processor)


def gemma4(folder: Path) -> None:
    """As its small ones: a causal prefix, embeddings per layer, keys and values shared between layers."""
    words = dict(boi_token="<|image>", eoi_token="<image|>", image_token="<|image|>", audio_token="<|audio|>",
                 boa_token="<|audio>", eoa_token="<audio|>")  # fmt: skip
    tok = tokenizer([*words.values(), "<|video|>"])
    tok.init_kwargs |= words
    tok._set_model_specific_special_tokens(words)  # pyright: ignore
    processor = tf.Gemma4Processor(
        tf.Gemma4AudioFeatureExtractor(), tf.Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70, pooling_kernel_size=2), tok,
        tf.Gemma4VideoProcessor(patch_size=4, pooling_kernel_size=2), chat_template=CHAT.replace("IMAGE", "<|image|>"),
    )  # fmt: skip
    named = ("boi", "eoi", "image", "boa", "audio")
    ids = {f"{name}_token_id": tok.convert_tokens_to_ids(words[f"{name}_token"]) for name in named}
    config = tf.Gemma4Config(
        text_config=dict(**TEXT | {"num_hidden_layers": 4}, head_dim=8, global_head_dim=8, sliding_window=256,
                         vocab_size_per_layer_input=640, hidden_size_per_layer_input=8, num_kv_shared_layers=2,
                         layer_types=["sliding_attention", "full_attention"] * 2),
        vision_config=dict(**VISION, num_key_value_heads=4, head_dim=8, patch_size=4, pooling_kernel_size=2,
                           position_embedding_size=64),
        audio_config=None, video_token_id=tok.convert_tokens_to_ids("<|video|>"),
        eoa_token_index=tok.convert_tokens_to_ids("<audio|>"), **ids,
    )  # fmt: skip
    _save(folder, tf.Gemma4ForConditionalGeneration(config), processor)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "SmolVLM": smolvlm, "Qwen2.5-VL": qwen2_5_vl, "Qwen3-VL": qwen3_vl, "PaliGemma 2": paligemma2, "Gemma 3": gemma3,
    "Gemma 4": gemma4, "InternVL": internvl, "LLaVA-OneVision": llava_onevision, "LLaVA": llava, "FastVLM": fastvlm,
    "LFM2-VL": lfm2_vl,
}  # fmt: skip


def _save(folder: Path, model: Any, processor: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # random weights that do something: the defaults hardly move anything
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.2 if "embed_tokens" in name else 0.15)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
