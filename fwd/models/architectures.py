"""The architectures this build knows: what of a config each reads, in which words, and what it stands for. No torch.

Fields that would change the mathematics and that an architecture does not take are refused by name; others ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fwd.errors import ModelError
from fwd.models.fields import Fields
from fwd.models.positions import Sliding
from fwd.models.spec import ExpertSpec, Family, LatentSpec

Neutral = dict[str, tuple[object, ...]]
MAX_EXPERTS, MAX_TOP_K = 4096, 64

NEUTRAL: Neutral = {  # of all architectures: fields that change the mathematics, and the values that do not
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False,),
    "pretraining_tp": (1,),
    "partial_rotary_factor": (1,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "use_qk_norm": (False,),
    "attention_chunk_size": (),
    "index_topk": (),  # sparse attention (DeepSeek-V3.2)
    "expert_dtype": (),
}
_NO_EXPERTS: Neutral = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0,))
_NO_LATENTS: Neutral = {"kv_lora_rank": ()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What differs between architectures, as data. `defaults` are transformers' values of absent fields."""

    family: Family = "dense"
    bias: Literal["none", "qkv", "config"] = "none"  # of attention; config: attention_bias decides, the output's too
    qk_norm: bool = False
    sinks: bool = False
    sliding: Sliding = "never"
    switched: bool = True  # by use_sliding_window
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)  # other names of fields
    neutral: Neutral = field(default_factory=lambda: _NO_EXPERTS | _NO_LATENTS)
    rope: dict[str, Any] = field(default_factory=dict)  # where the config has none
    experts: Callable[[Fields, int], ExpertSpec] | None = None
    latents: bool = False
    text: str = ""  # the field that holds the text model's config
    prefix: str = ""  # of the text model's tensors
    others: tuple[str, ...] = ()  # prefixes of tensors that are not the text model's


def read_latents(config: Fields, scale: float) -> LatentSpec:
    """Read latent attention; `scale` comes with the rotation and multiplies that of the softmax."""
    nope, rope = config.integer("qk_nope_head_dim", 1, 1024), config.integer("qk_rope_head_dim", 2, 1024)
    if rope % 2:
        raise ModelError(f"config.json: qk_rope_head_dim {rope} is odd, so RoPE cannot pair it")
    return LatentSpec(
        q_rank=config.integer("q_lora_rank", 8, 1 << 16, 0) if config.get("q_lora_rank") else 0,
        latent=config.integer("kv_lora_rank", 8, 1 << 16),
        nope=nope,
        rope=rope,
        value=config.integer("v_head_dim", 1, 1024),
        scale=(nope + rope) ** -0.5 * scale,
        interleaved=config.flag("rope_interleave", default=True),
    )


def _qwen3_moe(config: Fields, layers: int) -> ExpertSpec:
    step = config.integer("decoder_sparse_step", 1, 1 << 20)
    plain = config.get("mlp_only_layers", [])
    if not isinstance(plain, list) or any(type(index) is not int for index in plain):
        raise ModelError("config.json: mlp_only_layers must be a list of integers")
    dense = frozenset(plain)
    return ExpertSpec(
        experts=config.integer("num_experts", 1, MAX_EXPERTS),
        top_k=_top_k(config, "num_experts"),
        intermediate=config.integer("moe_intermediate_size", 8, 1 << 20),
        scoring="softmax",
        normalize=config.flag("norm_topk_prob"),
        layers=tuple(index for index in range(layers) if (index + 1) % step == 0 and index not in dense),
    )


def _gpt_oss(config: Fields, layers: int) -> ExpertSpec:
    return ExpertSpec(
        experts=config.integer("num_local_experts", 1, MAX_EXPERTS),
        top_k=_top_k(config, "num_local_experts"),
        intermediate=config.integer("intermediate_size", 8, 1 << 20),
        scoring="topk_softmax",
        normalize=False,
        layers=tuple(range(layers)),
        bias=True,
    )


def _deepseek(config: Fields, layers: int) -> ExpertSpec:
    """Experts after the first layers, with the router of DeepSeek-V3."""
    groups, top_groups = config.integer("n_group", 1, 1024, 1), config.integer("topk_group", 1, 1024, 1)
    width, shared = config.integer("moe_intermediate_size", 8, 1 << 20), config.integer("n_shared_experts", 0, 64, 0)
    experts, top_k = config.integer("n_routed_experts", 1, MAX_EXPERTS), _top_k(config, "n_routed_experts")
    if groups > 1:
        _check_groups(experts, groups, top_groups, top_k)
    return ExpertSpec(
        experts=experts,
        top_k=top_k,
        intermediate=width,
        scoring="sigmoid",
        normalize=config.flag("norm_topk_prob"),
        layers=_sparse(config, layers),
        shared=shared * width,
        scale=config.number("routed_scaling_factor", 0.0, 1e6),
        groups=groups,
        top_groups=min(top_groups, groups),
    )


