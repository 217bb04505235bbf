"""The corpus pass and the tables of `attnstats couplings`: against eager attention, by hand, and after a kill."""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest
import torch
from rich.console import Console

from attnstats.chance import Chance
from attnstats.cli import couplings as command
from attnstats.cli import tables
from attnstats.errors import InputError
from attnstats.identity import identity
from attnstats.rhythm import couplings
from attnstats.segments import boundaries
from attnstats.statistics import FAI
from attnstats.study.couplings import (
    ANALYSIS,
    HORIZONS,
    WINDOWS,
    Variant,
    curves_of,
    examine,
    measure,
    name_of,
    profiles_of,
    thirds,
    variants,
)
from attnstats.study.reading import pieces
from attnstats.study.store import Store, begin
from benchmarks import couplings_control
from tests.tiny import interrupted_in_pass, run_with, save_tiny_model

QUESTIONS = ["how many rolls", "are w1 w2 w3 w4 left w5 w6 w7", "so", "many w9 w8", "left"]
FAST = Chance(permutations=50, resamples=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that hardly ever ends its responses."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny"), eos_token_id=None, initializer_range=0.15)


def data_file(folder, questions=QUESTIONS):
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps({"question": question}) + "\n" for question in questions))
    return file


def options_of(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return parser.parse_args(["couplings", *map(str, arguments)])


def arguments_of(folder, out, *more, data=None):
    base = ["--model", folder, "--data", data or data_file(folder), "--out", out, "--template", "plain", "--system", ""]
    small = ["--max-tokens", 40, "--permutations", 40, "--tokens", 5, "--positions", 2, "--candidates", 2]
    return [*base, *small, *more]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run that went through."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert command.run(options_of(*arguments_of(folder, out))) == 0
    return out


@pytest.fixture(scope="module")
def store(finished):
    return Store(finished / command.CORPUS)


def maps_of(tiny, ids):
    output = run_with(tiny.model, "eager", input_ids=torch.tensor([ids]))
    return torch.cat(output.attentions).double(), output.logits[0].double()


@pytest.mark.parametrize("response", [[5, 9, 11, 8, 20, 31, 6, 7, 17, 22, 25, 30, 33, 12, 9, 8], [7], [7, 8]])
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_what_is_measured_is_what_the_maps_say(tiny, response, temperature):
    prompt = [3, 5, 6, 4]
    tensors, texts = measure(tiny, prompt, response, temperature)
    maps, logits = maps_of(tiny, prompt + response)
    start, length = len(prompt), len(prompt + response)
    positions = torch.arange(length)
    distance = (positions[:, None] - positions).clamp(min=0)
    rows = torch.arange(start - 1, length - 1)
    gap = logits[rows].max(-1).values - logits[rows, torch.tensor(response)]
    assert texts == {"departures": (int((gap > 0).sum()), pytest.approx(float(gap.max()), rel=1e-4))}
    assert tensors["layers"].tolist() == list(range(6))
    for window in WINDOWS:
        expected = (maps * distance.clamp(max=window)).sum(-1)[..., start:]
        torch.testing.assert_close(tensors[f"waad.{window}"].double(), expected, rtol=1e-4, atol=1e-4)
    expected = (maps * distance).sum(-1)[..., start:]
    torch.testing.assert_close(tensors["mean_distance"].double(), expected, rtol=1e-4, atol=1e-4)
    for horizon in HORIZONS:
        hi = length if horizon.hi is None else horizon.hi
        for i, s in enumerate(range(start, length)):
            queries = range(s + horizon.lo, min(length, s + hi + 1))
            assert tensors[f"valid.{name_of(horizon)}"][i] == bool(queries)
            expected = maps[..., list(queries), s].mean(-1) if queries else torch.zeros(6, 4, dtype=torch.float64)
            torch.testing.assert_close(tensors[name_of(horizon)][..., i].double(), expected, rtol=1e-4, atol=1e-6)
    bounds = boundaries(pieces(tiny.tokenizer, prompt + response), start=start)
    for j, (first, last) in enumerate(pairwise(bounds[1:])):
        later = [maps[..., a:b, first:last].mean((-2, -1)) for a, b in pairwise(bounds[j + 5 :])]
        if later:
            torch.testing.assert_close(tensors["sentences"][..., j], torch.stack(later).mean(0), rtol=1e-3, atol=1e-6)
        else:
            assert tensors["sentences"][..., j].isnan().all()
    drawn = (logits[start - 1 : -1] / (temperature or 1.0)).log_softmax(-1)
    entropy = -(drawn.exp() * drawn).sum(-1)
    torch.testing.assert_close(tensors["entropy"].double(), entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "sizes"), [(30, [10, 10, 10]), (28, [9, 9, 10]), (2, [1, 1]), (1, [1])])
