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
from attnstats.integrations.vllm import RequestStore, engine_arguments, statistics_of
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


def assert_teacher_forced(result, folder, near=NEAR, **settings):
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
        torch.testing.assert_close(values, expected, msg=lambda text, s=s: f"{s}: {text}", **near)
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


# What vLLM does to requests


def test_tokens_of_a_cached_prefix_have_no_rows(llama):
    prompt = tiny.prompt(100, 7)
    with engine(llama, **engine_arguments(STATISTICS, reduce=None), block_size=32, enable_prefix_caching=True) as llm:
        first, second = (generate(llm, [prompt], [20])[0] for _ in range(2))
        whole, part = statistics_of(llm, first), statistics_of(llm, second)
    assert (whole.cached, part.cached) == (0, 96)
    run = assert_teacher_forced(whole, llama)
    for s in STATISTICS:
        assert part[s].shape == run[s].shape
    assert part.valid["waad"][0].tolist() == [False] * 96 + [True] * 23
    torch.testing.assert_close(part["waad"][..., 96:], run["waad"][..., 96:], **NEAR)
    assert not part["waad"][..., :96].any()
    # Columns are means over the queries that there were, as those of a pass in which no other query counts.
    assert_teacher_forced_columns(part, llama, first=96)


def assert_teacher_forced_columns(result, folder, first):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    counted = torch.arange(result.tokens.shape[1])[None] >= first
    with torch.no_grad(), attnstats.capture(model, statistics=result.statistics, query_mask=counted) as run:
        model(result.tokens)
    for s in (s for s in result.statistics if s.axis == "column"):
        assert torch.equal(result.valid[s], run.valid[s])
        torch.testing.assert_close(result[s], run[s], **NEAR)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_preempted_request_is_counted_once(llama, prefix_caching):
    """Ten blocks of 32 tokens are too few for four requests of up to 140: some lose their blocks and start again."""
    settings = {"block_size": 32, "num_gpu_blocks_override": 11, "enable_prefix_caching": prefix_caching}
    with engine(llama, **engine_arguments(STATISTICS, reduce=None), max_model_len=160, **settings) as llm:
        preempted = watched_preemptions(llm)
        outputs = generate(llm, [tiny.prompt(40, i) for i in range(4)], [100] * 4)
        results = [statistics_of(llm, output) for output in outputs]
    assert preempted
    for result in results:
        assert result.cached == 0
        assert_teacher_forced(result, llama)


