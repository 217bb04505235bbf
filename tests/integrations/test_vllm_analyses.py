"""The requests that a server recorded, read as the analyses of a run; vLLM itself is not needed."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import attnstats
from attnstats import WAAD, MeanDistance
from attnstats.chance import Chance
from attnstats.cli.main import main
from attnstats.errors import InputError
from attnstats.integrations.vllm import records
from attnstats.integrations.vllm.analyses import ServedRequests
from attnstats.integrations.vllm.configuration import RequestSettings
from attnstats.integrations.vllm.store import RequestWriter
from attnstats.results import ByStatistic
from attnstats.study import models
from attnstats.study.analysis import Settings
from attnstats.study.couplings import examine, measure
from attnstats.study.pipeline import measure as analysis_of
from attnstats.study.reading import drawn
from attnstats.study.store import begin
from tests.tiny import save_tiny_model

PRESET = {"preset": "paper_v2", "layers": "all"}
LENGTHS = ((9, 30), (3, 41), (14, 25), (6, 33), (11, 52))  # of prompts and of answers, but for the last token


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def loaded(model):
    return models.load(model, dtype="float32")


def conversations(loaded):
    generator = torch.Generator("cpu").manual_seed(0)
    for prompt, answer in LENGTHS:
        ids = torch.randint(5, len(loaded.tokenizer), (prompt + answer,), generator=generator).tolist()
        yield ids[:prompt], ids[prompt:]


def record(loaded, model, prompt, answer, **settings):
    """As a worker makes it of a request whose last token came after these."""
    of_request = RequestSettings.of(PRESET | settings)
    ids = torch.tensor([prompt + answer])
    hidden = []
    with torch.no_grad(), attnstats.capture(
        loaded.model, statistics=of_request.statistics, layers="all", reduce=of_request.reduce, live=True
    ) as run:  # fmt: skip
        handle = loaded.model.base_model.register_forward_hook(lambda module, args, output: hidden.append(output[0][0]))
        logits = loaded.model(ids).logits
        handle.remove()
    entropy = drawn(loaded, ids[0], hidden[0], logits[0, -1], 1.0).entropy
    return records.encode(
        of_request,
        run.layers,
        run.heads,
        run._recording,
        prompt + answer,
        prompt=len(prompt),
        token_entropy=entropy if of_request.token_entropy else None,
        model=records.Model(model, model, "float32", "vLLM 0.32.0"),
    )


@pytest.fixture(scope="module")
def folder(loaded, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "requests"
    writer = RequestWriter(folder, 10)
    writer.write("0_old-1a2b3c4d", record(loaded, "another", [5, 6, 7], [8] * 9))
    for i, (prompt, answer) in enumerate(conversations(loaded)):
        writer.write(f"{i}-1a2b3c4d", record(loaded, model, prompt, answer))
        writer.write(f"reduced{i}-1a2b3c4d", record(loaded, model, prompt, answer, reduce=["heads"]))
    writer.write("short-1a2b3c4d", record(loaded, model, [5, 6, 7], [8]))
    writer.close()
    return folder


@pytest.mark.parametrize("number", range(len(LENGTHS)))
def test_a_request_is_analysed_as_a_response_is(loaded, folder, number):
    ours = attnstats.load(folder)[number]
    prompt, answer = list(conversations(loaded))[number]
    expected = analysis_of(loaded, "", prompt, answer, Settings(layers="all"))
    for name in ("token_ids", "response", "fai_valid", "received_valid"):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    for name in ("waad", "fai", "entropy"):
        of_both = (getattr(analysis, name)[analysis.response] for analysis in (ours, expected))
        torch.testing.assert_close(*of_both, msg=name, atol=1e-5, rtol=1e-5)
    for name in ("delta", "distance", "received_kurtosis"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(expected, name), msg=name, atol=1e-4, rtol=1e-4, equal_nan=True
        )
    assert torch.equal(ours.classes.local, expected.classes.local)
    assert (ours.tokens, ours.layers, ours.maps) == (expected.tokens, expected.layers, None)


def test_a_served_run_has_tables_a_profile_and_couplings(folder):
    run = attnstats.load(folder)
    assert repr(run).startswith(f"Run {folder}: 5 requests, ")
    assert len(run.tokens) == sum(prompt + answer for prompt, answer in LENGTHS)
    assert run.tokens.query("is_response").groupby("prompt").size().tolist() == [answer for _, answer in LENGTHS]
    assert run.prompts["response_tokens"].tolist() == [answer for _, answer in LENGTHS]
    assert set(run.heads["class"]) == {"local", "global", "middle"}
    assert run.profile.sequences == 5
    assert len(run.couplings()) == 3
    with pytest.raises(InputError, match="there are none of what a server recorded"):
        run.plot("maps")


def test_what_is_not_read_is_counted(folder):
    assert ServedRequests(folder).left_out == [
        "maps, of which a server records none",
        "1 request with fewer than two tokens in the answer that went through the model",
        "5 requests of which not every head was recorded",
        "1 request of another model, or with other settings",
    ]


def test_couplings_are_those_of_the_study(loaded, folder, tmp_path):
    store = begin(tmp_path / "corpus", {}, resume=False)
    for i, (prompt, answer) in enumerate(conversations(loaded)):
        store.write(i, *measure(loaded, prompt, answer, 1.0))
    chance = Chance(50, resamples=50)
    requests = ServedRequests(folder)
    ours = examine(requests, None, chance, requests.names)
    theirs = examine(store, None, chance)
    expected = {(row.setting, row.value): row for row in theirs.rows}
    assert {row.setting for row in ours.rows} == {
        "default",
        "peak rule",
        "chance",
        "head share",
        "lo, hi",
        "receiver heads",
    }
    for row in ours.rows:
        for coupling, other in zip(row.couplings, expected[row.setting, row.value].couplings, strict=True):
            assert coupling.observed == pytest.approx(other.observed, rel=1e-5), row
            assert coupling.count == other.count


def test_the_commands_read_a_server_s_folder(folder, tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "couplings"
    for arguments in (
        ("report", folder, "--out", page),
        ("couplings", "--requests", folder, "--permutations", 20, "--out", out),
        ("plot", folder, "--out", tmp_path / "one.png"),
    ):
        command = [sys.executable, "-m", "attnstats", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    assert "Not read: maps, of which a server records none; 1 request with fewer" in page.read_text()
    found = json.loads((out / "couplings.json").read_text())
    assert (found["responses"], found["model"]["engine"], len(found["couplings"])) == (5, "vLLM 0.32.0", 3)


def test_files_that_can_not_be_read_and_models_of_the_same_name_are_left_out(loaded, model, tmp_path):
    """As of checkpoints of two runs, which are in folders of the same name."""
    (prompt, answer), *_ = conversations(loaded)
    writer = RequestWriter(tmp_path / "requests", 1)
    newest = records.decode(record(loaded, model, prompt, answer))
    of_other = newest.model._replace(tokenizer=f"/another/{newest.model.name}")
    writer.write("0-1a2b3c4d", records.encoded(replace(newest, model=of_other)))
    (tmp_path / "requests" / "1-1a2b3c4d.safetensors").write_bytes(records.encoded(newest)[:-1])
    upgraded = newest.model._replace(engine="vLLM 0.33.0")
    for i, of_engine in ((2, newest.model), (3, upgraded)):
        writer.write(f"{i}-1a2b3c4d", records.encoded(replace(newest, model=of_engine)))
    requests = ServedRequests(tmp_path / "requests")
    assert len(requests) == 2
    assert sorted(requests.left_out[1:]) == [
        "1 request in files that are damaged, or of another version of attnstats",
        "1 request of another model, or with other settings",
    ]
    (tmp_path / "requests" / "2-1a2b3c4d.safetensors").unlink()
    for read in (lambda: requests[0], lambda: list(requests.items(requests.names))):
        with pytest.raises(InputError, match="request '2-1a2b3c4d' was deleted meanwhile"):
            read()


def test_prompt_tokens_that_were_cached_have_no_numbers_of_rows(loaded, model, tmp_path):
    prompt, answer = next(iter(conversations(loaded)))
    whole = records.decode(record(loaded, model, prompt, answer))
    valid = {s: mask.clone() for s, mask in whole.valid.items()}
    tensors = {s: whole[s].clone() for s in whole.statistics}
    for s in (WAAD(10), MeanDistance()):
        valid[s][:, :4], tensors[s][..., :4] = False, 0
    cached = replace(whole, cached=4, valid=ByStatistic(valid), _tensors=tensors)
    writer = RequestWriter(tmp_path / "requests", 1)
    for i, each in enumerate((whole, cached)):
        writer.write(f"{i}-1a2b3c4d", records.encoded(each))
    run = attnstats.load(tmp_path / "requests")
    ours, expected = run[1], run[0]
    assert ours.waad.isnan().tolist() == [True] * 4 + [False] * (len(prompt) - 4 + len(answer))
    assert ours.head_mean_distance[..., :4].isnan().all()
    for name in ("waad", "delta", "distance"):
        of_both = (getattr(analysis, name) for analysis in (ours, expected))
        of_answers = (x[-len(answer) :] if name == "waad" else x for x in of_both)
        assert torch.equal(*of_answers), name
    assert run.tokens.query("prompt == 1")["waad"].isna().sum() == 4
    assert "<html" in run.page()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "folder nowhere: there is none"),
        ([".", "--limit", "3"], "--limit: is for --data, and --requests has responses"),
        ([".", "--resume"], "--resume: is for --data"),
    ],
)
def test_couplings_of_requests_refuse_what_they_do_not_use(arguments, message, capsys):
    assert main(["couplings", "--requests", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_the_preset_says_how_to_record(loaded, tmp_path):
    writer = RequestWriter(tmp_path / "requests", 1)
    writer.write("0-1a2b3c4d", record(loaded, "", [5, 6, 7], [8] * 9, statistics=["waad", "fai"]))
    with pytest.raises(InputError, match=r'1 request without the statistics of a preset; .* preset="paper_v2"'):
        attnstats.load(tmp_path / "requests")


def test_an_empty_folder_has_nothing_to_read(tmp_path):
    RequestWriter(tmp_path / "requests", 1)
    with pytest.raises(InputError, match=r"has no summary.json and run.json"):
        attnstats.load(tmp_path / "requests")
    with pytest.raises(InputError, match="no request that can be read: it is empty"):
        ServedRequests(tmp_path / "requests")


def test_without_token_entropies_there_is_a_page_and_no_coupling_with_them(loaded, model, tmp_path):
    """As of tensor-parallel ranks, each of which has a folder."""
    folder = tmp_path / "requests"
    writer = RequestWriter(folder / "rank-0-of-1", 1)
    for i, (prompt, answer) in enumerate(conversations(loaded)):
        writer.write(f"{i}-1a2b3c4d", record(loaded, model, prompt, answer, token_entropy=False))
    run = attnstats.load(folder)
    assert run[0].entropy.isnan().all()
    assert "How uncertain the model was" in run.page()
    assert run.couplings()["observed"].isna().tolist() == [True, False, False]
    tables = examine(run.analyses, None, Chance(5, resamples=5), run.analyses.names)
    assert [coupling.observed > 0 for coupling in tables.rows[0].couplings] == [False, True, True]