def test_thirds_are_all_layers(count, sizes):
    parts = thirds(range(count))
    assert [len(part) for part in parts.values()] == sizes
    assert [layer for part in parts.values() for layer in part] == list(range(count))


def test_every_variant_changes_one_setting():
    labelled = variants(tuple(range(30)), 9)
    default = labelled[0].variant
    assert default == Variant()
    assert (default.layers, default.share, default.window, default.horizon) == (None, 0.3, 10, FAI(0, None))
    fields = [field.name for field in dataclasses.fields(Variant)]
    for label in labelled[1:]:
        changed = [name for name in fields if getattr(label.variant, name) != getattr(default, name)]
        assert len(changed) == 1, label
    assert {label.setting for label in labelled} == {
        "default", "peak rule", "chance", "layers", "head share", "W", "lo, hi", "receiver heads"
    }  # fmt: skip
    assert len({label.variant for label in labelled}) == len(labelled)
    layers = {label.value: label.variant.layers for label in labelled if label.setting == "layers"}
    assert layers["five of the middle third"] == (10, 12, 15, 18, 20)


def test_curves_are_means_over_heads_of_the_whole_corpus(store, tiny):
    items = [tensors for tensors, _ in store]
    assert len(items) == len(QUESTIONS)
    rows = torch.cat([item["mean_distance"] for item in items], -1).double()
    profiles = profiles_of(store, identity(tiny.model))
    torch.testing.assert_close(profiles.tokens.distance, rows.mean(-1))
    local = rows.mean(-1).flatten().argsort()[:7]  # 30 % of 24 heads
    far = rows.mean(-1).flatten().argsort(descending=True)[:7]
    curves = curves_of(store, profiles, Variant())
    for item, curve in zip(items, curves, strict=True):
        torch.testing.assert_close(curve.waad, item["waad.10"].flatten(0, 1)[local].mean(0))
        torch.testing.assert_close(curve.fai, item[name_of(ANALYSIS)].flatten(0, 1)[far].mean(0))
        receivers = profiles.tokens.kurtosis.flatten().argsort(descending=True)[:20]
        torch.testing.assert_close(curve.receiver_fai, item[name_of(ANALYSIS)].flatten(0, 1)[receivers].mean(0))


def test_distinct_receivers_are_no_global_heads(store, tiny):
    profiles = profiles_of(store, identity(tiny.model))
    classes, receivers = Variant(receivers=5, distinct=True).heads(profiles)
    overlapping, same = Variant(receivers=5).heads(profiles)
    assert torch.equal(receivers, same)
    assert not (classes.global_ & receivers).any()
    assert torch.equal(classes.global_, overlapping.global_ & ~receivers)


def test_findings_are_the_couplings_of_the_curves(store, tiny):
    found = examine(store, identity(tiny.model), FAST)
    profiles = profiles_of(store, identity(tiny.model))
    base = Variant()
    assert found.rows[0].couplings == couplings(curves_of(store, profiles, base), base.rule, FAST)
    assert found.responses == len(QUESTIONS)
    assert found.tokens == sum(tensors["entropy"].shape[0] for tensors, _ in store)
    narrow = next(row for row in found.rows if (row.setting, row.value) == ("W", "5"))
    variant = Variant(window=5)
    assert narrow.couplings == couplings(curves_of(store, profiles, variant), base.rule, FAST)
    assert len(found.offsets) == 36