def watched_preemptions(llm):
    """The list of the requests that are going to be preempted."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted, preempt = [], scheduler._preempt_request
    scheduler._preempt_request = lambda request, *args, **kwargs: (
        preempted.append(request.request_id),
        preempt(request, *args, **kwargs),
    )
    return preempted


def test_every_completion_has_its_own(llama):
    with engine(llama, **engine_arguments(STATISTICS), enable_prefix_caching=True, block_size=32) as llm:
        (output,) = generate(llm, [tiny.prompt(70, 1)], [15], n=3, temperature=1.0)
        results = [statistics_of(llm, output, i) for i in range(3)]
        with pytest.raises(ValueError, match="completion must be one that the output has, 0, 1, 2; got 3"):
            statistics_of(llm, output, 3)
    assert len({tuple(result.tokens[0].tolist()) for result in results}) == 3
    for result in results:
        if result.cached == 0:
            assert_teacher_forced(result, llama, reduce=("layers", "heads"))
        else:  # the prompt of the completions is the same
            assert result.cached == 64
    assert [result.cached for result in results].count(0) >= 1


def test_a_beam_has_the_statistics_of_its_tokens(tmp_path):
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    folder = tiny.save(tmp_path)
    tiny.save_tokenizer(tmp_path)
    settings = {"skip_tokenizer_init": False, "enable_prefix_caching": True, "block_size": 32}
    with engine(folder, **engine_arguments(STATISTICS), **settings) as llm:
        (output,) = llm.beam_search(
            [{"prompt_token_ids": tiny.prompt(40)}], BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True)
        )
        for given in (output, output.sequences[0]):
            with pytest.raises(
                TypeError, match=rf"got {type(given).__name__}\. Beam search is a request of its own for"
            ):
                statistics_of(llm, given)
        # As the error says.
        sampling = SamplingParams(max_tokens=1, skip_reading_prefix_cache=True)
        outputs = llm.generate([{"prompt_token_ids": beam.tokens} for beam in output.sequences], sampling)
        results = [statistics_of(llm, each) for each in outputs]
    assert [result.tokens[0].tolist() for result in results] == [beam.tokens for beam in output.sequences]
    for result in results:
        assert result.tokens.shape == (1, 46)
        assert_teacher_forced(result, folder, reduce=("layers", "heads"))


@pytest.mark.parametrize("kind", ["CUMULATIVE", "DELTA"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_ends_with_statistics(llama, kind, n):
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        n=n, max_tokens=9, temperature=1.0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind[kind]
    )
    results = {}
    with engine(llama, **engine_arguments(STATISTICS)) as llm:
        llm.llm_engine.add_request("r", {"prompt_token_ids": tiny.prompt(20)}, sampling)
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                ended = [each.index for each in output.outputs if each.finish_reason is not None]
                results |= {index: statistics_of(llm, output, index) for index in ended}
    assert set(results) == set(range(n))
    for result in results.values():
        assert result.tokens.shape == (1, 28)
        assert_teacher_forced(result, llama, reduce=("layers", "heads"))


def test_a_compiled_model_is_recorded(llama, monkeypatch):
    """torch.compile leaves attention to Python; here with Dynamo alone, as in vLLM's own tests on CPUs."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    with engine(llama, **engine_arguments(STATISTICS, reduce=None), enforce_eager=False) as llm:
        outputs = generate(llm, [tiny.prompt(n, n) for n in (40, 70)], [10, 20])
        for output in outputs:
            assert_teacher_forced(statistics_of(llm, output), llama)


def test_an_aborted_request_leaves_the_others_alone(llama):
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, detokenize=False)
    with engine(llama, **engine_arguments(STATISTICS, reduce=None)) as llm:
        for i in range(3):
            llm.llm_engine.add_request(f"r{i}", {"prompt_token_ids": tiny.prompt(20 + i, i)}, sampling)
        outputs = {}
        for step in range(100):
            if step == 8:
                llm.llm_engine.abort_request(["r1"])
            outputs |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
            if not llm.llm_engine.has_unfinished_requests():
                break
        assert set(outputs) == {"r0", "r2"}
        for output in outputs.values():
            assert_teacher_forced(statistics_of(llm, output), llama)


def test_a_request_can_be_left_out(llama):
    with engine(llama, **engine_arguments(STATISTICS, reduce=None)) as llm:
        prompts = [tiny.prompt(20, i) for i in range(3)]
        from vllm import SamplingParams

        on = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
        off = SamplingParams(
            max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False, extra_args={"attnstats": False}
        )
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(given, [on, off, on], use_tqdm=False)
        assert_teacher_forced(statistics_of(llm, outputs[0]), llama)
        assert_teacher_forced(statistics_of(llm, outputs[2]), llama)
        with pytest.raises(RuntimeError, match="nothing is kept of it"):
            statistics_of(llm, outputs[1])


def test_results_that_nobody_fetches_go_when_there_are_too_many(llama):
    with engine(llama, **engine_arguments(STATISTICS, keep_mb=0.005)) as llm:
        outputs = generate(llm, [tiny.prompt(60, i) for i in range(5)], [4] * 5)
        generate(llm, [tiny.prompt(5)], [2])
        assert statistics_of(llm, outputs[-1])["waad"].shape == (1, 63)
        with pytest.raises(
            RuntimeError, match=r"request '0': nothing is kept of it.*results were dropped, raise keep_mb"
        ):
            statistics_of(llm, outputs[0])


