"""Models that plans are made for."""

from dataclasses import replace

from fwd.models.config import parse_spec
from fwd.models.layout import Latent, Paged, State
from fwd.models.spec import ModelSpec

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
EIGHT_B = {
    **SMALL,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
SLIDING = {
    **SMALL,
    "architectures": ["Qwen3ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 128,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
MIXED = {
    **SMALL,
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 8,
    "sliding_window": 128,
    "quantization_config": {"quant_method": "mxfp4"},
}
MLA = {
    **SMALL,
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


class Other(ModelSpec):
    """A spec whose cache is what a test says."""

    __slots__ = ()
    layouts = ()

    @property
    def cache(self):
        return self.layouts


def keeping(*layouts, **config):
    """A model that keeps these layouts."""
    spec = parse_spec({**SMALL, **config})
    kind = type("Kind", (Other,), {"__slots__": (), "layouts": layouts})
    return kind(**{name: getattr(spec, name) for name in ModelSpec.__dataclass_fields__})


SPECS = {
    "full": parse_spec(SMALL),
    "sliding": parse_spec(SLIDING),
    "windows only": replace(parse_spec(SLIDING), windows=(128, 64, 128, 64)),
    "state": keeping(State((0, 1), 640), Paged((2,), 2, 64), Paged((3,), 2, 64, 96)),
    "states only": keeping(State((0, 1, 2, 3), 640)),
    "experts": parse_spec(MIXED),
    "mla": parse_spec(MLA),
    "latent": keeping(Latent((0, 1), 64, 32), Paged((2, 3), 2, 64)),
}