def test_the_results_of_a_run(finished, folder):
    record = json.loads((finished / command.RESULTS).read_text())
    assert [c["name"] for c in record["couplings"]] == [
        "entropy at WAAD peaks",
        "receiver FAI peaks that are global FAI peaks",
        "FAI peaks at or just after a WAAD peak",
    ]
    assert set(record["couplings"][0]) == {
        "name", "observed", "random", "lift", "p_value", "low", "high", "count", "responses", "reason"
    }  # fmt: skip
    assert record["settlements"][0]["couplings"] == record["couplings"]
    assert record["responses"] == len(QUESTIONS)
    assert set(record["perturbation"]) == {"the likeliest", "the likeliest but the one written"}
    assert 0 <= record["perturbation"]["the likeliest"]["high"] <= 1
    assert {"generate", "statistics", "tables", "perturb"} <= set(record["timings_seconds"])
    assert (finished / command.PROFILE).is_file()


def test_no_text_of_prompts_or_responses_is_in_the_results(finished, tiny):
    text = (finished / command.RESULTS).read_text() + (finished / command.PROFILE).read_text()
    for word in ("rolls", "how many", "w7", "w9"):
        assert word not in text


def test_the_same_run_gives_the_same_numbers(finished, folder, tmp_path):
    options = options_of(*arguments_of(folder, tmp_path / "out"))
    assert command.run(options) == 0
    first, second = (json.loads((out / command.RESULTS).read_text()) for out in (finished, tmp_path / "out"))
    for record in (first, second):
        record.pop("timings_seconds"), record.pop("date")
    assert first == second


