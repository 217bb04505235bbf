"""The command line: the main job end to end on the real model, exit codes, and one line for every bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnstats._threads import processors
from attnstats.cli.analyze import settings_from
from attnstats.cli.arguments import parse_layers
from attnstats.cli.main import main, parser
from attnstats.presets import PRESETS
from attnstats.study.analysis import Settings
from attnstats.study.outputs import FILES
from attnstats.study.store import Store
from tests.hostile import FORBIDDEN, TEXTS
from tests.process import python
from tests.tiny import interrupted_in_pass, save_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def prompts_of(out):
    return list(map(json.loads, (out / "prompts.jsonl").read_text().splitlines()))


def command(*arguments):
    return [sys.executable, "-m", "attnstats", *(a if isinstance(a, bytes) else str(a) for a in arguments)]


@pytest.mark.slow
def test_main_job_on_the_real_model(tmp_path):
    """Default model and preset in a subprocess, verified against eager attention."""
    out = tmp_path / "out"
    question = "Ann has 3 boxes with 4 pens each. How many pens does she have?"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ("--prompt", question, "--max-tokens", 40, "--out", out, "--verify", "--device", "cpu")
    done = subprocess.run(
        command("analyze", *arguments), capture_output=True, text=True, timeout=500, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == set(FILES)
    summary = json.loads((out / "summary.json").read_text())
    assert all(error["ours"] <= 1e-4 for error in summary["largest_errors_against_float64"].values())
    assert summary["settings"] | {"window": 10, "fai_lo": 10, "fai_hi": 100, "head_share": 0.3} == summary["settings"]
    assert {"load", "generate", "statistics", "verify", "tables"} == set(summary["timings_seconds"])
    assert summary["prompts"] == 1
    assert summary["layers"] == [10, 12, 15, 18, 20]
    (prompt,) = prompts_of(out)
    tokens = pandas.read_csv(out / "tokens.csv")
    response = tokens[tokens.is_response]
    assert len(response) == prompt["response_tokens"] <= 40
    assert "pens" in prompt["response"]
    assert response.waad.between(0, 10).all()
    assert (~tokens.fai_valid).sum() == 10 + (~tokens.is_response & ~tokens.fai_valid).sum()
    heads = pandas.read_csv(out / "heads.csv")
    assert heads["class"].value_counts().to_dict() == {"local": 13, "global": 13, "middle": 19}
    with safe_open(out / "items" / "000000.safetensors", framework="pt") as file:
        assert file.get_tensor("head_waad").shape == (5, 9, len(tokens))
    for shown in ("preplan", "anchor", "report.html", "agrees with eager attention"):
        assert shown in done.stdout
    assert question in (out / "report.html").read_text()


def test_options_reach_the_pipeline(tmp_path, tiny, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"question": "how many"}\n{"question": "are left"}\n')
    options = f"--model {tiny} --prompts {tmp_path}/prompts.jsonl --preset paper_v1 --window 3 --horizon 2 open"
    options += (
        f" --layers 0,3-5 --head-share 0.25 --max-tokens 20 --device cpu --dtype bfloat16 --seed 5 --out {tmp_path}/out"
    )
    code = main(["analyze", *options.split(), "--temperature", "0.9", "--system", ""])
    assert code == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["model"] == {"name": tiny.name, "dtype": "bfloat16", "device": "cpu"}
    expected = {
        "preset": "paper_v1",
        "window": 3,
        "fai_lo": 2,
        "fai_hi": None,
        "layers": [0, 3, 4, 5],
        "head_share": 0.25,
    }
    expected |= {"max_tokens": 20, "temperature": 0.9, "seed": 5, "system": ""}
    assert summary["settings"] == expected
    assert (summary["prompts"], summary["layers"]) == (2, [0, 3, 4, 5])
    assert [prompt["question"] for prompt in prompts_of(tmp_path / "out")] == ["how many", "are left"]


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    preset, settings = PRESETS[name], settings_from(parser().parse_args(["analyze", "--preset", name]))
    for field in ("window", "fai_lo", "fai_hi", "layers", "head_share"):
        assert getattr(settings, field) == getattr(preset, field)


def test_the_settings_of_python_and_of_the_command_line_have_the_same_defaults():
    assert settings_from(parser().parse_args(["analyze"])) == Settings()


@pytest.mark.parametrize(("text", "layers"), [
    ("all", "all"), ("middle-third", "middle-third"), ("3", (3,)), ("9, 11,14-16", (9, 11, 14, 15, 16)),
])  # fmt: skip
def test_layers(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize(("arguments", "named"), [
    ([], "COMMAND"),
    (["analyse"], "analyse"),
    (["analyze", "--prompt"], "--prompt"),
    (["analyze", "--no-such"], "--no-such"),
    (["analyze", "--window", "ten"], "--window"),
    (["analyze", "--window", "0"], "--window"),
    (["analyze", "--horizon", "10"], "--horizon"),
    (["analyze", "--horizon", "10", "x"], "--horizon"),
    (["analyze", "--layers", "x"], "--layers"),
    (["analyze", "--layers", "99", "--max-tokens", "8"], "--layers"),
    (["analyze", "--dtype", "int4"], "--dtype"),
    (["analyze", "--verify", "--dtype", "bfloat16"], "--dtype"),
    (["analyze", "--device", "abacus"], "--device"),
    (["analyze", "--device", "meta"], "--device"),
    (["analyze", "--preset", "v3"], "--preset"),
    (["analyze", "--prompt", ""], "--prompt"),
    (["analyze", "--prompts", "absent.jsonl"], "--prompts"),
    (["analyze", "--prompt", "x", "--prompts", "y.txt"], "--prompts"),
    (["analyze", "--model", "./absent"], "--model"),
    (["analyze", "--out", "{file}"], "--out"),
    (["analyze", "--out", "{file}/below"], "--out"),
    (["analyze", "--out", "{foreign}"], "--out"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, tiny, capsys, arguments, named):
    (tmp_path / "file").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("mine")
    places = {"file": tmp_path / "file", "foreign": tmp_path / "foreign"}
    arguments = [argument.format(**places) for argument in arguments]
    if arguments[:1] == ["analyze"]:
        arguments += [] if "--model" in arguments else ["--model", str(tiny)]
        arguments += [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("attnstats: error: ")
    assert named in captured.err
    assert not (tmp_path / "out").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "foreign"}
    assert (tmp_path / "foreign" / "thesis.tex").read_text() == "mine"


def test_a_fault_of_ours_keeps_its_traceback(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("jinja2.Environment.get_template", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["analyze", "--model", str(tiny), "--max-tokens", "4", "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["out.part"]  # what took long to compute


def test_a_difference_is_exit_code_1(tmp_path, tiny, finished, capsys):
    """A number of one prompt is changed and another prompt is lost, so that the run is resumed and then verified."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    store = Store(out)
    tensors, texts = store.read(0)
    store.write(0, tensors | {"waad": tensors["waad"] + 0.01}, texts)
    store.path(1).unlink()
    arguments = ["analyze", "--model", str(tiny), "--max-tokens", "12", "--out", str(out), "--resume", "--verify"]
    assert main(arguments) == 1
    assert "DIFFERS from eager attention" in capsys.readouterr().out


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["analyze"]) == 2
    assert "jinja2 is not installed; run: pip install 'attnstats[cli]'" in capsys.readouterr().err