def test_heads_over_two_ranks(llama, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    arguments = engine_arguments(STATISTICS, reduce=["layers", "heads"], folder=tmp_path)
    with engine(llama, processes=True, **arguments, tensor_parallel_size=2) as llm:
        outputs = generate(llm, [tiny.prompt(n, n) for n in (40, 70)], [10, 20])
        results = [statistics_of(llm, output) for output in outputs]
        generate(llm, [tiny.prompt(5)], [2])  # with its step the workers hear that the others are finished
    store = RequestStore(tmp_path)
    for output, result in zip(outputs, results, strict=True):
        assert_teacher_forced(result, llama, reduce=("layers", "heads"))
        (written,) = store.of(output.request_id)
        assert torch.equal(written.tokens, result.tokens)
        assert all(torch.equal(written[s], result[s]) for s in STATISTICS)


# Models

FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {
        "tie_word_embeddings": True,
        "sliding_window": 24,
        "attn_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 32,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "sliding_window": 24,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 32,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, tmp_path):
    folder = tiny.save(tmp_path, family, **FAMILIES[family])
    chosen = [[0, 1], [2, 3], [0, 3], [1, 2], [0, 2], [1, 3]]
    heads = {"waad": dict(enumerate(chosen)), "fai": [1, 2]}
    arguments = engine_arguments(STATISTICS, layers="all", heads=heads, reduce=["heads"])
    with engine(folder, **arguments) as llm:
        outputs = generate(llm, [tiny.prompt(n, n) for n in (50, 90, 10)], [20, 30, 40])
        results = [statistics_of(llm, output) for output in outputs]
    for result in results:
        assert_teacher_forced(result, folder, layers="all", heads=heads, reduce="heads")


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 32}
HYBRID = {
    "falcon_h1": {"mamba_d_ssm": 256, **MAMBA},  # both in every layer
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 3,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 64,
        **MAMBA,
    },
}


@pytest.mark.parametrize("family", HYBRID)
def test_attention_of_hybrid_models(family, tmp_path):
    """State-space layers have no statistics; vLLM computes them in its own way, within 1e-4 of transformers'."""
    folder = tiny.save(tmp_path, family, **HYBRID[family])
    with engine(folder, **engine_arguments(STATISTICS, layers="all", reduce=None)) as llm:
        outputs = generate(llm, [tiny.prompt(n, n) for n in (50, 90, 10)], [20, 30, 40])
        results = [statistics_of(llm, output) for output in outputs]
    for result in results:
        assert result.layers == ((1, 3, 5) if "layer_types" in HYBRID[family] else tuple(range(6)))
        assert_teacher_forced(result, folder, near={"atol": 1e-4, "rtol": 1e-4}, layers="all")


def test_a_request_with_an_adapter_has_its_attention(llama, tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = tiny.save_adapter(tmp_path / "adapter", llama, tmp_path / "merged")
    lora = LoRARequest("one", 1, str(adapter))
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, detokenize=False)
    prompt = [{"prompt_token_ids": tiny.prompt(40)}]
    with engine(llama, **engine_arguments(STATISTICS, reduce=None), enable_lora=True, max_lora_rank=8) as llm:
        # One after the other: on CPUs vLLM 0.32 gives the adapter to all requests that share a step.
        outputs = [llm.generate(prompt, sampling, use_tqdm=False, lora_request=each)[0] for each in (lora, None)]
        results = [statistics_of(llm, output) for output in outputs]
    # vLLM adds the adapter's part in its own way: 2e-3 beside weights that hold it, where the base model is off by 9.
    assert_teacher_forced(results[0], tmp_path / "merged", near={"atol": 5e-3, "rtol": 5e-3})
    assert_teacher_forced(results[1], llama)
    with pytest.raises(AssertionError):
        assert_teacher_forced(results[0], llama, near={"atol": 0.5, "rtol": 0.0})


