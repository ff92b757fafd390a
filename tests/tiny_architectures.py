"""Any causal architecture that transformers offers, tiny and random, with a tokenizer and rows to train on.

A size is set wherever a config has a setting of that name; what else an architecture needs stands in SPECIAL.
"""

import inspect
import json

import torch

SIZES = {
    # width and depth
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "n_embed", "embedding_size", "embedding_dim", "emb_dim",
                     "word_embed_proj_dim", "attn_hidden_size", "lru_width", "dim_model"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "ffn_hidden_size", "d_inner",
                     "dim_ff", "dff"), 128),
    "encoder_layers": 1, "encoder_ffn_dim": 32, "vocab_size": 320, "vocab_size_per_layer_input": 320,
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads"), 4),
    "num_key_value_heads": 2, "head_dim": 16, "dim_head": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_num_heads": 4, "linear_head_dim": 16,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
                     "moe_shared_expert_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    # states
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8), **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_chunk_size"), 16), "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_d_ssm": 128, "mamba_dt_rank": 4, "time_step_rank": 4, "attention_window_size": 16,
    "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 8,
    # text
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 256),
    "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 3,
}  # fmt: skip
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
CONV = {"layer_types": ["conv", "full_attention"]}
MLA = {"num_key_value_heads": 4}
DECODER = {"is_decoder": True}
SPECIAL = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3", "glm4_moe_lite", "glm_moe_dsa", "youtu",
                     "bailing_hybrid", "kimi_linear", "dots3_note_text"), MLA),
    **dict.fromkeys(("axk1", "axk2", "longcat_flash"), MLA | {"head_dim": 8}),
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
                     "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
                     "xlm-roberta", "xlm-roberta-xl"), DECODER),
    **dict.fromkeys(("gemma2", "gemma3_text", "cohere2", "olmo3", "exaone4"), SLIDING),
    "cohere_compass_text": SLIDING | {"rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in SLIDING["layer_types"]}},
    **{name: {"sliding_window": 16} for name in ("mistral", "ministral", "starcoder2", "gpt_oss")},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), LINEAR),
    **{name: {"rotary_dim": 8} for name in ("gptj", "codegen")},
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "dots1": {"layer_types": ["full_attention"] * 2, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "falcon": {"new_decoder_architecture": False, "alibi": False, "num_kv_heads": 4},
    "gemma3n_text": SLIDING | {"activation_sparsity_pattern": [0.0, 0.0], "intermediate_size": [128, 128]},
    "gemma4_text": SLIDING | {"global_head_dim": 16},
    "gpt2": {"n_inner": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "use_mamba_kernels": False},
    "lfm2": CONV | {"block_auto_adjust_ff_dim": False}, "lfm2_moe": CONV | {"num_dense_layers": 1}, "lfm3": CONV,
    "llama4_text": {"intermediate_size_mlp": 128, "interleave_moe_layer_step": 2, "attention_chunk_size": 32},
    "mamba": {"use_mambapy": False},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "minimax": LINEAR | {"block_size": 16},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mpt": {"expansion_ratio": 2},
    "phi3": {"sliding_window": None},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [16, 16],
                 "feed_forward_size": 128, "axial_pos_embds_dim": [32, 32], "attention_head_size": 16},
    "rwkv": {"context_length": 256, "attention_hidden_size": 64},
    "xlstm": {"num_heads": 4},
    "xmod": DECODER | {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attn_layer_period": 2,
              "attn_layer_offset": 1, "n_mamba_heads": 2, "attention_hidden_size": 128, "attention_head_dim": 32,
              "mamba_dt_rank": 4, "mamba_d_state": 16},
    "zamba2": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1,
               "hybrid_layer_ids": [1]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

IMAGE = {"image_token_id": 301, "video_token_id": 302, "vision_start_token_id": 303, "vision_end_token_id": 304}
GEMMA4 = {"boi_token_id": 301, "eoi_token_id": 302, "image_token_id": 303, "video_token_id": 304, "boa_token_id": 305,
          "eoa_token_index": 306, "audio_token_id": 307, "audio_config": None}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"image_size": 28, "patch_size": 14}
