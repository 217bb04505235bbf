"""Many prompts on a tiny model: killed, resumed and shared between processes, the results are those of one run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pandas
import psutil
import pytest
import torch

from attnstats.cli.main import main
from attnstats.errors import InputError
from attnstats.study import corpus
from attnstats.study.generation import Sampling
from attnstats.study.shards import Shard, from_environment
from attnstats.study.store import begin
from tests.tiny import WORDS, Silent

COUNT = 19  # two batches and a part of a third
PROMPTS = [[5 + i % 7] * (1 + i % 4) for i in range(COUNT)]


def fill(tiny, store, measure, shard=Shard(), temperature=0.8):  # noqa: B008
    progress = Silent()
    sampling = Sampling(6, temperature, seed=3)
    corpus.run(tiny, PROMPTS, measure, sampling, store=store, progress=progress, shard=shard)
    assert progress.steps == progress.total
    store.close()
    return {i: (*store.response(i), store.read(i)[0]["sum"].item()) for i in store.indices()}


def total(index, prompt, response):
    return {"sum": torch.tensor(sum(prompt) + 1000 * sum(response))}, {}


def test_what_is_done_is_not_done_again(tmp_path, tiny, monkeypatch):
    whole = fill(tiny, begin(tmp_path / "whole", {}, resume=False), total)
    assert sorted(whole) == list(range(COUNT))
    assert len({tuple(response) for _, response, _ in whole.values()}) > COUNT / 2, "sampled, each on its own"
    store = begin(tmp_path / "cut", {}, resume=False)

    def cut(index, prompt, response):
        if index == 11:
            raise KeyboardInterrupt
        return total(index, prompt, response)

    with pytest.raises(KeyboardInterrupt):
        fill(tiny, store, cut)
    store.close()
    assert store.indices() == list(range(11))
    measured, generated = [], []
    generate = tiny.model.generate
    monkeypatch.setattr(tiny.model, "generate", lambda **k: generated.append(len(k["input_ids"])) or generate(**k))

    def count(index, prompt, response):
        measured.append(index)
        return total(index, prompt, response)

    assert fill(tiny, begin(tmp_path / "cut", {}, resume=True), count) == whole
    assert measured == list(range(11, COUNT))
    assert generated == [COUNT - 2 * corpus.BATCH], "the second batch had its responses"


ENDS = [1, *range(20, 30)]  # so many that answers end at different steps
KILLED = """
import os, signal, sys, torch
from pathlib import Path
from attnstats.study import corpus, models
from attnstats.study.generation import Sampling
from attnstats.study.store import begin
from tests.study.test_corpus import ENDS, PROMPTS
from tests.tiny import Silent

class Killed(Silent):
    def advance(self, amount=1):
        if store.indices("json"):
            os.kill(os.getpid(), signal.SIGKILL)