def test_a_killed_run_goes_on(finished, folder, tmp_path):
    """Killed without mercy while it measures: what was finished is not touched, and the numbers are the same."""
    out = tmp_path / "out"
    arguments = list(map(str, arguments_of(folder, out)))
    program = """
import functools, sys, time, transformers
from attnstats.cli.main import main

forward = transformers.LlamaForCausalLM.forward

@functools.wraps(forward)
def slow(*args, **inputs):
    time.sleep(0.5 if inputs.get("use_cache") is False else 0)
    return forward(*args, **inputs)

transformers.LlamaForCausalLM.forward = slow
main(["couplings", *sys.argv[1:]])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], env=environment, stdout=subprocess.DEVNULL)
    items = out / command.CORPUS / "items"
    try:
        deadline = time.monotonic() + 120
        while len(list(items.glob("[0-9]*.safetensors"))) < 2:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in items.glob("[0-9]*")}
    assert len([path for path in kept if path.suffix == ".safetensors"]) < len(QUESTIONS)
    refused = options_of(*arguments)
    with pytest.raises(InputError, match="--resume"):
        command.run(refused)
    options = options_of(*arguments, "--resume")
    assert command.run(options) == 0
    for path, (written, content) in kept.items():
        assert (path.stat().st_mtime_ns, path.read_bytes()) == (written, content)
    first, second = (json.loads((folder / command.RESULTS).read_text()) for folder in (finished, out))
    assert first["couplings"] == second["couplings"]
    assert first["settlements"] == second["settlements"]
    assert first["perturbation"] == second["perturbation"]


@pytest.mark.parametrize(("more", "message"), [
    (["--limit", 0], "--limit must be at least 1, got 0"),
    (["--permutations", 0], "--permutations must be at least 1, got 0"),
    (["--positions", 0], "--positions must be at least 1"),
    (["--max-tokens", 0], "--max-tokens must be >= 1"),
    (["--temperature", -1], "--temperature must be 0"),
    (["--max-tokens", 1000], "--max-tokens 1000: with a prompt of"),
    (["--model", "./none"], "--model ./none: no such folder"),
    (["--data", "./none.jsonl"], "No such file"),
])  # fmt: skip
def test_bad_input(folder, tmp_path, more, message):
    options = options_of(*arguments_of(folder, tmp_path / "out", *more))
    with pytest.raises(InputError, match=message):
        command.run(options)


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 2: not JSON"), ('{"answer": "x"}', r"line 2: needs an object"), ('{"question": " "}', "line 2"),
])  # fmt: skip
def test_broken_data(folder, tmp_path, line, message):
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "so"}\n' + line + "\n")
    options = options_of(*arguments_of(folder, tmp_path / "out", data=file))
    with pytest.raises(InputError, match=message):
        command.run(options)


def test_another_run_is_not_continued(finished, folder):
    options = options_of(*arguments_of(folder, finished, "--resume", "--seed", 5))
    with pytest.raises(InputError, match="seed"):
        command.run(options)


def shown(findings, tested):
    console = Console(width=240, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    for part in tables.render(findings, tested):
        console.print(part)
    return console.export_text()


def test_the_papers_numbers_stand_beside_ours(store, tiny):
    text = shown(examine(store, identity(tiny.model), FAST), {})
    for number in ("0.3608", "0.2386", "0.6084", "0.2241", "0.5253", "0.3687", "+171 %", "+42 %", "+296 %", "22.4 %"):
        assert number in text
    assert "Table 1:" not in text
    for word in ("Table 2", "Table 10", "Table 20", "head share", "top third", "receiver FAI"):
        assert word in text


def test_a_single_response_has_a_dash_and_the_reason_in_tables_and_file(folder, tmp_path, capsys):
    """One response that is as long as it may be: couplings, and nothing about their chance."""
    data = data_file(tmp_path, QUESTIONS[:1])
    options = options_of(*arguments_of(folder, tmp_path / "out", "--max-tokens", 60, data=data))
    assert command.run(options) == 0
    record = json.loads((tmp_path / "out" / command.RESULTS).read_text())
    reason = "no interval and no p over fewer than 5 responses with a peak"
    for coupling in record["couplings"]:
        assert coupling["lift"] is not None
        assert coupling["reason"] == reason
        assert coupling["p_value"] is coupling["low"] is coupling["high"] is None
    said = capsys.readouterr().out
    assert said.count(f"-: {reason}") >= 3
    assert "-: no interval and no p over fewer than 5 trials" in said
    assert "nan" not in said


def test_short_responses_leave_numbers_out_and_say_so(folder, tmp_path, capsys):
    """No peaks, no perturbation: null in the file and a dash in the tables, never NaN."""
    options = options_of(*arguments_of(folder, tmp_path / "out", "--max-tokens", 2))
    assert command.run(options) == 0
    text = (tmp_path / "out" / command.RESULTS).read_text()
    assert "NaN" not in text
    record = json.loads(text)
    assert record["couplings"] == []  # no head receives anything that has a kurtosis
    assert record["heads"]["not_ranked_as_receivers"] == 24
    said = capsys.readouterr().out
    assert "heads not ranked as receivers: no response has 4 values of what they receive" in said
    assert "no heads: no response has 4 values of what they receive" in said
    assert record["perturbation"]["the likeliest"] == {
        "high": None, "low": None, "lower": None, "p_value": None, "difference_low": None, "difference_high": None,
        "count": 0, "reason": "no interval and no p over fewer than 5 trials",
    }  # fmt: skip


def test_the_papers_template(folder, tiny, tmp_path):
    out = tmp_path / "out"
    data = data_file(tmp_path, ["so w1. how many?"])
    options = options_of(*arguments_of(folder, out, "--template", "paper", "--max-tokens", 3, data=data))
    assert command.run(options) == 0
    prompt, _ = Store(out / command.CORPUS).response(0)
    expected = tiny.tokenizer("user Context: so w1.\nQuestion: how many? so ")["input_ids"]
    assert prompt == expected


def test_conversations_are_not_put_into_the_papers_template(folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "how many"}]}))
    with pytest.raises(InputError, match=r"--template paper: is for questions.*use --template plain"):
        command.run(options_of(*arguments_of(folder, tmp_path / "out", "--template", "paper", data=data)))
    assert command.run(options_of(*arguments_of(folder, tmp_path / "out", "--max-tokens", 3, data=data))) == 0


def test_an_empty_store_has_no_profile(tmp_path, tiny):
    with pytest.raises(ValueError, match="responses: there is none"):
        profiles_of(begin(tmp_path / "new", {}, resume=False), identity(tiny.model))


def test_another_end_token_is_another_run(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    with interrupted_in_pass(5), pytest.raises(KeyboardInterrupt):
        command.run(options_of(*arguments_of(model, tmp_path / "out")))
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [1, 9]}))
    with pytest.raises(InputError, match=r"was begun with end_tokens \[1\], this run has \[1, 9\]"):
        command.run(options_of(*arguments_of(model, tmp_path / "out", "--resume")))


def test_the_tables_of_a_corpus_read_one_response_at_a_time(store, tiny, tmp_path, alive):
    larger = begin(tmp_path / "larger", {}, resume=False)
    for index in range(4 * len(QUESTIONS)):
        larger.write(index, *store.read(index % len(QUESTIONS)))
    tensors = len(larger.read(0)[0])
    alive[0] = 0
    examine(larger, identity(tiny.model), FAST)
    assert 5 <= alive[0] <= 2 * tensors


def test_ctrl_c_keeps_what_is_done_and_says_so(folder, tmp_path):
    message = r"5 answers, 3 of them with statistics, of 5 prompts, kept in .*corpus; go on with --resume"
    # The first pass is a check of the model, before anything is generated.
    with interrupted_in_pass(5), pytest.raises(KeyboardInterrupt, match=message):
        command.run(options_of(*arguments_of(folder, tmp_path / "out")))
    assert Store(tmp_path / "out" / command.CORPUS).indices() == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_damaged_file_is_named(finished, folder, tmp_path, suffix):
    out = shutil.copytree(finished, tmp_path / "out")
    perturbed = next((out / command.PERTURBED / "items").glob("*.safetensors")).name
    broken = (out / command.CORPUS / "items" / perturbed).with_suffix(suffix)
    broken.write_bytes(broken.read_bytes()[:20])
    shutil.rmtree(out / command.PERTURBED)
    with pytest.raises(InputError, match=f"{broken.name}: cannot be read"):
        command.run(options_of(*arguments_of(folder, out, "--resume")))


def test_an_out_that_is_a_file(folder, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="--out"):
        command.run(options_of(*arguments_of(folder, tmp_path / "out")))


def test_without_perturbation(finished, folder, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    assert command.run(options_of(*arguments_of(folder, out, "--resume", "--no-perturb"))) == 0
    record = json.loads((out / command.RESULTS).read_text())
    assert record["perturbation"] == {}
    assert record["couplings"] == json.loads((finished / command.RESULTS).read_text())["couplings"]


def test_the_control_reads_the_same_text_with_other_weights(finished, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(couplings_control, "RESULT", tmp_path / "results" / "untrained.json")
    # The tiny model's own weights are those of seed 0.
    arguments = ["--model", str(folder), "--permutations", "20", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["control", str(finished), *arguments])
    assert couplings_control.main() == 0
    trained, untrained = (json.loads(f.read_text()) for f in (finished / command.RESULTS, couplings_control.RESULT))
    assert trained["response_tokens"] == untrained["response_tokens"]
    for name in ("observed", "random"):
        assert [one[name] for one in trained["couplings"]] != [one[name] for one in untrained["couplings"]]


@pytest.mark.parametrize(("model", "message"), [
    ({"kind": "Bloom"}, "--model model: "),
    ({"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}, "one head is neither"),
])  # fmt: skip
def test_models_without_what_it_takes_say_so_before_generating(tmp_path, model, message):
    path = save_tiny_model(tmp_path / "model", **model)
    with pytest.raises(InputError, match=message):
        command.run(options_of(*arguments_of(path, tmp_path / "out", data=data_file(tmp_path))))
    assert not (tmp_path / "out").exists()


def test_logits_that_are_not_the_output_embedding_are_refused(tiny, folder, tmp_path, monkeypatch):
    original = type(tiny.model).forward

    def scaled(*args, **kwargs):
        output = original(*args, **kwargs)
        output.logits = output.logits * 3 + 1
        return output

    monkeypatch.setattr(type(tiny.model), "forward", scaled)
    with pytest.raises(InputError, match="its logits are not its output embedding"):
        command.run(options_of(*arguments_of(folder, tmp_path / "out")))
