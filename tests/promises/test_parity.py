"""The whole engine against `transformers` in float32: greedy tokens are equal, log-probabilities agree to 1e-4."""

import checkpoints
import pytest
import torch
from harness import ended, run, serving
from transformers import AutoModelForCausalLM

from fwd.config import Config
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Submit
from fwd.protocol.values import Limits, Sampling

TOKENS = 48
PROMPTS = ([7], list(range(3, 67)), [(5 * i) % 251 for i in range(150)])


def reference(folder, prompt):
    """Greedy continuation by `transformers`, and the log-probability of each of its tokens and of the prompt's."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        logprobs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    chosen = logprobs.gather(1, ids[0, 1:, None])[:, 0]
    return ids[0, len(prompt) :].tolist(), chosen[len(prompt) - 1 :], chosen[: len(prompt) - 1]


async def ours(folder):
    async with serving(folder, dtype="float32") as service:
        streams = [
            service.open(
                Submit(
                    prompt=pack_ids(prompt),
                    sampling=Sampling(temperature=0.0, logprobs=2),
                    limits=Limits(max_tokens=TOKENS),
                    prompt_logprobs=0,
                )
            )
            for prompt in PROMPTS
        ]
        await ended(*streams)
        return [(s.emitted.tolist(), torch.tensor(s.logprobs), torch.tensor(s.prompt_logprobs), s.top) for s in streams]


KINDS = ("llama3-rope", "qwen3-sliding", "qwen2-sliding", "demo", "gpt-oss", "qwen3-moe-mixed", "deepseek-yarn")
MORE = ("llama", "yarn", "qwen2", "qwen3", "mistral-sliding", "glm4-moe-lite")  # the models alone: tests/models


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.soak) for kind in MORE)])
def test_greedy_equals_transformers(kind, tmp_path):
    folder = Config().folder if kind == "demo" else tmp_path
    if kind != "demo":
        checkpoints.make(kind, folder)
    for prompt, (ids, logprobs, prompt_logprobs, top) in zip(PROMPTS, run(ours(folder)), strict=True):
        expected, expected_logprobs, expected_prompt = reference(folder, prompt)

        assert ids == expected
        assert torch.allclose(logprobs.float(), expected_logprobs, atol=1e-4, rtol=0)
        assert torch.allclose(prompt_logprobs.float(), expected_prompt, atol=1e-4, rtol=0)
        assert [entry.ids[0] for entry in top] == ids
