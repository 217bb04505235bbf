"""Speculative decoding: drafts that are rejected leave no trace in the statistics.

Engines have processes of their own: vLLM 0.32 starts no second one in a process where `ngram` has imported numba.
`make engines` runs this on vLLM's build for CPUs.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from attnstats import Received, SegmentMass, TopKeys
from attnstats.integrations.vllm import engine_arguments, statistics_of
from tests.engines.vllm import tiny
from tests.engines.vllm.test_llm import STATISTICS, assert_teacher_forced, engine, generate

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def drafting(llama, tmp_path_factory):
    """By method, vLLM's settings."""
    folder = tmp_path_factory.mktemp("drafting")
    return {
        "ngram": {"prompt_lookup_max": 3, "prompt_lookup_min": 1},
        "draft_model": {"model": str(tiny.save_shorter(folder / "shorter", llama, 5))},
        "eagle": {"model": str(tiny.save_eagle(folder / "eagle", llama))},
    }


def drafting_engine(folder, drafting, method, statistics=STATISTICS, **settings):
    speculative = {"method": method, "num_speculative_tokens": 3} | drafting[method]
    arguments = engine_arguments(statistics, layers="all", reduce=None, token_entropy=True)
    settings = arguments | {"speculative_config": speculative, "disable_log_stats": False} | settings
    return engine(folder, processes=True, **settings)


def counts(llm):
    """What vLLM counted, by name."""
    return {each.name.removeprefix("vllm:"): each.value for each in llm.get_metrics() if hasattr(each, "value")}


def assert_as_without_drafts(llm, outputs, folder, temperature=1.0):
    """The results are those of one pass, and drafts were accepted and rejected."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for output in outputs:
        for i, completion in enumerate(output.outputs):
            result = statistics_of(llm, output, i)
            assert result.tokens[0].tolist() == [*output.prompt_token_ids, *completion.token_ids[:-1]]
            assert_teacher_forced(result, folder, layers="all")
            with torch.no_grad():
                logits = model(result.tokens).logits[0, :-1] / temperature
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            torch.testing.assert_close(result.token_entropy[1:], entropy, atol=1e-4, rtol=1e-4)
    counted = counts(llm)
    assert 0 < counted["spec_decode_num_accepted_tokens"] < counted["spec_decode_num_draft_tokens"]


# In which every third of the tokens comes again.
PROMPTS = [3 * tiny.prompt(n, n) for n in (10, 20, 7, 15)]


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle"])
def test_rejected_drafts_leave_no_trace(method, llama, drafting):
    with drafting_engine(llama, drafting, method) as llm:
        outputs = generate(llm, PROMPTS, (60, 50, 40, 30))
        assert_as_without_drafts(llm, outputs, llama)


def test_preempted_requests_with_drafts_and_statistics_of_all_keys(llama, drafting):
    """Ten blocks of 32 tokens are too few for four requests of up to 160."""
    kinds = [*STATISTICS, Received(), SegmentMass((0, 4, None)), TopKeys(3)]
    settings = {"block_size": 32, "num_gpu_blocks_override": 11, "max_model_len": 160}
    with drafting_engine(llama, drafting, "ngram", kinds, **settings) as llm:
        outputs = generate(llm, PROMPTS, [100] * 4)
        assert counts(llm)["num_preemptions"] > 0
        assert_as_without_drafts(llm, outputs, llama)


def test_sampled_completions_that_end_with_one_of_many_tokens(llama, drafting):
    with drafting_engine(llama, drafting, "ngram") as llm:
        outputs = generate(llm, PROMPTS, [60] * 4, n=2, temperature=0.3, stop_token_ids=list(range(0, 97, 20)))
        assert "stop" in {each.finish_reason for output in outputs for each in output.outputs}
        assert_as_without_drafts(llm, outputs, llama, temperature=0.3)
