"""vLLM's engine in the place of `generate`, with a stand-in for vLLM: what it is given, what is refused, resuming.

tests/engines/vllm/test_analyze.py has the engine itself.
"""

import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas
import pytest
import torch

import attnstats
from attnstats.cli.main import main
from attnstats.errors import InputError
from attnstats.study import corpus, models, vllm
from attnstats.study.generation import Sampling, generate
from attnstats.study.store import begin
from tests.tiny import Silent

ENDS = [1, *range(20, 30)]  # so many that answers end at different steps
PROMPTS = [[5 + i % 7] * (1 + i % 4) for i in range(11)]


def draw(seed=None):
    """A number of each global generator."""
    if seed is not None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
    return torch.rand(1).item(), random.random(), np.random.random()  # noqa: NPY002


class Engine:
    """Some requests at a time, a token of each in a step, of the model that lies in the folder."""

    AT_ONCE = 3
    RANK = (0,)  # of the tokens that are written greedily, in turn: 0 is the likeliest

    def __init__(self, model, **arguments):
        from transformers import AutoModelForCausalLM

        if "absent" in arguments.get("quantization", ""):
            raise ValueError("1 validation error\n  no such quantization")
        draw(seed=0)
        torch.set_num_threads = lambda count: None
        self.arguments, self.environment = {"model": model} | arguments, dict(os.environ)
        dtype = getattr(torch, arguments["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True).eval()
        self.requests, self.stopped, self.llm_engine, self.engine_core = {}, False, self, self
        started.append(self)

    def add_request(self, name, prompt, how):
        draw = None if how.seed is None else torch.Generator().manual_seed(how.seed)
        self.requests[name] = [list(prompt["prompt_token_ids"]), 0, how, draw]

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        if self.arguments.get("quantization") == "late":
            raise RuntimeError("no such kernel\n")
        for name in list(self.requests)[: self.AT_ONCE]:
            ids, count, how, draw = self.requests[name]
            with torch.no_grad():
                logits = self.model(torch.tensor([ids])).logits[0, -1].double()
            if how.temperature:
                token = int(torch.multinomial((logits / how.temperature).softmax(-1), 1, generator=draw))
            else:
                token = int(logits.argsort(descending=True)[self.RANK[count % len(self.RANK)]])
            finished = token in how.stop_token_ids or count + 1 == how.max_tokens
            self.requests[name] = [[*ids, token], count + 1, how, draw]
            if finished:
                del self.requests[name]
            yield SimpleNamespace(request_id=name, outputs=[SimpleNamespace(token_ids=[token])], finished=finished)

    def shutdown(self):
        self.stopped = True


started: list[Engine] = []


@pytest.fixture
def engines(monkeypatch):
    """The engines that were started, with a stand-in for vLLM."""

    def parts(tensor_parallel_size=1, gpu_memory_utilization=0.9, quantization="", dtype="auto"):
        pass

    names = {
        "vllm": {"__version__": "0.32.0", "LLM": Engine, "SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA="delta")},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"EngineArgs": parts},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    started.clear()
    return started


@pytest.fixture
def ending(tiny, monkeypatch):
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", ENDS)
    return tiny


def answers(loaded, temperature=0.0, seed=3, prompts=PROMPTS):
    sampling = Sampling(6, temperature, seed)
    return list(vllm.choose(None, sampling).responses(loaded, dict(enumerate(prompts)), sampling))


def test_the_engine_answers_as_the_model_does(ending, engines):
    found = answers(ending)
    assert [index for index, _ in found] != list(range(len(PROMPTS))), "some end before others that began earlier"
    assert [response for _, response in sorted(found)] == generate(ending, PROMPTS, Sampling(6))
    (engine,) = engines
    assert engine.stopped
    expected = {
        "model": ending.source, "dtype": "float32", "generation_config": "vllm", "skip_tokenizer_init": True,
        "max_model_len": 4 + 6, "enforce_eager": True,
    }  # fmt: skip
    assert engine.arguments | expected == engine.arguments
    assert engine.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_this_process_stays_as_it_was(ending, engines):
    expected = draw(seed=7), draw()
    draw(seed=7)
    before, threads = dict(os.environ), torch.set_num_threads
    answers(ending, 0.8)
    assert os.environ == before
    assert torch.set_num_threads is threads
    assert draw() == expected[1]


def test_a_prompt_is_drawn_the_same_whatever_runs_beside_it(ending, engines):
    whole = dict(answers(ending, 0.8))
    assert len(set(map(tuple, whole.values()))) > len(PROMPTS) / 2
    sampling = Sampling(6, 0.8, 3)
    alone = dict(vllm.choose(None, sampling).responses(ending, {4: PROMPTS[4], 9: PROMPTS[9]}, sampling))
    assert alone == {4: whole[4], 9: whole[9]}
    assert dict(answers(ending, 0.8, seed=4)) != whole


def total(index, prompt, response):
    return {"sum": torch.tensor(sum(prompt) + 1000 * sum(response))}, {}


def fill(loaded, store, measure, temperature=0.8):
    sampling, progress = Sampling(6, temperature, 3), Silent()
    engine = vllm.choose(None, sampling)
    corpus.run(loaded, PROMPTS, measure, sampling, store=store, progress=progress, engine=engine)
    assert progress.steps == progress.total
    store.close()
    return {i: (*store.response(i), store.read(i)[0]["sum"].item()) for i in store.indices()}


def test_responses_are_measured_as_they_end_and_a_run_that_was_cut_goes_on(tmp_path, ending, engines):
    whole = fill(ending, begin(tmp_path / "whole", {}, resume=False), total)
    store, seen = begin(tmp_path / "cut", {}, resume=False), []

    def cut(index, prompt, response):
        seen.append(index)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return total(index, prompt, response)

    with pytest.raises(KeyboardInterrupt):
        fill(ending, store, cut)
    store.close()
    assert engines[-1].stopped
    assert engines[-1].requests, "others were still running"
    assert (len(store.indices()), len(store.indices("json"))) == (3, 4)
    measured = []

    def count(index, prompt, response):
        measured.append(index)
        return total(index, prompt, response)

    assert fill(ending, begin(tmp_path / "cut", {}, resume=True), count) == whole
    assert sorted(measured + seen[:3]) == list(range(len(PROMPTS)))
    started = len(engines)
    assert fill(ending, begin(tmp_path / "cut", {}, resume=True), count) == whole
    assert len(engines) == started, "nothing was left to generate"


@pytest.mark.parametrize("kind", ["changed weights", "hub name"])
def test_weights_that_are_in_no_folder_are_written_for_the_engine(ending, engines, kind, monkeypatch, tmp_path):
    loaded = models.LoadedModel(ending.name, ending.model, ending.tokenizer)
    monkeypatch.setattr(loaded.model.generation_config, "temperature", 0.3)  # saving would refuse it
    if kind == "hub name":
        snapshot = tmp_path / "models--some--tiny" / "snapshots" / "abc"
        snapshot.parent.mkdir(parents=True)
        snapshot.symlink_to(ending.source)
        refs = tmp_path / "models--some--tiny" / "refs"
        refs.mkdir()
        (refs / "main").write_text("abc")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
        loaded = models.LoadedModel("some/tiny", ending.model, ending.tokenizer, source="some/tiny")
    assert [response for _, response in sorted(answers(loaded))] == generate(ending, PROMPTS, Sampling(6))
    (engine,) = engines
    if kind == "hub name":
        assert engine.arguments["model"] == str(snapshot)
    else:
        assert not Path(engine.arguments["model"]).exists()
    assert loaded.model.generation_config.temperature == 0.3


def arguments(folder, out, *more):
    options = f"--model {folder} --prompt how --prompt many --max-tokens 24 --layers all --device cpu --quiet"
    return ["analyze", *options.split(), "--out", str(out), "--engine", "vllm", *more]


def test_both_engines_write_the_same_tables(tmp_path, folder, engines):
    assert main(arguments(folder, tmp_path / "ours", "--engine-args", '{"gpu_memory_utilization": 0.3}')) == 0
    assert main([*arguments(folder, tmp_path / "theirs"), "--engine", "transformers"]) == 0
    for table in ("tokens", "heads"):
        first, second = (pandas.read_parquet(tmp_path / out / f"{table}.parquet") for out in ("ours", "theirs"))
        pandas.testing.assert_frame_equal(first, second, check_exact=True)
    assert engines[0].arguments["gpu_memory_utilization"] == 0.3
    of_vllm, other = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("ours", "theirs"))
    assert of_vllm["versions"].items() - other["versions"].items() == {("vllm", "0.32.0")}
    in_python = attnstats.analyze(
        folder, prompts=["how", "many"], max_tokens=24, layers="all", device="cpu", out=tmp_path / "python",
        engine="vllm", engine_args={"gpu_memory_utilization": 0.3},
    )  # fmt: skip
    assert in_python.tokens.equals(attnstats.load(tmp_path / "ours").tokens)


def test_greedy_tokens_that_the_model_would_not_have_written_are_reported(
    tmp_path, folder, tiny, engines, capsys, monkeypatch
):
    def near_ties(name, *options):
        assert main([each for each in arguments(folder, tmp_path / name, *options) if each != "--quiet"]) == 0
        run = attnstats.load(tmp_path / name)
        return run.summary.get("near_ties"), run, " ".join(capsys.readouterr().out.split())

    none = {"tokens_not_the_likeliest": 0, "largest_gap_nats": 0.0}
    found, _, said = near_ties("one")
    assert found == none
    assert "items 0 greedy tokens are not the likeliest in the pass that reads" in said
    assert near_ties("theirs", "--engine", "transformers")[0] == none
    assert "in the pass that reads" not in near_ties("quiet", "--engine", "transformers")[2]
    assert near_ties("drawn", "--temperature", "1")[0] is None
    monkeypatch.setattr(Engine, "RANK", (0, 0, 1))
    found, run, said = near_ties("ours")
    gaps = []
    for analysis in run:
        with torch.no_grad():
            logits = tiny.model(analysis.token_ids[None]).logits[0, :-1]
        gaps.append((logits.amax(-1) - logits.gather(1, analysis.token_ids[1:, None])[:, 0])[analysis.response[1:]])
    count = found["tokens_not_the_likeliest"]
    assert count == sum(int((gap > 1e-5).sum()) for gap in gaps) > 10
    assert found["largest_gap_nats"] == pytest.approx(max(float(gap.max()) for gap in gaps), rel=1e-4)
    assert f"{count} greedy tokens are not the likeliest in the pass that reads; that is ahead by" in said
    assert [int((gap > 1e-5).sum()) for gap in gaps] == [analysis.departures.tokens for analysis in run]
    assert "Near-ties" in run.page()


def test_a_run_is_resumed_with_its_engine(tmp_path, folder, engines, capsys):
    (tmp_path / "prompts.txt").write_text("how\nmany\n")
    options = f"couplings --model {folder} --data {tmp_path}/prompts.txt --template plain --permutations 20 --tokens 2"
    options += f" --max-tokens 12 --positions 1 --device cpu --quiet --out {tmp_path}/out"
    ours = [*options.split(), "--engine", "vllm", "--engine-args", '{"tensor_parallel_size": 1}']
    assert main(ours) == 0
    count = len(engines)
    assert json.loads((tmp_path / "out" / "couplings.json").read_text())["versions"]["vllm"] == "0.32.0"
    for other, named in (
        ([], 'engine "vllm 0.32.0", this run has "transformers"'),
        (["--engine", "vllm"], "begun with tensor_parallel_size 1, this run has null"),
    ):
        capsys.readouterr()
        assert main([*options.split(), *other, "--resume"]) == 2
        assert named in capsys.readouterr().err
    sys.modules["vllm"].__version__ = "0.33.0"
    assert main([*ours, "--resume"]) == 2
    assert 'engine "vllm 0.32.0", this run has "vllm 0.33.0"' in capsys.readouterr().err
    sys.modules["vllm"].__version__ = "0.32.0"
    assert main([*ours[:-1], '{"tensor_parallel_size": 1, "gpu_memory_utilization": 0.1}', "--resume"]) == 0
    assert len(engines) == count


@pytest.mark.parametrize(("options", "message"), [
    (["--engine-args", "{"], "--engine-args '{': needs a JSON object"),
    (["--engine-args", "[1]"], "--engine-args '[1]': needs a JSON object"),
    (["--engine-args", '{"gpu": 1}'], "--engine-args: vLLM 0.32.0 has no argument 'gpu'"),
    (["--engine-args", '{"dtype": "half"}'], "--engine-args: dtype is decided by"),
    (["--engine", "transformers", "--engine-args", "{}"], "--engine-args: is for --engine vllm"),
    (["--temperature", "0.001"], "--temperature 0.001: vLLM would draw at 0.01; use 0 (greedy), 0.01 or more"),
    (["--temperature", "2.5"], "--temperature 2.5: vLLM takes 2 at most; leave --engine vllm out"),
])  # fmt: skip
def test_what_is_refused_before_anything_is_loaded(tmp_path, engines, options, message, capsys):
    assert main([*arguments("./absent", tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_texts_that_exist_are_not_generated(tmp_path, folder, engines, capsys):
    (tmp_path / "text.txt").write_text("how many")
    command = ["analyze", "--model", str(folder), "--text", f"{tmp_path}/text.txt", "--engine", "vllm"]
    assert main(command) == 2
    assert "--engine vllm: generates, and the text exists; leave it out" in capsys.readouterr().err
    assert main(["couplings", "--requests", str(tmp_path), "--engine", "vllm"]) == 2
    assert "--engine vllm: generates, and --requests has responses; leave it out" in capsys.readouterr().err
    with pytest.raises(InputError, match="engine sglang: no such engine; there are transformers, vllm"):
        attnstats.analyze(folder, prompts=["how"], out=tmp_path / "out", engine="sglang")


def test_a_launcher_starts_no_engines(tmp_path, folder, engines, capsys, monkeypatch):
    from attnstats.cli import job
    from attnstats.study.shards import Shard

    monkeypatch.setattr(job, "from_environment", lambda: Shard(0, 2))
    assert main(arguments(folder, tmp_path / "out")) == 2
    assert "is for one process" in capsys.readouterr().err


def test_without_vllm(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(arguments(folder, tmp_path / "out")) == 2
    assert "--engine vllm: vllm is not installed; run: pip install 'attnstats[vllm]'" in capsys.readouterr().err


def test_what_vllm_refuses(tmp_path, folder, engines, capsys):
    assert main([*arguments(folder, tmp_path / "out"), "--engine-args", '{"quantization": "absent"}']) == 2
    error = capsys.readouterr().err
    assert "--engine vllm: 1 validation error no such quantization (--engine-args sets arguments" in error
    assert main([*arguments(folder, tmp_path / "out"), "--engine-args", '{"quantization": "late"}']) == 2
    assert "--engine vllm: no such kernel (--engine-args sets arguments" in capsys.readouterr().err
    assert engines[-1].stopped
    assert list(tmp_path.iterdir()) == []
