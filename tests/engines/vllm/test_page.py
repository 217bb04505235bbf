"""The code of docs/vllm.md, on a tiny model."""

import re

import pytest

from tests.engines.vllm import tiny
from tests.process import ROOT

pytestmark = pytest.mark.timeout(900)


def block(name, language="python"):
    page = (ROOT / "docs" / "vllm.md").read_text()
    (code,) = re.findall(rf"<!-- code: {name} -->\n```{language}\n(.*?)```", page, re.DOTALL)
    return code


def test_statistics_of_an_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # without Inductor, which takes a minute
    model = tiny.save(tmp_path)
    tiny.save_tokenizer(tmp_path)
    scope = {"MODEL": str(model)}
    exec(block("vllm_engine"), scope)
    scope["llm"].llm_engine.engine_core.shutdown()
    shown = capsys.readouterr().out
    assert re.search(r"Request of \d+ tokens: layers 2, 3, 4, means over layers and heads\n  WAAD\(window=10\)", shown)
