"""Statistics of requests in vLLM's own engine, its processes included, against one teacher-forced pass of transformers.

`make engines` runs this on vLLM's build for CPUs.
"""

from __future__ import annotations

import contextlib
import gc
import os

import pytest
import torch

import attnstats
from attnstats import FAI, WAAD, Entropy, LocalMass, MaxLogit, Received, SegmentMass, TopKeys
from attnstats.integrations.vllm import engine_arguments, statistics_of
from tests.engines.vllm import tiny

pytestmark = pytest.mark.timeout(600)
NEAR = {"atol": 1e-5, "rtol": 1e-5}
STATISTICS = [WAAD(10), FAI(10, 40)]


@contextlib.contextmanager
def engine(folder, processes=False, **settings):
    """vLLM's LLM with a small cache; it is shut down afterwards. processes: with those of its own, as by default."""
    from vllm import LLM

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(processes))
    default = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
    }
    llm = LLM(str(folder), **default | settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def generate(llm, prompts, lengths, **sampling):
    from vllm import SamplingParams

    default = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    each = [SamplingParams(max_tokens=length, **default | sampling) for length in lengths]
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], each, use_tqdm=False)


def assert_teacher_forced(result, folder, **settings):
    """Every number is that of one pass of transformers over the tokens; returns the run of it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    statistics = result.statistics
    with torch.no_grad(), attnstats.capture(model, statistics=statistics, **settings) as run:
        model(result.tokens)
    for s in statistics:
        assert torch.equal(result.valid[s], run.valid[s]), s
        values, expected = result[s], run[s]
        if isinstance(s, TopKeys):
            values, expected = values.values, expected.values
        torch.testing.assert_close(values, expected, msg=lambda text, s=s: f"{s}: {text}", **NEAR)
    return run


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("llama"))


LENGTHS = (5, 90, 33, 150, 20, 61)  # more than a step has room for, in tokens and in requests


@pytest.fixture(scope="module")
def served(llama):
    """Six requests with all kinds of statistics, by head and layer, and their results."""
    kinds = [*STATISTICS, LocalMass(5), Entropy(), MaxLogit(), Received(), SegmentMass((0, 4, None)), TopKeys(3)]
    with engine(llama, processes=True, **engine_arguments(kinds, layers="all", reduce=None)) as llm:
        outputs = generate(llm, [tiny.prompt(n, n) for n in LENGTHS], [10 + 7 * i for i in range(len(LENGTHS))])
        yield [(output, statistics_of(llm, output)) for output in outputs], llm


@pytest.mark.parametrize("request_", range(len(LENGTHS)))
def test_every_request_has_the_statistics_of_a_pass_over_its_tokens(served, llama, request_):
    output, result = served[0][request_]
    assert result.tokens[0].tolist() == [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    assert result.cached == 0
    assert_teacher_forced(result, llama, layers="all")


def test_a_result_reads_like_that_of_a_capture(served, llama):
    result = served[0][0][1]
    run = assert_teacher_forced(result, llama, layers="all")
    assert result.layers == run.layers
    assert result["waad"].shape == run["waad"].shape
    assert "fai" in result
    assert result.to_frame().index.equals(run.to_frame().index)
    assert repr(result).startswith("Request of 14 tokens: layers 0, 1, 2, 3, 4, 5\n  WAAD(window=10): (6, 1, 4, 14)")


def test_a_result_is_fetched_once(served):
    (output, _), llm = served[0][0], served[1]
    with pytest.raises(RuntimeError, match=r"request '0': nothing is kept of it\. It was fetched before"):
        statistics_of(llm, output)