store = begin(Path(sys.argv[2]), {}, resume=False)
loaded = models.load(sys.argv[1], dtype="float32", device="cpu")
loaded.model.generation_config.eos_token_id = ENDS
corpus.run(loaded, PROMPTS, None, Sampling(6, 0.8, seed=3), store=store, progress=Killed())
"""


def test_a_kill_within_a_batch_keeps_every_answer_that_was_finished(tmp_path, tiny, folder, monkeypatch):
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", ENDS)
    whole = fill(tiny, begin(tmp_path / "whole", {}, resume=False), total)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, folder, tmp_path / "cut"],
        env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = begin(tmp_path / "cut", {}, resume=True)
    kept = store.indices("json")
    assert 0 < len(kept) < corpus.BATCH
    assert store.kept() == f"{len(kept)} answer{'' if len(kept) == 1 else 's'}, 0 of them with statistics"
    assert [store.response(index) for index in kept] == [whole[index][:2] for index in kept]
    before = [(tmp_path / "cut" / "items" / f"{index:06d}.json").stat().st_mtime_ns for index in kept]
    assert fill(tiny, store, total) == whole
    assert before == [(tmp_path / "cut" / "items" / f"{index:06d}.json").stat().st_mtime_ns for index in kept]


def test_no_two_runs_of_different_seeds_share_a_batch(tiny, tmp_path, monkeypatch):
    """Seeds 0 and 8 gave the second batch of one and the first of the other the same random numbers."""
    seeds = []

    def generate(loaded, prompts, sampling, *, advance, finished):
        seeds.append(sampling.seed)
        sampling.check()
        for row in range(len(prompts)):
            finished(row, [1])
        return [[1]] * len(prompts)

    monkeypatch.setattr(corpus, "generate", generate)
    for seed in (0, 1, 8, 16, -8, 2**64 - 1, -(2**63)):
        store = begin(tmp_path / str(seed), {}, resume=False)
        corpus.run(tiny, PROMPTS, total, Sampling(1, 1.0, seed), store=store, progress=Silent())
    assert len(set(seeds)) == len(seeds) == 7 * 3


@pytest.mark.parametrize("count", [2, 5])
def test_shards_give_what_one_process_gives(tmp_path, tiny, count):
    whole = fill(tiny, begin(tmp_path / "whole", {}, resume=False), total)
    store = begin(tmp_path / "shared", {}, resume=False)
    for rank in range(count):
        found = fill(tiny, store, total, Shard(rank, count))
    assert found == whole


@pytest.mark.parametrize(("environment", "message"), [
    ({"WORLD_SIZE": "two"}, "invalid literal"),
    ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
])  # fmt: skip
def test_a_launcher_that_contradicts_itself(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        from_environment()


def write_prompts(folder):
    lines = [json.dumps({"question": " ".join(WORDS[5 + (i + j) % 5] for j in range(i % 3 + 1))}) for i in range(COUNT)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder / "prompts.jsonl"


def arguments(folder, prompts, out):
    options = f"--model {folder} --prompts {prompts} --max-tokens 24 --layers all --temperature 0.9 --device cpu"
    return ["analyze", *options.split(), "--out", str(out)]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """(prompts, out) of one process that went through, with one thread like those it is compared with."""
    place = tmp_path_factory.mktemp("whole")
    prompts = write_prompts(place)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(arguments(folder, prompts, place / "out")) == 0
    yield prompts, place / "out"
    torch.set_num_threads(threads)


def launch(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, env=environment)


def assert_same_data(one, two):
    for table in ("tokens", "heads"):
        first, second = (pandas.read_parquet(out / f"{table}.parquet") for out in (one, two))
        assert first.prompt.nunique() == COUNT
        pandas.testing.assert_frame_equal(first, second, check_exact=True)


@pytest.mark.slow
def test_accelerate_launch_writes_the_data_set_of_one_process(tmp_path, folder, whole):
    prompts, out = whole
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # --multi_gpu is how it starts several processes of torch, with or without a GPU; --cpu would start one.
    how = "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
    command = ["accelerate.commands.launch", *how.split(), f"--main_process_port={port}", "-m", "attnstats"]
    assert launch(*command, *arguments(folder, prompts, tmp_path / "two")).wait(200) == 0
    assert_same_data(out, tmp_path / "two")
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


@pytest.mark.slow
def test_a_rank_that_dies_loses_only_what_it_was_computing(tmp_path, folder, whole):
    """SIGKILL of one of two ranks, then one process goes on: what was there is untouched, the results are the same."""
    prompts, out = whole
    run = arguments(folder, prompts, tmp_path / "cut")
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "attnstats"]
    process = launch(*command, *run)
    items = tmp_path / "cut.part" / "items"
    while len(list(items.glob("*.safetensors"))) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    psutil.Process(process.pid).children()[1].kill()
    assert process.wait(100) != 0
    before = {path.name: path.stat().st_mtime_ns for path in items.glob("0*.*")}
    assert 3 <= sum(name.endswith(".safetensors") for name in before) < COUNT
    assert not (tmp_path / "cut").exists()
    assert main(run) == 2, "without --resume it says what is there"
    assert main([*run, "--resume"]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "items").glob("0*.*")}
    assert len(after) == 2 * COUNT
    assert after | before == after
    assert_same_data(out, tmp_path / "cut")
