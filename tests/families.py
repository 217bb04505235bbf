"""Tiny random models of every causal language model family that the installed transformers offers.

A family is a key of transformers' MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, or one of the encoders and encoder-decoders
in `OTHERS`. `build` makes its config small by setting what the config class has a field for (`SIZES`), keeps one
layer of each kind that the family's own default has, and adds what `OVERRIDES` says. Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

VOCABULARY = 96
LENGTH = 23
WINDOW = 8
EXPERTS = 4

# Field of a config class -> value. Fields that a class doesn't have are left out.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    # widths
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "word_embed_proj_dim"], 64),
    **dict.fromkeys(["cross_attention_hidden_size", "backbone_hidden_size", "lru_width"], 64),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "dff", "dim_ff", "d_inner"], 64),
    **dict.fromkeys(["intermediate_size", "n_inner", "ffn_hidden_size", "intermediate_size_mlp"], 64),
    **dict.fromkeys(["moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["shared_intermediate_size", "dense_intermediate_size", "feed_forward_size"], 32),
    **dict.fromkeys(["shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"], 32),
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "loop_gate_rank": 8,
    "hc_lowrank": 8,
    "router_hidden_size": 16,
    "adapter_rank": 8,
    # heads
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "kv_channels", "dim_head", "swa_head_dim", "attention_head_size", "d_head"], 16),
    "v_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": WINDOW,
    # layers
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 4),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"], 2),
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "sliding_window_pattern": 2,
    "max_window_layers": 2,
    "use_sliding_window": True,
    "is_decoder": True,
    # experts
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"], 2),
    "n_group": 1,
    "topk_group": 1,
    "zero_expert_num": 2,
    # how far
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 64),
    **dict.fromkeys(["max_source_positions", "max_target_positions", "prompt_length"], 64),
    "original_max_position_embeddings": 64,
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size"], WINDOW),
    **dict.fromkeys(
        ["window_size", "local_attention", "keep_window_size", "rel_extent", "relative_max_distance"], WINDOW
    ),
    # recurrent layers
    **dict.fromkeys(["mamba_d_state", "state_size", "ssm_state_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "linear_num_key_heads", "linear_num_value_heads"], 4),
    "linear_num_heads": 4,
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_head_dim"], 16),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "block_size"], 8),
    "mamba_d_ssm": 64,
    "time_step_rank": 4,
    # what is random
    **dict.fromkeys(["initializer_range", "init_std", "embed_init_std"], 0.15),
    **dict.fromkeys(
        ["attention_dropout", "hidden_dropout", "hidden_dropout_prob", "dropout", "activation_dropout"], 0.0
    ),
    **dict.fromkeys(["attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0),
}

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

# What the sizes above don't make small, valid or far from uniform, family by family; ... leaves a field out.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bart (encoder-decoder)": {"is_decoder": ...},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_d_head": 32},
    "bert (encoder)": {"is_decoder": False},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "logit_scale": 1.0,
        "layer_types": [SLIDING, FULL] * 2,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            FULL: None,
        },
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {"n_shared_experts": 1},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 8,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 4,
            "global_head_dim": 32,
        },
    },
    "gemma4_unified_text": {"head_dim": 8, "global_head_dim": 16, "initializer_range": 0.08},
    "gpt_oss": {"initializer_range": 0.1},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 4, "global_head_dim": 32}},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"num_kv_shared_layers": 2, "head_dim": 8, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {"attention_multiplier": 0.25},
    "granite_swa": {"attention_multiplier": 0.25},
    "granitemoe": {"attention_multiplier": 0.25},
    "granitemoe_swa": {"attention_multiplier": 0.25},
    "granitemoeshared": {"attention_multiplier": 0.25},
    "granitemoehybrid": {"attention_multiplier": 0.25, "layer_types": [LINEAR, FULL] * 2, "mamba_d_head": 32},
    "inkling_text": {"logits_mup_width_multiplier": 1.0, "swa_num_attention_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "laguna": {"num_attention_heads_per_layer": [4, 8] * 2},
    "lfm2": {"layer_types": ["conv", FULL] * 2},
    "lfm2_moe": {"layer_types": ["conv", FULL] * 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {
        "layer_types": [FULL, "minimax_m3_sparse"] * 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "nemotron": {"initializer_range": 0.08},
    "nemotron_h": {"n_groups": 2, "layers_block_type": [LINEAR, FULL, "mlp", "moe", FULL]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 6},
    "reformer": {"axial_pos_embds": False},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 64},
    "roberta (encoder)": {"is_decoder": False},
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "t5": {"num_layers": 2, "num_decoder_layers": 2, "d_kv": 16, "d_ff": 64, "is_decoder": ...},
    "vit": {"image_size": 16, "patch_size": 4, "num_labels": 16},
    "whisper (encoder-decoder)": {"is_decoder": ..., "num_mel_bins": 8, "max_source_positions": 12},
    "xlm": {"causal": True},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"initializer_range": 0.1},
    "zamba2": {"initializer_range": 0.1},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2},
}
# Composite configs whose text part is a family of its own.
for _family in ("dots3_note", "gemma3n", "gemma4", "gemma4_unified", "qwen4_exp", "qwen3_5", "qwen3_5_moe"):
    OVERRIDES[_family] = {"text_config": OVERRIDES.get(f"{_family}_text", {})} | OVERRIDES.get(_family, {})


# Encoders and encoder-decoders: name -> model type, class.
OTHERS: dict[str, tuple[str, str]] = {
    "bert (encoder)": ("bert", "BertForMaskedLM"),
    "roberta (encoder)": ("roberta", "RobertaForMaskedLM"),
    "modernbert": ("modernbert", "ModernBertForMaskedLM"),
    "vit": ("vit", "ViTForImageClassification"),
    "t5": ("t5", "T5ForConditionalGeneration"),
    "bart (encoder-decoder)": ("bart", "BartForConditionalGeneration"),
    "whisper (encoder-decoder)": ("whisper", "WhisperForConditionalGeneration"),
}


def causal_families() -> dict[str, str]:
    """Model type -> name of the class, of every family that AutoModelForCausalLM knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: Any, changes: dict[str, Any]) -> Any:
    """A small instance of a config class; `changes` may hold dictionaries for its sub-configs."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {field.name for field in dataclasses.fields(kind)}
    settings = {name: value for name, value in SIZES.items() if name in fields}
    try:
        default = kind()
    except Exception:
        default = None
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # multi-head latent attention
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if default is not None:
        settings |= _layer_kinds(default, fields, settings)
    for name, sub_kind in kind.sub_configs.items():
        if getattr(default, name, None) is not None:
            sub_kind = type(getattr(default, name))
        elif hasattr(kind, "sub_configs_defaults"):
            sub_kind = CONFIG_MAPPING[kind.sub_configs_defaults[name].model_type]
        else:
            continue
        settings[name] = tiny_config(sub_kind, changes.get(name, {}))
    settings |= {name: value for name, value in changes.items() if name not in kind.sub_configs}
    settings = {name: value for name, value in settings.items() if value is not ...}
    return kind(**settings)


def _layer_kinds(default: Any, fields: set[str], settings: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind of the default config, in order of appearance, over and over."""
    found: dict[str, Any] = {}
    count = settings.get("num_hidden_layers", 4)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(default, name, None)
        if name in fields and kinds:
            distinct = list(dict.fromkeys(kinds))
            if distinct == ["full_attention"] and "sliding_window" in fields:  # by default without windows
                distinct = ["sliding_attention", "full_attention"]
            found[name] = [distinct[i % len(distinct)] for i in range(max(count, len(distinct)))]
    return found