def _check_groups(experts: int, groups: int, top_groups: int, top_k: int) -> None:
    if experts % groups or experts // groups < 2:
        raise ModelError(f"config.json: n_group {groups} does not divide n_routed_experts {experts} in groups of 2 up")
    if top_groups > groups or top_k > experts // groups * top_groups:
        raise ModelError(f"config.json: topk_group {top_groups} of n_group {groups} hold no {top_k} experts a token")


def _sparse(config: Fields, layers: int) -> tuple[int, ...]:
    """The layers with experts: as `mlp_layer_types` says, or all but the first."""
    kinds = config.words("mlp_layer_types", ("dense", "sparse"), layers)
    first = config.integer("first_k_dense_replace", 0, 1 << 20, 0)
    return tuple(index for index in range(layers) if (kinds[index] == "sparse" if kinds else index >= first))


def _top_k(config: Fields, experts: str) -> int:
    return config.integer("num_experts_per_tok", 1, min(MAX_TOP_K, config.integer(experts, 1, MAX_EXPERTS)))


_EPS = {"rms_norm_eps": 1e-6}
_QWEN = {**_EPS, "num_key_value_heads": 32, "sliding_window": 4096}
_YARN_OF_GPT_OSS = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_DEEPSEEK = Architecture(
    family="deepseek",
    latents=True,
    experts=_deepseek,
    defaults={
        **_EPS,
        "n_group": 8,
        "topk_group": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 3,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "v_head_dim": 128,
    },
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    neutral={
        "attention_bias": (False,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    },
)
_MISTRAL = Architecture(
    sliding="all", switched=False, defaults={**_EPS, "num_key_value_heads": 8, "sliding_window": 4096}
)
_KIMI = replace(
    _DEEPSEEK,
    neutral=_DEEPSEEK.neutral | {"model_type": ("deepseek_v3", "kimi_k2")},
    text="text_config",
    prefix="language_model.",
    others=("vision_tower.", "mm_projector."),
)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(bias="config", defaults=_EPS),
    "MistralForCausalLM": _MISTRAL,
    "Mistral3ForConditionalGeneration": replace(
        _MISTRAL,
        neutral=_MISTRAL.neutral | {"model_type": ("mistral",)},  # ministral3 scales its queries by position
        text="text_config",
        prefix="language_model.",
        others=("vision_tower.", "multi_modal_projector."),
    ),
    "Qwen2ForCausalLM": Architecture(bias="qkv", sliding="late", defaults=_QWEN),
    "Qwen3ForCausalLM": Architecture(bias="config", qk_norm=True, sliding="late", defaults={**_QWEN, "head_dim": 128}),
    "Qwen3MoeForCausalLM": Architecture(
        family="moe",
        bias="config",
        qk_norm=True,
        sliding="all",
        experts=_qwen3_moe,
        defaults={
            **_QWEN,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
        },
        aliases={"num_local_experts": "num_experts"},
        neutral={**_NO_LATENTS, "shared_expert_intermediate_size": (0,)},
    ),
    "GptOssForCausalLM": Architecture(
        family="gpt_oss",
        bias="config",
        sinks=True,
        sliding="even",
        switched=False,
        experts=_gpt_oss,
        rope=_YARN_OF_GPT_OSS,
        defaults={
            "rms_norm_eps": 1e-5,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "attention_bias": True,
            "num_experts_per_tok": 4,
            "rope_theta": 150000.0,
            "torch_dtype": "bfloat16",  # which its configs do not name
        },
        aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
        neutral={**_NO_LATENTS, "swiglu_limit": (7,), "swiglu_alpha": (1.702,)},
    ),
    "DeepseekV3ForCausalLM": _DEEPSEEK,
    "Glm4MoeLiteForCausalLM": replace(
        _DEEPSEEK,
        defaults={
            "rms_norm_eps": 1e-5,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.8,
            "q_lora_rank": 768,
            "v_head_dim": 256,
        },
    ),
    "KimiK25ForConditionalGeneration": _KIMI,
    "Kimi_K25ForConditionalGeneration": _KIMI,  # as transformers writes it
}