QWEN = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
# Of models with more than a text half: the half's type, the settings of the vision tower, those of the whole.
MULTIMODAL = {
    "gemma3": ("gemma3_text", TOWER | PATCHES | {"model_type": "siglip_vision_model", "vision_use_head": False},
               {"boi_token_index": 301, "eoi_token_index": 302, "image_token_index": 303, "mm_tokens_per_image": 4}),
    "gemma4": ("gemma4_text", TOWER | {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 32},
               GEMMA4),
    "llama4": ("llama4_text", TOWER | PATCHES | {"intermediate_size": 128, "vision_output_dim": 32,
                                                 "projector_input_dim": 32, "projector_output_dim": 32},
               {"boi_token_index": 301, "eoi_token_index": 302, "image_token_index": 303}),
    "mistral3": ("ministral3", TOWER | PATCHES | {"model_type": "pixtral"}, {"image_token_index": 301}),
    "mllama": ("mllama_text_model", PATCHES | TOWER | {
        "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 64, "intermediate_layers_indices": [0],
        "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}, {"image_token_index": 301}),
    "qwen2_5_vl": ("qwen2_5_vl_text", QWEN, IMAGE),
    "qwen3_5": ("qwen3_5_text", QWEN | {"num_position_embeddings": 64}, IMAGE),
    "qwen3_5_moe": ("qwen3_5_moe_text", QWEN | {"num_position_embeddings": 64}, IMAGE),
    "qwen3_vl": ("qwen3_vl_text", QWEN | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}, IMAGE),
}  # fmt: skip
CHAT = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")  # fmt: skip


def settings(kind: type, name: str) -> dict:
    """The settings that make a config of this class tiny."""
    known = {key for k in kind.__mro__ for key in getattr(k, "__annotations__", {})}
    known |= {key for k in kind.__mro__ if "__init__" in vars(k) for key in inspect.signature(k.__init__).parameters}
    aliases = getattr(kind, "attribute_map", None) or {}
    chosen = {key: value for key, value in SIZES.items() if key in known | set(aliases)}
    for alias, real in aliases.items():
        if alias in chosen and real in chosen and alias != real:
            del chosen[alias]
    return chosen | SPECIAL.get(name, {})


def config_of(name: str):
    """A tiny config of the architecture, of the whole model for those of MULTIMODAL."""
    from transformers import CONFIG_MAPPING

    if name not in MULTIMODAL:
        return CONFIG_MAPPING[name](**settings(CONFIG_MAPPING[name], name))
    text, vision, whole = MULTIMODAL[name]
    part = settings(CONFIG_MAPPING[text], text) | {"model_type": text}
    if text in ("qwen2_5_vl_text", "qwen3_vl_text"):
        part["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = CONFIG_MAPPING[name](text_config=part, vision_config=vision, **whole)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 2, 3, 0
    return config


def make(name: str, directory) -> str:
    """Write the model and a tokenizer into `directory`; returns the class that it was built as."""
    import transformers

    torch.manual_seed(0)
    config = config_of(name)
    kind = transformers.AutoModelForImageTextToText if name in MULTIMODAL else transformers.AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return type(model).__name__


def tokenizer():
    """Bytes, and what a chat needs: 260 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    bytes_.pre_tokenizer, bytes_.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytes_.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=special[2], bos_token=special[0],
                                   pad_token=special[3])  # fmt: skip
    fast.chat_template = CHAT
    return fast


def write_rows(path) -> str:
    with open(path, "w", encoding="utf-8") as file:
        for number in range(8):
            color, thing = ("red", "blue", "green", "black")[number % 4], ("lamp", "door")[number // 4]
            chat = [("user", f"{thing} {color}"), ("assistant", f"{thing}={color}")]
            messages = [{"role": role, "content": content} for role, content in chat]
            file.write(json.dumps({"messages": messages}) + "\n")
    return str(path)