def config_class(family: str) -> Any:
    """The config that the model of a family is built from: a part of the family's own where the model is that part."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    whole, own = CONFIG_MAPPING[model_type(family)], model_class(family).config_class
    parts = [part for part in whole.sub_configs.values() if part is own]
    return parts[0] if parts else whole


def model_type(family: str) -> str:
    return OTHERS[family][0] if family in OTHERS else family


def class_name(family: str) -> str:
    return OTHERS[family][1] if family in OTHERS else causal_families()[family]


def model_class(family: str) -> Any:
    import transformers

    return getattr(transformers, class_name(family))


class NotBuilt(Exception):
    """The sizes and overrides here don't fit this version's config class."""


def build(family: str, seed: int = 0, **settings: Any) -> Any:
    """The model, in evaluation mode and float32, with those of the settings that its config has. Raises NotBuilt."""
    kind, changes = config_class(family), OVERRIDES.get(family, {})
    if not kind.sub_configs and "text_config" in changes:
        changes = changes["text_config"]
    fields = {field.name for field in dataclasses.fields(kind)}
    changes = changes | {name: value for name, value in settings.items() if name in fields}
    torch.manual_seed(seed)
    try:
        model = model_class(family)._from_config(tiny_config(kind, changes), dtype=torch.float32).eval()
    except Exception as error:
        raise NotBuilt(family) from error
    for name, parameter in model.named_parameters():
        if "sink" in name and parameter.dim() == 1:  # zeros, or empty, where a family doesn't initialise them
            torch.nn.init.normal_(parameter)
    return model


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 3, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str | None, length: int = LENGTH) -> torch.Tensor:
    mask = torch.ones(2, length, dtype=torch.long)
    if side is not None:
        mask[1, slice(6) if side == "left" else slice(-6, None)] = 0
    return mask


def noise(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _assistant(model: Any, side: str | None) -> dict[str, Any]:
    """The assistant of a Gemma takes hidden states, keys and values of the model that it drafts for."""
    text = model.config.get_text_config()
    states = {}
    for index, kind in enumerate(text.layer_types):
        attention = model.model.layers[index].self_attn
        shape = (2, text.num_attention_heads // attention.num_key_value_groups, LENGTH, attention.head_dim)
        states[kind] = (noise(*shape, seed=3), noise(*shape, seed=4))
    embeddings = noise(2, LENGTH, model.pre_projection.in_features)
    return {"inputs_embeds": embeddings, "shared_kv_states": states, "attention_mask": padding(side)}


def _codebooks(model: Any, side: str | None) -> dict[str, Any]:
    return {"input_ids": tokens(2 * model.config.num_codebooks), "attention_mask": padding(side)}


def _source_and_target(model: Any, side: str | None) -> dict[str, Any]:
    source = LENGTH + 4
    return {
        "input_ids": tokens(length=source, seed=3),
        "attention_mask": padding(side and "right", source),
        "decoder_input_ids": tokens(),
        "decoder_attention_mask": padding(side),
    }


def _sound_and_target(model: Any, side: str | None) -> dict[str, Any]:
    sound = noise(2, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    return {"input_features": sound, "decoder_input_ids": tokens(), "decoder_attention_mask": padding(side)}


# What a forward pass takes, where it isn't input_ids and attention_mask.
INPUTS: dict[str, Callable[[Any, str | None], dict[str, Any]]] = {
    "bart (encoder-decoder)": _source_and_target,
    "blt": lambda model, side: {"input_ids": tokens(), "attention_mask": padding(side), "use_cache": False},
    "gemma4_assistant": _assistant,
    "gemma4_unified_assistant": _assistant,
    "musicgen": _codebooks,
    "musicgen_melody": _codebooks,
    "t5": _source_and_target,
    "vit": lambda model, side: {"pixel_values": noise(2, 3, 16, 16)},
    "whisper (encoder-decoder)": _sound_and_target,
}


def inputs(family: str, model: Any, padded: bool) -> dict[str, Any]:
    """The arguments of a forward pass; `padded`: row 1 of the batch is shorter."""
    side = None if not padded else "right" if family in RIGHT_PADDED else "left"
    if family in INPUTS:
        return INPUTS[family](model, side)
    return {"input_ids": tokens(), "attention_mask": padding(side)}


# Encoders: what follows the text is padding.
RIGHT_PADDED = {"bert (encoder)", "roberta (encoder)", "modernbert"}

# Of the families, those that can't be made small, and why.
NOT_BUILT = {"gemma3n": "its image tower is a timm model of one size, 300 M parameters; gemma3n_text is judged"}
