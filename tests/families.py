"""The table of families: tiny random models of the classes that people train, and the layouts that their files have.

One model may lie in files of up to three layouts: ``saved``, which ``save_pretrained`` writes today; ``own``, with the
names that the class itself has, which state dicts, checkpoints of trainers and ``save_original_format=False`` have; and
``published``, with what files on the hub have besides, or name otherwise, since older code wrote them.
"""

from __future__ import annotations

import importlib
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.models import State

Layout = Callable[[State], State]
Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: of the row.
        model: the class.
        sizes: of its configuration, the smallest that it takes.
        inputs: which inputs its forward takes, a key of ``INPUTS``.
        special: what is special about its files; what ``saved | own`` name differently is said first.
        published: makes the published layout from the saved one; None where they are the same.
        library: that has the class.
    """

    name: str
    model: str
    sizes: Sizes
    inputs: str = "text"
    special: str = ""
    published: Layout | None = None
    library: str = "transformers"

    @property
    def model_class(self) -> Any:
        return getattr(importlib.import_module(self.library), self.model)

    def make(self) -> Any:
        """Return the model with the same random weights each time, none of them zero or one."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        config_class = getattr(self.model_class, "config_class", None)
        model = self.model_class(config_class(**self.sizes)) if config_class else self.model_class(**self.sizes)
        step(model, 0.05)
        return model.eval()

    def write(self, model: Any, folder: Path) -> dict[str, Path]:
        """Write the model in each of its layouts; return the layouts' folders, ``saved`` first."""
        layouts = {"saved": folder / "saved"}
        model.save_pretrained(layouts["saved"])
        saved = weights(layouts["saved"])
        if " | " in self.special:
            layouts["own"] = folder / "own"
            model.save_pretrained(layouts["own"], save_original_format=False)
            assert weights(layouts["own"]).keys() != saved.keys(), f"{self.name} has one layout only"
        if self.published:
            layouts["published"] = folder / "published"
            shutil.copytree(layouts["saved"], layouts["published"])
            (file,) = layouts["published"].glob("*.safetensors")
            save_file(self.published(saved), file, {"format": "pt"})
        return layouts

    def load(self, folder: Path) -> Any:
        """Return the folder's model as its library loads it, which has to find every weight and nothing else."""
        model, info = self.model_class.from_pretrained(folder, output_loading_info=True)
        info["unexpected_keys"] = set(info["unexpected_keys"]) - PREDICTED.keys()  # known by number: 61 or 46, not 2
        assert not {kind: names for kind, names in info.items() if names}
        return model.eval()


def step(model: Any, size: float) -> None:
    """Move every stored float of a model by Gaussian noise, tied ones once."""
    with torch.no_grad():
        for tensor in {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * size)


