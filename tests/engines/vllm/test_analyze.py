"""`attnstats analyze --engine vllm` and `couplings --engine vllm`: a corpus that vLLM's engine generates."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas
import pytest

from attnstats.cli.main import main
from tests.engines.vllm import tiny
from tests.process import ROOT

pytestmark = pytest.mark.timeout(900)
COUNT = 12
ENDS = [1, *range(64, 72)]  # so that answers end at different steps


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and prompts."""
    folder = tmp_path_factory.mktemp("place")
    tiny.save_tokenizer(tiny.save(folder / "model"))
    settings = json.loads((folder / "model" / "generation_config.json").read_text())
    # Settings of sampling that are the model's own, which the engine would take as its defaults.
    settings |= {"eos_token_id": ENDS, "do_sample": True, "top_k": 1, "repetition_penalty": 9.0}
    (folder / "model" / "generation_config.json").write_text(json.dumps(settings))
    (folder / "prompts.txt").write_text("".join(f"{'what is ' * (1 + i % 3)}{i} and {3 * i}?\n" for i in range(COUNT)))
    return folder


def command(place, out, *options, what="analyze"):
    prompts = "--prompts" if what == "analyze" else "--data"
    start = [what, "--model", place / "model", prompts, place / "prompts.txt", "--out", place / out, "--device", "cpu"]
    return list(map(str, [*start, "--max-tokens", 40, "--quiet", *options]))


def tables(place, out):
    return [pandas.read_parquet(place / out / f"{name}.parquet") for name in ("tokens", "heads", "prompts")]


def assert_same_tables(place, one, other):
    for first, second in zip(tables(place, one), tables(place, other), strict=True):
        pandas.testing.assert_frame_equal(first, second, check_exact=True)


@pytest.fixture(scope="module")
def whole(place):
    """The folder with runs of both engines."""
    for name, options in {
        "transformers": [],
        "vllm": ["--engine", "vllm"],
        "drawn": ["--engine", "vllm", "--temperature", "0.8", "--seed", "5"],
    }.items():
        assert main(command(place, name, *options)) == 0
    return place


def test_greedy_tables_are_those_of_transformers(whole):
    assert_same_tables(whole, "vllm", "transformers")
    lengths = pandas.read_parquet(whole / "vllm" / "prompts.parquet").response_tokens
    assert lengths.nunique() > 2
    assert json.loads((whole / "vllm" / "summary.json").read_text())["versions"]["vllm"] == "0.32.0"


def test_what_is_drawn_is_drawn_from_the_whole_distribution(whole):
    tokens, _, prompts = tables(whole, "drawn")
    assert prompts.response.nunique() > COUNT / 2
    assert not prompts.response.equals(tables(whole, "vllm")[2].response)
    assert tokens.entropy[tokens.is_response].mean() > 0


def test_a_run_that_was_killed_goes_on(whole):
    options = ["--engine", "vllm", "--temperature", "0.8", "--seed", "5", "--engine-args", '{"max_num_seqs": 2}']
    cut = command(whole, "cut", *options)
    items = whole / "cut.part" / "items"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, "-m", "attnstats", *cut], env=environment) as process:
        while not (items.is_dir() and any(items.glob("*.safetensors"))):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    before = {path.name: path.stat().st_mtime_ns for path in items.glob("0*.*")}
    assert 0 < len(list(items.glob("*.safetensors"))) < COUNT
    assert main([*cut, "--resume"]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in (whole / "cut" / "items").glob("0*.*")}
    assert after | before == after
    assert_same_tables(whole, "cut", "drawn")


def test_couplings(whole):
    options = ["--template", "plain", "--permutations", "50", "--tokens", "4", "--positions", "1", "--temperature", "0"]
    for name in ("transformers", "vllm"):
        out = f"couplings of {name}"
        assert main(command(whole, out, *options, "--engine", name, what="couplings")) == 0
    ours, theirs = (
        json.loads((whole / f"couplings of {name}" / "couplings.json").read_text()) for name in ("vllm", "transformers")
    )
    assert ours["versions"].pop("vllm") == "0.32.0"
    for record in (ours, theirs):
        del record["timings_seconds"]
    assert ours == theirs


def test_an_adapter_is_in_the_engines_weights(place):
    tiny.save_adapter(place / "adapter", place / "model", place / "merged")
    tiny.save_tokenizer(place / "adapter")
    for name in ("transformers", "vllm"):
        run = command(place, f"adapted by {name}", "--engine", name)
        run[2] = str(place / "adapter")
        assert main(run) == 0
    assert_same_tables(place, "adapted by vllm", "adapted by transformers")
    assert not tables(place, "adapted by vllm")[2].response.equals(tables(place, "vllm")[2].response)


def test_a_model_that_vllm_refuses(place, capsys):
    run = command(place, "refused", "--engine", "vllm", "--engine-args", '{"quantization": "awq"}')
    assert main(run) == 2
    assert "--engine vllm: " in capsys.readouterr().err
    assert not (place / "refused.part").exists()


def test_prompts_with_seeds_are_not_cut_where_a_step_is_full(place):
    """vLLM 0.32 stops on a CPU at a part of a prompt that has a seed."""
    from attnstats.study import models, vllm
    from attnstats.study.generation import Sampling

    loaded, sampling = models.load(str(place / "model"), dtype="float32"), Sampling(3, 0.7)
    prompts = {i: tiny.prompt(400, i) for i in range(12)}  # 4,800 tokens, of which a step takes 4,096
    assert sorted(i for i, _ in vllm.choose(None, sampling).responses(loaded, prompts, sampling)) == list(range(12))
