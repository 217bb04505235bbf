"""What a server answers about a request, from a recorder in the place of an engine; vLLM itself is not needed."""

import asyncio
import json
import math
from dataclasses import replace

import pytest
import torch

from attnstats import FAI, LSE, WAAD, TopKeys
from attnstats.integrations.vllm import RequestStore, answers, records
from attnstats.integrations.vllm.configuration import RequestSettings
from attnstats.statistics import Top
from tests.integrations.test_vllm_recorder import SETTINGS, Engine


class Client:
    """The client of an engine with a worker for each recorder."""

    def __init__(self, *engines):
        self.engines = engines

    async def collective_rpc(self, method, args=()):
        return [getattr(engine.recorder, method.removeprefix("attnstats_"))(*args) for engine in self.engines]


def looked_up(client, request_id, completion=0):
    return asyncio.run(answers.look_up(client, request_id, completion))


def numbers(kept):
    return answers.as_json(records.decode(kept.ranks[0]))


def test_a_request_is_read_as_often_as_one_likes():
    engine = Engine()
    client = Client(engine)
    engine.step({"chatcmpl-a-12345678": (0, 6)})
    running = looked_up(client, "chatcmpl-a")
    engine.step({}, finished=["chatcmpl-a-12345678"])
    finished = looked_up(client, "chatcmpl-a")
    assert (running.is_finished, finished.is_finished) == (False, True)
    again = looked_up(client, "chatcmpl-a-12345678")
    assert numbers(finished) == numbers(running) == numbers(again)
    assert asyncio.run(answers.kept_by(client)) == {"finished": ["chatcmpl-a-12345678"], "running": []}
    assert engine.fetch("chatcmpl-a")["waad"].shape == (1, 1, 2, 6)  # which forgets
    with pytest.raises(LookupError, match=r"request 'chatcmpl-a': nothing is kept of it"):
        looked_up(client, "chatcmpl-a")


def test_the_newest_request_with_an_id_is_found():
    engine = Engine()
    engine.step({"a-00000001": (0, 6)})
    engine.step({"a-00000002": (0, 3)}, finished=["a-00000001"])
    assert records.decode(looked_up(Client(engine), "a").ranks[0]).tokens.shape == (1, 3)
    engine.step({}, finished=["a-00000002"])
    assert records.decode(looked_up(Client(engine), "a").ranks[0]).tokens.shape == (1, 3)


def test_completions_and_prompts_have_numbers():
    engine = Engine()
    lengths = {"cmpl-a-0-00000001": 5, "cmpl-a-1-00000002": 6, "0_chatcmpl-b-00000003": 7, "1_chatcmpl-b-00000004": 8}
    for name, length in lengths.items():
        engine.step({name: (0, length)})
    asked = [("cmpl-a", 0), ("cmpl-a-1", 0), ("chatcmpl-b", 0), ("chatcmpl-b", 1)]
    for (request_id, completion), length in zip(asked, lengths.values(), strict=True):
        content = json.loads(answers.body(looked_up(Client(engine), request_id, completion), "json"))
        assert len(content["tokens"]) == length
    with pytest.raises(LookupError):
        looked_up(Client(engine), "chatcmpl-b", 2)


@pytest.mark.parametrize("reduce", [(), ("layers",), ("heads",), ("layers", "heads")])
def test_json_has_the_numbers_of_the_result(reduce):
    engine = Engine(replace(SETTINGS, reduce=reduce))
    engine.step({"a": (2, 8)})  # two tokens were in the cache
    kept = looked_up(Client(engine), "a")
    content = json.loads(answers.body(kept, "json"))
    result = records.decode(kept.ranks[0])
    assert (content["tokens"], content["cached"], content["layers"]) == (result.tokens[0].tolist(), 2, [0])
    assert (content["id"], content["finished"], content["reduce"]) == ("a", False, list(reduce))
    waad, fai = content["statistics"]
    assert (waad["name"], waad["settings"], waad["axis"], waad["heads"]) == ("waad", {"window": 3}, "row", {"0": None})
    assert (fai["name"], fai["settings"], fai["axis"]) == ("fai", {"lo": 1, "hi": 4}, "column")
    for s, answer in zip(result.statistics, (waad, fai), strict=True):
        expected = torch.where(result.valid[s], result[s], torch.nan)
        values = torch.tensor(json.loads(json.dumps(answer["values"]).replace("null", "NaN")))
        torch.testing.assert_close(values.reshape(expected.shape), expected, atol=0, rtol=0, equal_nan=True)
    nulls = waad["values"]
    while isinstance(nulls[0], list):
        nulls = nulls[0]
    assert [each is None for each in nulls] == [True, True, *[False] * 6]


def test_json_of_keys_and_of_values_that_are_not_finite():
    """A token without a valid value has None, whatever the value is; inf, which JSON can't say, is None, too."""
    top, lse = TopKeys(2), LSE()
    valid = torch.tensor([[False, True]])
    result = records.RequestStatistics(
        tokens=torch.tensor([[5, 6]]),
        prompt=2,
        cached=1,
        valid={top: valid, lse: valid},
        layers=(3,),
        heads={top: {3: (1,)}, lse: {3: None}},
        reduce=(),
        token_entropy=torch.tensor([math.nan, 0.1]),
        model=records.Model("llama"),
        _tensors={
            top: torch.tensor([[0.0, 0.0], [0, 0], [0.75, 0.25], [1, 0]]).reshape(1, 1, 1, 2, 2, 2),
            lse: torch.tensor([0.1, -math.inf]).reshape(1, 1, 1, 2),
        },
    )
    assert isinstance(result[top], Top)
    content = answers.as_json(result)
    assert (content["model"], content["prompt"], content["token_entropy"]) == ("llama", 2, [None, 0.100000001])
    keys, sums = content["statistics"]
    assert (keys["values"], keys["keys"], keys["heads"]) == ([[[None, [0.75, 0.25]]]], [[[None, [1, 0]]]], {3: [1]})
    assert sums["values"] == [[[None, None]]]


@pytest.mark.parametrize("reduce", [(), ("layers", "heads")])
def test_ranks_are_put_together(reduce, tmp_path):
    settings = RequestSettings((WAAD(3), FAI(1, 4)), layers=[0], reduce=reduce)
    whole, ranks = Engine(settings), [Engine(settings, heads) for heads in ([0], [1])]
    for engine in (whole, *ranks):
        engine.step({"a": (0, 8)})
    one, parts = looked_up(Client(whole), "a"), looked_up(Client(*ranks), "a")
    expected = records.decode(one.ranks[0])
    for name, kept in (("one", one), ("parts", parts)):
        (tmp_path / f"{name}.safetensors").write_bytes(answers.body(kept, "safetensors"))
        result = RequestStore(tmp_path)[name]
        assert result.tokens.equal(expected.tokens)
        for s in expected.statistics:
            torch.testing.assert_close(result[s], expected[s], atol=1e-6, rtol=1e-6)


def test_a_request_without_statistics_says_why():
    engine = Engine()
    engine.embeddings["a"] = torch.zeros(2)
    engine.step({"a": (0, 8)})
    with pytest.raises(RuntimeError, match="its prompt has embeddings"):
        answers.body(looked_up(Client(engine), "a"), "json")