BFLOAT16 = {
    "llama": {},
    "qwen3_next": {  # whose linear attention vLLM has on CPUs in bfloat16 alone
        "layer_types": ["linear_attention", "full_attention"] * 3,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
}


@pytest.mark.parametrize("family", BFLOAT16)
def test_bfloat16(family, tmp_path):
    """The cache is packed for other instructions where the machine has them; numbers are those of bfloat16."""
    from transformers import AutoModelForCausalLM

    folder = tiny.save(tmp_path, family, **BFLOAT16[family])
    with engine(folder, **engine_arguments(STATISTICS, layers="all", reduce=None), dtype="bfloat16") as llm:
        (output,) = generate(llm, [tiny.prompt(100)], [30])
        result = statistics_of(llm, output)
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        with torch.no_grad(), attnstats.capture(model, statistics=STATISTICS, layers="all") as runs[dtype]:
            model(result.tokens)
    exact, rounded = (runs[dtype]["waad"] for dtype in (torch.float32, torch.bfloat16))
    assert (result["waad"] - exact).abs().mean() < 2 * (rounded - exact).abs().mean()


# Refusals


def test_settings_without_the_worker_are_an_error(llama):
    arguments = engine_arguments(STATISTICS)
    del arguments["worker_cls"]
    with (
        pytest.raises(Exception, match=r"needs worker_cls='attnstats\.integrations\.vllm\.worker\.StatisticsWorker'"),
        engine(llama, **arguments),
    ):
        pass


def test_the_worker_without_settings_is_an_error(llama):
    with (
        pytest.raises(Exception, match=r"this worker needs additional_config\['attnstats'\]"),
        engine(llama, worker_cls=engine_arguments(STATISTICS)["worker_cls"]),
    ):
        pass


def test_layers_that_are_not_there_are_named(llama):
    with (
        pytest.raises(Exception, match=r"attnstats: layers: the model has 6 layers"),
        engine(llama, **engine_arguments(STATISTICS, layers=[7])),
    ):
        pass


def test_an_engine_without_settings_has_layers_of_vllms_own(llama):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    with engine(llama) as llm:
        kinds = llm.apply_model(lambda model: {type(layer.self_attn.attn.impl) for layer in model.model.layers})
    assert kinds == [{CPUAttentionBackendImpl}]


def test_attention_that_python_does_not_see_is_found_out(llama, monkeypatch):
    """As when a CUDA graph is replayed: the step's requests have an error in the place of results."""
    from attnstats.integrations.vllm.cpu import WatchedImpl

    with engine(llama, **engine_arguments(STATISTICS)) as llm:
        stock = WatchedImpl.__mro__[2].forward
        monkeypatch.setattr(WatchedImpl, "forward", stock)
        (output,) = generate(llm, [tiny.prompt(20)], [4])
        with pytest.raises(RuntimeError, match="captured layers 2, 3, 4 was not seen in a step: CUDA graphs or"):
            statistics_of(llm, output)


@pytest.mark.parametrize("place", ["sums.CompiledSums.add", "cpu._key_cache"])
def test_a_fault_costs_statistics_and_no_answer(llama, monkeypatch, place):
    with engine(llama, **engine_arguments(STATISTICS)) as llm:
        (expected,) = generate(llm, [tiny.prompt(20)], [6])

        def failing(*_):
            raise MemoryError("no more")

        with monkeypatch.context() as patch:
            patch.setattr(f"attnstats.integrations.vllm.{place}", failing)
            (output,) = generate(llm, [tiny.prompt(20)], [6])
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        with pytest.raises(RuntimeError, match="request '1' has no statistics: layer 2: MemoryError: no more"):
            statistics_of(llm, output)
        (output,) = generate(llm, [tiny.prompt(20)], [6])
        assert_teacher_forced(statistics_of(llm, output), llama, reduce=("layers", "heads"))