def weights(folder: Path) -> State:
    """Return the tensors of a folder's only file of weights."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def copied(name: str, *copies: str) -> Layout:
    """Return a layout with further copies of a tensor."""
    return lambda state: state | {copy: state[name].clone() for copy in copies}


def besides(more: State) -> Layout:
    """Return a layout with more tensors."""
    return lambda state: state | {name: tensor.clone() for name, tensor in more.items()}


def renamed(*pairs: tuple[str, str]) -> Layout:
    """Return a layout with parts of the names replaced; a part that begins with ``^`` is at the beginning."""

    def rename(name: str) -> str:
        for old, new in pairs:
            if old.startswith("^"):
                name = new + name.removeprefix(old[1:]) if name.startswith(old[1:]) else name
            else:
                name = name.replace(old, new)
        return name

    return lambda state: {rename(name): tensor for name, tensor in state.items()}


def both(first: Layout, second: Layout) -> Layout:
    return lambda state: second(first(state))


LAYERS = 2
SIZES = {"hidden_size": 16, "num_hidden_layers": LAYERS, "vocab_size": 64}
TEXT = SIZES | {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = TEXT | {"head_dim": 4}
PADDED = {"pad_token_id": 0}
ENCODER = SIZES | {"intermediate_size": 24, "num_attention_heads": 4, "max_position_embeddings": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SHARED_EXPERT = EXPERTS | {"shared_expert_intermediate_size": 8}
ROUTED = EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
                    "topk_group": 1}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
          "v_head_dim": 4}  # fmt: skip
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN_VISION = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
               "patch_size": 14}  # fmt: skip
QWEN2_VISION = {"depth": 2, "hidden_size": 16, "embed_dim": 16, "num_heads": 2, "patch_size": 14, "in_channels": 3,
                "mlp_ratio": 2}  # fmt: skip
MROPE = {"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 0]}}
INTERLEAVED = {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0], "mrope_interleaved": True}}
QWEN_TOKENS = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}
GEMMA_TOKENS = {"image_token_index": 10, "boi_token_index": 11, "eoi_token_index": 12, "mm_tokens_per_image": 4}
COLUMNS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
           "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "vocab_size": 64}  # fmt: skip
SPEECH = COLUMNS | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0,
                    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
SOUND = ENCODER | {"conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
                   "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = MIXED | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4,
                  "linear_value_head_dim": 4}  # fmt: skip
MATFORMER = {"num_hidden_layers": 4, "intermediate_size": [24] * 4, "activation_sparsity_pattern": [0.0] * 4,
             "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 2,
             "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 4,
             "altup_num_inputs": 2}  # fmt: skip
UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 4,
        "norm_num_groups": 4}  # fmt: skip
FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16,
        "axes_dims_rope": (2, 2, 4)}  # fmt: skip

POSITIONS = torch.arange(32)[None]
FREQUENCIES = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(2) for n in range(LAYERS)}
MASK = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
GPT2_MASKS = {f"h.{n}.attn.bias": MASK for n in range(LAYERS)}
NEOX_MASKS = {f"gpt_neox.layers.{n}.attention.bias": MASK for n in range(LAYERS)} | {
    f"gpt_neox.layers.{n}.attention.rotary_emb.inv_freq": torch.ones(2) for n in range(LAYERS)
}
PREDICTED = {f"model.layers.{LAYERS}.{name}": torch.ones(shape) for name, shape in (
    ("eh_proj.weight", (16, 32)), ("enorm.weight", (16,)), ("hnorm.weight", (16,)), ("embed_tokens.weight", (64, 16)),
    ("shared_head.norm.weight", (16,)), ("shared_head.head.weight", (64, 16)), ("input_layernorm.weight", (16,)),
    ("self_attn.o_proj.weight", (16, 16)))}  # fmt: skip
MTP = {"mtp.fc.weight": torch.ones(16, 32), "mtp.norm.weight": torch.ones(16),
       "mtp.layers.0.input_layernorm.weight": torch.ones(16)}  # fmt: skip
WEIGHT_NORM = (("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v"))
TOWER = ("^vision_tower.", "vision_tower.vision_model.")
GAMMA = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
FUSED = "experts one by one | fused"
NESTED = "language_model.model.… | model.language_model.…"

FAMILIES = (
    # text
    Family("llama", "LlamaForCausalLM", TEXT, published=besides(FREQUENCIES), special="inv_freq in files of Llama 2"),
    Family("mistral", "MistralForCausalLM", HEADS),
    Family("qwen2", "Qwen2ForCausalLM", TEXT, special="biases"),
    Family("qwen3", "Qwen3ForCausalLM", HEADS | {"tie_word_embeddings": True}, special="tied, published with the head",
           published=copied("model.embed_tokens.weight", "lm_head.weight")),
    Family("gemma2", "Gemma2ForCausalLM", HEADS, special="tied"),
    Family("gemma3-text", "Gemma3ForCausalLM", HEADS, special="tied"),
    Family("gemma3n", "Gemma3nForCausalLM", HEADS | MATFORMER, special="embeddings of each layer, shared caches"),
    Family("phi3", "Phi3ForCausalLM", TEXT | PADDED, special="one matrix for q, k and v"),
    Family("olmo2", "Olmo2ForCausalLM", TEXT, special="norms behind the layers"),
    Family("gpt2", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32},
           special="transposed weights; published without `transformer.` and with masks",
           published=both(renamed(("^transformer.", "")), besides(GPT2_MASKS))),
    Family("gpt-neox", "GPTNeoXForCausalLM", ENCODER, special="embed_out | lm_head; masks",
           published=besides(NEOX_MASKS)),
    Family("falcon", "FalconForCausalLM", SIZES | {"num_attention_heads": 4}, special="tied, published with the head",
           published=copied("transformer.word_embeddings.weight", "lm_head.weight")),
    Family("bloom", "BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64},
           special="published without `transformer.`", published=renamed(("^transformer.", ""))),
    Family("starcoder2", "Starcoder2ForCausalLM", TEXT, special="biases, tied"),
    Family("cohere2", "Cohere2ForCausalLM", TEXT, special="one norm a layer, tied"),
    Family("stablelm", "StableLmForCausalLM", TEXT),
    Family("granite", "GraniteForCausalLM", TEXT),
    Family("smollm3", "SmolLM3ForCausalLM", TEXT | PADDED, special="tied"),
    Family("glm4", "Glm4ForCausalLM", HEADS | PADDED, special="gate and up in one matrix"),
    # mixtures of experts
    Family("mixtral", "MixtralForCausalLM", TEXT | LOCAL, special=FUSED),
    Family("qwen2-moe", "Qwen2MoeForCausalLM", TEXT | SHARED_EXPERT, special=FUSED),
    Family("qwen3-moe", "Qwen3MoeForCausalLM", HEADS | EXPERTS, special=FUSED),
    Family("deepseek-v3", "DeepseekV3ForCausalLM", TEXT | ROUTED | LATENT, published=besides(PREDICTED),
           special=f"{FUSED}; a layer that predicts one token more, a bias that isn't trained"),
    Family("glm4-moe", "Glm4MoeForCausalLM", HEADS | ROUTED, published=besides(PREDICTED),
           special=f"{FUSED}; a layer that predicts one token more"),
    Family("gpt-oss", "GptOssForCausalLM", HEADS | LOCAL, special="experts with biases, attention sinks"),
    Family("olmoe", "OlmoeForCausalLM", TEXT | EXPERTS, special=FUSED),
    Family("granite-moe", "GraniteMoeForCausalLM", TEXT | LOCAL, special="input_linear.weight | experts.gate_up_proj"),
    Family("llama4", "Llama4ForCausalLM", HEADS | {"intermediate_size_mlp": 24, "num_local_experts": 4,
           "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}, special="fused and transposed experts"),
    # vision and language
    Family("qwen2-vl", "Qwen2VLForConditionalGeneration", {"text_config": TEXT | MROPE, "vision_config": QWEN2_VISION,
           **QWEN_TOKENS}, special="model.…, visual.… | model.language_model.…, model.visual.…"),
    Family("qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration", {"text_config": TEXT | MROPE, **QWEN_TOKENS,
           "vision_config": QWEN_VISION | {"fullatt_block_indexes": [1]}},
           special="model.…, visual.… | model.language_model.…, model.visual.…"),
    Family("qwen3-vl", "Qwen3VLForConditionalGeneration", {"text_config": HEADS | INTERLEAVED, **QWEN_TOKENS,
           "vision_config": QWEN_VISION | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}}),
    Family("gemma3", "Gemma3ForConditionalGeneration", {"text_config": HEADS, "vision_config": VISION, **GEMMA_TOKENS},
           special=f"{NESTED}; vision_tower.vision_model.… in older files", published=renamed(TOWER)),
    Family("mistral3", "Mistral3ForConditionalGeneration", {"text_config": HEADS | {"model_type": "mistral"},
           "vision_config": VISION | {"model_type": "pixtral", "head_dim": 4}, "image_token_index": 10},
           special=NESTED),
    Family("llava", "LlavaForConditionalGeneration", {"text_config": TEXT | {"model_type": "llama"},
           "vision_config": VISION | {"model_type": "clip_vision_model"}, "image_token_index": 10},
           special=f"{NESTED}; vision_tower.vision_model.… in older files", published=renamed(TOWER)),
    Family("paligemma", "PaliGemmaForConditionalGeneration", {"text_config": HEADS | {"model_type": "gemma"},
           "vision_config": VISION | {"model_type": "siglip_vision_model"}, "projection_dim": 16,
           "image_token_index": 10}, special=f"{NESTED}; vision_tower.vision_model.… in older files",
           published=renamed(TOWER)),
    Family("smolvlm", "SmolVLMForConditionalGeneration", {"text_config": TEXT | {"model_type": "llama"},
           "vision_config": VISION, "scale_factor": 1, "image_token_id": 10}),
    # audio
    Family("whisper", "WhisperForConditionalGeneration", SPEECH, "speech", "tied, published with the head",
           published=copied("model.decoder.embed_tokens.weight", "proj_out.weight")),
    Family("wav2vec2", "Wav2Vec2ForCTC", SOUND, "sound", "weight norm by two names", renamed(*WEIGHT_NORM)),
    # encoder and decoder
    Family("t5", "T5ForConditionalGeneration", {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 4, "d_kv": 4,
           "vocab_size": 64}, "translation", "three embeddings and a head that are one",
           copied("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")),
    Family("t5gemma", "T5GemmaForConditionalGeneration", {"encoder": HEADS, "decoder": HEADS, "vocab_size": 64},
           "translation", "two stacks of layers, one tied head"),
    Family("bart", "BartForConditionalGeneration", COLUMNS | {"max_position_embeddings": 32}, "translation",
           "three embeddings and a head that are one", copied("model.shared.weight", "lm_head.weight",
           "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")),
    # state spaces and hybrids
    Family("mamba", "MambaForCausalLM", SIZES | {"state_size": 4}, special="A_log, D and convolutions; tied"),
    Family("mamba2", "Mamba2ForCausalLM", SIZES | {"state_size": 4, "num_heads": 8, "head_dim": 4, "n_groups": 1}),
    Family("jamba", "JambaForCausalLM", TEXT | {"num_experts": 2, "use_mamba_kernels": False, "attn_layer_period": 2,
           "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4},
           special=FUSED),
    Family("nemotron-h", "NemotronHForCausalLM", HEADS | {"num_hidden_layers": 4, "hybrid_override_pattern": "M-*M",
           "mamba_num_heads": 8, "mamba_head_dim": 4, "n_groups": 1, "ssm_state_size": 4},
           special="backbone.… | model.…; layers of three kinds"),
    Family("qwen3-next", "Qwen3NextForCausalLM", HEADS | SHARED_EXPERT | LINEAR, published=besides(MTP),
           special=f"{FUSED}; two kinds of attention; mtp"),
    Family("falcon-h1", "FalconH1ForCausalLM", HEADS | {"mamba_d_ssm": 32, "mamba_n_heads": 8, "mamba_d_head": 4,
           "mamba_n_groups": 1, "mamba_d_state": 4}, special="attention and state space side by side"),
    # embeddings and masked language models
    Family("bert", "BertForMaskedLM", ENCODER, special="gamma and beta in files of 2018, position_ids",
           published=both(renamed(*GAMMA), besides({"bert.embeddings.position_ids": POSITIONS}))),
    Family("modernbert", "ModernBertForMaskedLM", ENCODER | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
           "cls_token_id": 1, "sep_token_id": 2, "global_attn_every_n_layers": 2}, special="decoder.bias, tied"),
    Family("xlm-roberta", "XLMRobertaModel", ENCODER, special="position_ids",
           published=besides({"embeddings.position_ids": POSITIONS})),
    Family("qwen3-embedding", "Qwen3Model", HEADS, special="no `model.`, no head"),
    # pictures
    Family("clip", "CLIPModel", {"text_config": ENCODER | {"max_position_embeddings": 16}, "vision_config": VISION,
           "projection_dim": 8}, "pair", "two towers, logit_scale, position_ids",
           besides({"text_model.embeddings.position_ids": POSITIONS[:, :16],
                    "vision_model.embeddings.position_ids": POSITIONS[:, :5]})),
    Family("siglip", "SiglipModel", {"text_config": ENCODER | {"max_position_embeddings": 16, "projection_size": 16},
           "vision_config": VISION}, "pair", "a head of attention, logit_bias"),
    Family("vit", "ViTForImageClassification", VISION, "picture", "encoder.layer.… | layers.…; classifier"),
    Family("dinov2", "Dinov2Model", VISION, "picture", "attention.attention.key | attention.k_proj; layer_scale"),
    # classifiers
    Family("reward", "Qwen3ForSequenceClassification", HEADS | PADDED | {"num_labels": 1}, special="score, no head"),
    Family("distilbert", "DistilBertForSequenceClassification", {"dim": 16, "hidden_dim": 24, "n_layers": 2,
           "n_heads": 4, "vocab_size": 64, "max_position_embeddings": 32}, special="pre_classifier, classifier"),
    # diffusion
    Family("unet", "UNet2DConditionModel", UNET, "noise", "convolutions; diffusion_pytorch_model.safetensors",
           library="diffusers"),
    Family("flux", "FluxTransformer2DModel", FLUX, "patches", "diffusion_pytorch_model.safetensors",
           library="diffusers"),
)  # fmt: skip

TOKENS = torch.tensor([[5, 9, 33, 7]])
PICTURE = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
INPUTS: dict[str, dict[str, torch.Tensor]] = {
    "text": {"input_ids": TOKENS},
    "translation": {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
    "speech": {"input_features": torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32), "decoder_input_ids": TOKENS},
    "sound": {"input_values": torch.linspace(-1, 1, 400)[None]},
    "picture": {"pixel_values": PICTURE},
    "pair": {"input_ids": TOKENS, "pixel_values": PICTURE},
    "noise": {"sample": torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8), "timestep": torch.tensor([3]),
              "encoder_hidden_states": torch.linspace(-1, 1, 32).reshape(1, 2, 16)},
    "patches": {"hidden_states": torch.linspace(-1, 1, 16).reshape(1, 4, 4), "timestep": torch.tensor([0.5]),
                "encoder_hidden_states": torch.linspace(-1, 1, 32).reshape(1, 2, 16),
                "pooled_projections": torch.linspace(-1, 1, 16)[None], "txt_ids": torch.zeros(2, 3),
                "img_ids": torch.zeros(4, 3)},
}  # fmt: skip