def test_interrupt_is_exit_code_130_and_says_what_is_kept(tmp_path, tiny):
    """A real SIGINT while responses are generated: within the first batch nothing is kept, and nothing left."""
    process = subprocess.Popen(
        command("analyze", "--model", tiny, "--prompts", "/dev/stdin", "--max-tokens", 200, "--out", tmp_path / "out"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A background job of a script is born deaf to Ctrl-C, and so would be its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdin.write("how many rolls\n" * 5000)
    process.stdin.close()
    while "prompts, up to" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    said = process.stderr.read()
    process.stdout.close()
    process.stderr.close()
    if (tmp_path / "out.part").exists():
        assert re.fullmatch(
            r"attnstats: interrupted; \d+ answers?, \d+ of them with .*, of 5000 prompts, kept in .*; go on .*\n", said
        )
    else:
        assert said == "attnstats: interrupted; nothing was written\n"
    assert not (tmp_path / "out").exists()


def test_the_terminal_says_how_many_of_the_responses_it_shows(tmp_path, tiny, capsys):
    (tmp_path / "prompts.txt").write_text("so\n" * 7)
    options = [
        "--model",
        str(tiny),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--max-tokens",
        "12",
        "--layers",
        "all",
    ]
    assert main(["analyze", *options, "--out", str(tmp_path / "out")]) == 0
    assert main(["report", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("5 of 7 responses shown") == 2
    assert "Prompt 5 of 7" in said
    assert "8 of 12 tokens shown" in said


@pytest.mark.parametrize(("given", "spins", "threads"), [
    ({}, "0", None), ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "1"}, "30000000000", "1"),
])  # fmt: skip
def test_openmp_is_set_for_the_command_line_before_torch_is_there(given, spins, threads):
    """As OpenMP itself says when torch loads it; in the program of someone else it keeps its defaults."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment = {**unset, **given, "OMP_DISPLAY_ENV": "VERBOSE"}

    def said(name, *arguments):
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=True)
        return re.search(rf"{name} = '(.*)'", done.stderr)[1]

    assert said("GOMP_SPINCOUNT", *command("--version")) == spins
    assert said("OMP_NUM_THREADS", *command("--version")) == (threads or str(processors({})))
    if not given:
        assert said("GOMP_SPINCOUNT", sys.executable, "-c", "import attnstats") != spins


@pytest.mark.parametrize(("files", "together", "share"), [
    ({"cpu.max": "max 100000"}, "", 1.0),
    ({"cpu.max": "100000 100000"}, "", 0.0),
    ({"cpu.max": "10000 100000"}, "", 0.0),
    ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, "", 0.0), ({}, "1000", 0.0), ({}, "1", 1.0),
])  # fmt: skip
def test_threads_are_as_many_as_the_processors_of_this_process(tmp_path, files, together, share):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    every = len(os.sched_getaffinity(0))
    assert processors({"LOCAL_WORLD_SIZE": together}, tmp_path) == max(1, int(share * every))


def test_conversations_are_answered(tmp_path, tiny):
    """The last answer is generated, and the store has what the model read."""
    messages = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "so"}]
    second = [*messages, {"role": "user", "content": "rolls"}, {"role": "assistant", "content": "left"}]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": messages}, {"messages": second}]))
    out = tmp_path / "out"
    options = ["--prompts", str(tmp_path / "a.json"), "--max-tokens", "12", "--system", "are", "--out", str(out)]
    assert main(["analyze", "--model", str(tiny), *options]) == 0
    prompts = prompts_of(out)
    assert [prompt["question"] for prompt in prompts] == ["how many", "rolls"]
    tokens = pandas.read_parquet(out / "tokens.parquet")
    sent = tokens[(tokens.prompt == 1) & ~tokens.is_response].token
    assert sent.tolist() == ["system", "are", "user", "how", "many", "<unk>", "so", "user", "rolls", "so"]


@pytest.mark.parametrize(("options", "message"), [
    (["--max-tokens", "250"], "--max-tokens 250: with a prompt of 7 tokens (prompt 1) that is more than the 256"),
    (["--max-tokens", "5", "--dtype", "int4"], "--dtype int4: unknown"),
    (["--max-tokens", "5", "--device", "mps"], "--device mps: attention statistics were never run on Apple's GPU"),
    (["--window", "0"], "--window: "),
])  # fmt: skip
def test_what_cannot_be_is_named_before_the_weights_are_read(tmp_path, tiny, capsys, options, message):
    folder = shutil.copytree(tiny, tmp_path / "without_weights")
    (folder / "model.safetensors").unlink()
    arguments = ["--prompt", "how many rolls are left", "--system", "", *options, "--out", str(tmp_path / "out")]
    assert main(["analyze", "--model", str(folder), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_head_sizes_that_no_kernel_takes_are_named_before_the_weights_are_read(tmp_path, capsys, monkeypatch):
    """On a GPU; that there is one is pretended, and loading the weights ends the run."""
    folder = save_tiny_model(tmp_path / "wide", head_dim=320)
    monkeypatch.setattr("attnstats.study.models.resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr("attnstats.study.models.load", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["analyze", "--model", str(folder), "--max-tokens", "5", "--out", str(tmp_path / "out")])
    assert "Head size 320: over 256 statistics are computed without kernels" in capsys.readouterr().out


def run_with_output(finished, stdout, *arguments, **environment):
    """`attnstats report` or another command on a finished run, with this stdout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    arguments = command(*(arguments or ("report", finished)))
    return subprocess.run(arguments, stdout=stdout, stderr=subprocess.PIPE, env=environment, check=False, timeout=300)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_does_not_have_is_replaced(finished, encoding):
    done = run_with_output(finished, subprocess.PIPE, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"WAAD ????" in done.stdout
    assert str(finished).encode() in done.stdout.replace(b"\n", b"")


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [(("report", "{finished}"), ""), (["--help"], ""), (["--help"], "1")]
)
def test_output_that_cannot_be_written_is_one_line_and_exit_code_2(finished, arguments, unbuffered):
    arguments = [argument.format(finished=finished) for argument in arguments]
    with open("/dev/full", "w") as full:  # noqa: PTH123 as a shell opens it
        done = run_with_output(finished, full, *arguments, PYTHONUNBUFFERED=unbuffered)
    remedy = b"name a file or a pipe that can be written"
    assert done.stderr == b"attnstats: error: standard output: No space left on device; " + remedy + b"\n"
    assert done.returncode == 2


def test_an_error_that_cannot_be_said_has_its_exit_code_all_the_same(tmp_path):
    with open("/dev/full", "w") as full:  # noqa: PTH123 as a shell opens it
        assert subprocess.run(command("report", tmp_path), stderr=full, check=False).returncode == 2


def test_a_reader_that_goes_away_is_no_difference(finished):
    """As `attnstats report out | true`: 141, where rich would exit with 1, which means a difference."""
    read, write = os.pipe()
    os.close(read)
    done = run_with_output(finished, write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


UNCOERCED = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_a_prompt_is_utf_8_also_in_the_locale_c(tmp_path, tiny):
    out = tmp_path / "out"
    options = ["--max-tokens", "12", "--prompt", "how many Brötchen 🥐", "--system", "ä", "--out", out]
    done = run_with_output(None, subprocess.PIPE, "analyze", "--model", tiny, *options, **UNCOERCED)
    assert (done.returncode, done.stderr) == (0, b"")
    (prompt,) = prompts_of(out)
    assert prompt["question"] == "how many Brötchen 🥐"
    assert "Brötchen 🥐" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--prompt", b"\xfcber", b"argument --prompt: not UTF-8 text; type or convert it as UTF-8"),
    ("--out", "über".encode(), b"argument --out: a name with other characters than the locale has; set one of UTF-8"),
])  # fmt: skip
def test_bytes_that_are_no_text_are_one_line(tmp_path, option, value, message):
    done = run_with_output(None, subprocess.PIPE, "analyze", option, value, **UNCOERCED)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_help_and_version(capsys):
    for arguments in (["--version"], ["--help"], ["analyze", "--help"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert "attnstats 0.1.0" in shown
    assert "None)" not in shown
    assert "False)" not in shown
    assert "greatest length of a response (default: 256)" in " ".join(shown.split())
    assert "--verify" in shown


def test_help_does_not_import_what_is_heavy():
    heavy = "{'transformers', 'pandas', 'matplotlib', 'rich', 'scipy'}"
    code = f"import sys; from attnstats.cli.main import parser; parser(); print(*{heavy} & set(sys.modules))"
    assert python("-c", code).strip() == ""


def test_heads_of_a_corpus_are_taken_for_another(tmp_path, tiny, capsys):
    options = ["analyze", "--model", str(tiny), "--layers", "all", "--max-tokens", "12", "--prompt"]
    assert main([*options, "how many rolls", "--out", str(tmp_path / "a")]) == 0
    profile = ["--head-profile", str(tmp_path / "a" / "heads.json")]
    assert main([*options, "so", "--out", str(tmp_path / "b"), *profile]) == 0
    one, two = (pandas.read_csv(tmp_path / name / "heads.csv") for name in "ab")
    assert one["class"].tolist() == two["class"].tolist()
    assert one.mean_distance.tolist() != two.mean_distance.tolist()
    other = save_tiny_model(tmp_path / "other", hidden_size=16)
    code = main(["analyze", "--model", str(other), "--max-tokens", "4", "--out", str(tmp_path / "c"), *profile])
    assert code == 2
    assert "heads.json: the profile is of another model: " in capsys.readouterr().err
    assert main([*options, "so", "--out", str(tmp_path / "c"), "--head-profile", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "c").exists()


def test_hostile_questions_are_answered_and_shown_as_text(tmp_path, tiny, capsys):
    questions = [text for text in TEXTS[::5] if text.strip() and text.isprintable() and len(text) < 200]
    questions += ["\x1b[2J=1", "\0", "a\u202eb", "NA", "007"]
    lines = "".join(json.dumps({"question": question}) + "\n" for question in questions)
    (tmp_path / "prompts.jsonl").write_text(lines)
    out = tmp_path / "out"
    options = ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-tokens", "3", "--system", "\x1b]0;x\x07</script>"]
    assert main(["analyze", "--model", str(tiny), "--out", str(out), *options]) == 0
    assert [prompt["question"] for prompt in prompts_of(out)] == questions
    assert not FORBIDDEN & set(capsys.readouterr().out)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert not FORBIDDEN & set(page)
    assert page.count("<script") == page.count("</script>")
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text(encoding="utf-8") == page


NUMBERS = ("observed", "random", "p_value", "low", "high", "count", "responses")


@pytest.mark.parametrize("change", [
    {"couplings": [{"name": 1}]}, {"couplings": [{"name": "x"}]}, {"couplings": {"a": 1}}, {"couplings": ["x"]},
    {"prompts": 0}, {"prompts": "x"}, {"prompts": None}, {"prompts": [{}]},
    {"couplings": [{"name": "x", **dict.fromkeys(NUMBERS, "<b>")}]},
])  # fmt: skip
def test_a_summary_that_is_none_is_refused(tmp_path, finished, capsys, change):
    out = shutil.copytree(finished, tmp_path / "out")
    change_json(out / "summary.json", **change)
    assert main(["report", str(out)]) == 2
    assert "summary.json: cannot be read (no settings, prompts and timings in it" in capsys.readouterr().err


def as_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


def test_a_report_is_drawn_again(tmp_path, tiny, capsys):
    out = tmp_path / "out"
    assert main(["analyze", "--model", str(tiny), "--max-tokens", "12", "--out", str(out)]) == 0
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == before
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == before


@pytest.mark.parametrize(("damage", "message"), [
    (lambda out: (out / "summary.json").unlink(), "has no summary.json"),
    (lambda out: (out / "summary.json").write_text("{"), "summary.json: cannot be read"),
    (lambda out: (out / "summary.json").write_text("{}"), "no settings, prompts and timings in it"),
    (lambda out: (out / "items" / "000001.safetensors").unlink(), "000001.safetensors: cannot be read"),
    (lambda out: (out / "items" / "000001.safetensors").write_bytes(b"\0" * 9), "000001.safetensors: cannot be read"),
    (shutil.rmtree, "no such folder"),
    (as_file, "out: is a file; name one that"),
])  # fmt: skip
def test_a_damaged_folder_is_refused_with_a_remedy(tmp_path, finished, capsys, damage, message):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    damage(out)
    assert main(["report", str(out)]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(["analyze", "--model", str(tiny), "--max-tokens", "12", "--out", str(out)]) == 0
    return out


def test_an_interrupted_run_says_what_is_kept_and_goes_on(tmp_path, tiny, finished, capsys):
    out = tmp_path / "out"
    arguments = ["analyze", "--model", str(tiny), "--max-tokens", "12", "--out", str(out)]
    # Two passes per prompt: one for the statistics, one for the maps.
    with interrupted_in_pass(3):
        assert main(arguments) == 130
    kept = "3 answers, 1 of them with statistics"
    said = f"{kept}, of 3 prompts, kept in {out}.part; go on with --resume"
    assert capsys.readouterr().err == f"attnstats: interrupted; {said}\n"
    assert main(arguments) == 2
    assert f"holds an unfinished run with {kept}; go on with it by --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--seed", "1"]) == 2
    assert "was begun with seed 0, this run has 1" in capsys.readouterr().err
    for others in (["--prompt", "so"], ["--head-profile", str(finished / "heads.json")]):
        assert main([*arguments, "--resume", *others]) == 2
        assert "was begun with" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    assert f"Going on with {kept}, of 3 prompts, kept in {out}.part" in capsys.readouterr().out.replace("\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before = (out / "summary.json").read_bytes()
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 0
    assert f"{out} is finished" in capsys.readouterr().out.replace("\n", "")
    assert (out / "summary.json").read_bytes() == before


def end_tokens(model):
    change_json(model / "generation_config.json", eos_token_id=[1, 9])


def setting(model):
    change_json(model / "generation_config.json", max_length=77)


def template(model):
    (model / "chat_template.jinja").write_text((model / "chat_template.jinja").read_text() + "{# same text #}")


def vocabulary(model):
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["w1"], words["w2"] = words["w2"], words["w1"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


def heads_zeroed(model):
    weights = load_file(model / "model.safetensors")
    weights["model.layers.3.self_attn.o_proj.weight"][:, 8:16] = 0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def change_json(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(("change", "named"), [
    (end_tokens, "end_tokens [1], this run has [1, 9]"), (setting, "max_length null, this run has 77"),
    (template, "chat_template"), (vocabulary, "tokenizer"), (heads_zeroed, "weights"),
])  # fmt: skip
def test_whatever_decides_a_response_is_known_again(tmp_path, tiny, capsys, change, named):
    model = shutil.copytree(tiny, tmp_path / "model")
    arguments = ["analyze", "--model", str(model), "--max-tokens", "8", "--out", str(tmp_path / "out")]
    with interrupted_in_pass(3):
        assert main(arguments) == 130
    change(model)
    assert main([*arguments, "--resume"]) == 2
    assert f"was begun with {named}" in capsys.readouterr().err


def test_statistics_stay_with_their_tokens_when_a_response_is_lost(tmp_path, tiny, finished):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "items" / "000001.json").unlink()
    (out / "items" / "000001.safetensors").unlink()
    before = {path.name: path.read_bytes() for path in (out / "items").iterdir()}
    assert main(["analyze", "--model", str(tiny), "--max-tokens", "12", "--out", str(out), "--resume"]) == 0
    after = {path.name: path.read_bytes() for path in (out / "items").iterdir()}
    assert after | before == after
    assert after.keys() - before.keys() == {"000001.json", "000001.safetensors"}


@pytest.mark.parametrize(("name", "change"), [
    ("waad", lambda t: t[:-1]), ("waad", lambda t: t * torch.nan), ("fai", lambda t: t / 0),
    ("response", lambda t: t.long()), ("fai_valid", lambda t: t.float()), ("entropy", lambda t: t[1:]),
    ("distance", lambda t: t[0]), ("layers", lambda t: t.repeat(2)), ("delta", lambda t: t[1:]),
    ("response", lambda t: t & False), ("local", lambda t: t & False),
])  # fmt: skip
def test_an_item_that_is_no_analysis_is_named(tmp_path, finished, capsys, name, change):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    store = Store(out)
    tensors, texts = store.read(1)
    store.write(1, tensors | {name: change(tensors[name])}, texts)
    assert main(["report", str(out)]) == 2
    assert "000001.safetensors: cannot be read (not an analysis: " in capsys.readouterr().err


def test_a_file_cannot_write_to_the_terminal(tmp_path, capsys):
    pandas.DataFrame({"\x1b]0;x\x07\x1b[2Jq": ["a"]}).to_parquet(tmp_path / "a.parquet")
    assert main(["analyze", "--prompts", str(tmp_path / "a.parquet")]) == 2
    assert "\x1b" not in capsys.readouterr().err
