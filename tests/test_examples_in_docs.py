"""Code of the documentation that is no doctest: Python on the files of a run, and command lines.

Every block of Python is a doctest, or what runs it is named above it: `<!-- on a run -->` is run here, and
`<!-- code: NAME -->` and `<!-- recipe: NAME -->` by a test that has the names of page and block. `<!-- not run -->`
stands above parts of classes of other projects.
"""

import ast
import contextlib
import re
import shlex
import textwrap
from types import SimpleNamespace

import matplotlib as mpl
import pytest
import torch

import attnstats
from attnstats.cli.main import main, parser
from tests.process import ROOT
from tests.tiny import save_tiny_model

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^([^\n]*)\n( *)```(\w*)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n+)+")
SHELL = ("sh", "bash")
ON_A_RUN = "<!-- on a run -->"
INLINE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
SCRIPTS = ("benchmarks", "examples", "release", "reliability", "tests")
ELSEWHERE = {"--multi_gpu", "--api-key", "--api-server-count", "--middleware"}  # accelerate's, vLLM's
SCRIPT = re.compile(r"python3? (?:-m (\S+)|(\S+\.py))(.*)")
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def fenced(page):
    """(line above, language, code) of each fenced block."""
    return [(above.strip(), language, code) for above, _, language, code in FENCED.findall(page.read_text())]


def indented(page):
    """The indented blocks outside of fenced ones."""
    return [textwrap.dedent(block) for block in INDENTED.findall(FENCED.sub("", page.read_text()))]


def commands(page):
    """Each line of a block that runs a program, without its variables and comments."""
    blocks = [*indented(page), *(code for _, language, code in fenced(page) if language in SHELL)]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    plain = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", re.sub(r"(^|\s)#.*", "", line)).strip() for line in lines]
    return [line for line in plain if re.match(r"\S*(?:attnstats|python3?|make|torchrun|accelerate|pytest) ", line)]


def is_python(block):
    """True for code with a call, an assignment or an import."""
    with contextlib.suppress(SyntaxError):
        kinds = ast.Assign, ast.Call, ast.Import, ast.ImportFrom
        return any(isinstance(node, kinds) for node in ast.walk(ast.parse(block)))
    return False


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_of_python_is_run(page):
    tests = [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    tests = [test for test in tests if page.name in test]
    unseen = [block for block in indented(page) if is_python(block) and ">>>" not in block]
    for above, language, code in fenced(page):
        name = re.fullmatch(r"<!-- (?:code|recipe): (\w+) -->", above)
        by_name = name is not None and any(above in test or f'"{name[1]}"' in test for test in tests)
        if not (">>>" in code or above in (ON_A_RUN, "<!-- not run -->") or by_name or language in SHELL):
            unseen.append(code)
    assert not unseen


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages name: models, a transcript, finished runs."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("path/or/hub-name", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        save_tiny_model(place / name)
    sentences = "".join(f" how many w{13 + i} are left w{20 + i} rolls so. \n" for i in range(12))
    (place / "trace.txt").write_text(f"how many rolls <think>{sentences}</think> w30 are left")
    model, text = place / "path" / "or" / "hub-name", place / "trace.txt"
    for name in ("trace", "run"):
        options = ["--text", str(text), "--response-from", "<think>", "--out", str(place / "out" / name)]
        assert main(["analyze", "--model", str(model), *options]) == 0
    return place


@pytest.mark.parametrize("page", [page for page in PAGES if ON_A_RUN in page.read_text()], ids=lambda page: page.name)
def test_code_on_a_run(page, place, monkeypatch):
    monkeypatch.chdir(place)
    texts = [(place / "trace.txt").read_text()]
    scope = {"attnstats": attnstats, "heads": attnstats.heads, "texts": texts, "__name__": "page"}
    with mpl.rc_context({"backend": "agg"}):
        for above, _, code in fenced(page):
            if above == ON_A_RUN:
                exec(compile(code, str(page), "exec"), scope)


def test_calls_of_other_kernels(monkeypatch):
    """Each paragraph of the block, where functions that stand in for the libraries return an lse in their layouts."""
    (block,) = (code for above, _, code in fenced(ROOT / "docs" / "kernels.md") if above == "<!-- code: lse -->")
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    output, expected = attnstats.attention(query, key, value, statistics=["waad"], enable_gqa=True, backend="reference")
    lse = expected.lse
    bthd = [x.transpose(1, 2) for x in (query, key, value)]
    packed = [x[0] for x in bthd]
    repeated = [query, *(x.repeat_interleave(2, 1) for x in (key, value))]
    base2 = (output, lse[0].T / torch.tensor(2.0).log())
    cudnn = "_scaled_dot_product_cudnn_attention"
    monkeypatch.setattr(torch.ops.aten, cudnn, lambda *_: (output, lse[..., None], None))
    libraries = {
        "flash_attn_func": (bthd, lambda *_, causal, return_attn_probs: (output, lse, None)),
        "flash_attn_varlen_func": (packed, lambda *_, causal, return_attn_probs: (output, lse[0], None)),
        cudnn: (repeated, None),
        "flashinfer": (packed, SimpleNamespace(single_prefill_with_kv_cache_return_lse=lambda *_, causal: base2)),
        "fused_attn_fwd": (bthd, lambda *_: (output, (lse[..., None], None))),
    }
    for paragraph, (name, ((q, k, v), library)) in zip(block.strip().split("\n\n"), libraries.items(), strict=True):
        cu = torch.tensor([0, 9], dtype=torch.int32)
        scope = {"torch": torch, "attnstats": attnstats, "q": q, "k": k, "v": v, "cu": cu, "longest": 9, name: library}
        exec(paragraph, scope)
        torch.testing.assert_close(scope["stats"]["waad"].flatten(), expected["waad"].flatten())


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_taken(page):
    """Those of attnstats by its parser; of other programs of the project files, targets and options must exist."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in commands(page):
        words = shlex.split(line)
        ours = line.split("-m attnstats ")[-1] if "-m attnstats " in line else line
        if ours != line or words[0] in ("attnstats", ".venv/bin/attnstats"):
            parser().parse_args(shlex.split(ours)[ours == line :])
        elif words[0] == "make":
            assert words[1] in targets, line
        elif script := SCRIPT.search(line):
            if (script[1] or "").partition(".")[0] in ("verl", "vllm"):  # tests/engines runs them
                continue
            path = ROOT / (script[2] or script[1].replace(".", "/"))
            files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
            sources = "".join(file.read_text() for file in files)
            assert not [option for option in OPTION.findall(script[3]) if f'"{option}"' not in sources], line
        else:
            assert words[0] == "pytest", line


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_options_in_the_text_exist(page):
    (choices,) = (action.choices for action in parser()._actions if action.choices)
    options = {name: set(command._option_string_actions) for name, command in choices.items()}
    scripts = (path.read_text() for folder in SCRIPTS for path in (ROOT / folder).rglob("*.py"))
    known = set().union(*options.values(), ELSEWHERE, *(OPTION.findall(source) for source in scripts))
    for code in INLINE.findall(FENCED.sub("", page.read_text())):
        command = re.match(r"attnstats (\w+)", code)
        if command and command[1] in options:
            assert set(OPTION.findall(code)) <= options[command[1]], code
        elif code.startswith("--"):
            assert set(OPTION.findall(code)) <= known, code
