"""What of SGLang 0.5.23 the plug-in reads and wraps, by its names, in a server of three layers with random keys.

tests/engines/sglang/test_source.py compares the names with SGLang's source.
"""

from __future__ import annotations

import sys
from array import array
from enum import Enum, auto
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

HEADS, KEY_HEADS, DIM = 4, 2, 16
SCALE, LAYERS = 0.3, 3


class ForwardMode(Enum):
    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()

    def is_extend(self):
        return self in (ForwardMode.EXTEND, ForwardMode.MIXED)

    def is_decode(self):
        return self == ForwardMode.DECODE


class AttentionType(Enum):
    DECODER = "decoder"
    DECODER_BIDIRECTIONAL = "decoder_bidirectional"


class Req:
    def __init__(self, rid, prompt, new_tokens, stream=False, custom_params=None):
        self.rid = rid
        self.origin_input_ids = array("q", prompt)
        self.output_ids = array("q")
        self.sampling_params = SimpleNamespace(max_new_tokens=new_tokens, custom_params=custom_params)
        self.stream = stream
        self.input_embeds = self.beam_group = self.customized_info = self.finished_len = None
        self.send_token_offset = 0
        self.slots: list[int] = []

    def finished(self):
        return self.finished_len is not None

    @property
    def output_ids_through_stop(self):
        return self.output_ids if self.finished_len is None else self.output_ids[: self.finished_len]

    def tokens(self):
        return [*self.origin_input_ids, *self.output_ids]


class MHATokenToKVPool:
    def __init__(self, size, dtype=torch.float32):
        draw = torch.Generator("cpu").manual_seed(0)
        shape = (LAYERS, size, KEY_HEADS, DIM)
        self.k_buffer = torch.randn(shape, generator=draw, device="cpu").to(dtype)  # what lay there before
        self.dtype = self.store_dtype = dtype
        self.is_quantized_kv_cache = False
        self.kv_cache_layout = "nhd"
        self.free = torch.randperm(size, generator=draw, device="cpu").tolist()

    def get_key_buffer(self, layer_id):
        return self.k_buffer[layer_id]


class RadixAttention(torch.nn.Module):
    def __init__(self, layer_id, window=-1, cap=0.0):
        super().__init__()
        self.layer_id = layer_id
        self.tp_q_head_num, self.qk_head_dim = HEADS, DIM
        self.scaling, self.logit_cap, self.sliding_window_size = SCALE, cap, window
        self.logit_capping_method, self.pos_encoding_mode = "tanh", "NONE"
        self.is_cross_attention = self.use_irope = False
        self.xai_temperature_len = -1
        self.attn_type = AttentionType.DECODER
        self.pool: Any = None

    def forward(self, q, k, v, forward_batch, save_kv_cache=True, **kwargs):
        self.pool.k_buffer[self.layer_id][forward_batch.out_cache_loc] = k.view(-1, KEY_HEADS, DIM)
        return torch.zeros_like(q)


class Model(torch.nn.Module):
    """A layer's query and key of a token are drawn by its number, its id and its position."""

    def __init__(self, window=-1, cap=0.0, sinks=None, dtype=torch.float32):
        super().__init__()
        self.layers = torch.nn.ModuleList(RadixAttention(i, window, cap) for i in range(LAYERS))
        self.sinks, self.dtype = sinks, dtype
        self.more: dict[str, Any] = {}
        self.parts = False

    def projections(self, layer, tokens, begin=0):
        """(n, HEADS * DIM) and (n, KEY_HEADS * DIM), parts of one tensor as those of most models."""
        rows = []
        for position, token in enumerate(tokens, begin):
            draw = torch.Generator("cpu").manual_seed(layer + 10 * position + 1000 * token)
            rows.append(torch.randn((HEADS + KEY_HEADS) * DIM, generator=draw, device="cpu"))
        return torch.stack(rows).to(self.dtype).split([HEADS * DIM, KEY_HEADS * DIM], -1)

    def forward(self, tokens, begins, forward_batch):
        for i, layer in enumerate(self.layers):
            parts = [self.projections(i, own, begin) for own, begin in zip(tokens, begins, strict=True)]
            query, key = (torch.cat(x) for x in zip(*parts, strict=True))
            padding = query.new_full((forward_batch.padding, query.shape[1]), 7.0)
            query = torch.cat([query, padding])
            sinks = {} if self.sinks is None else {"sinks": self.sinks}
            batch = SimpleNamespace(**vars(forward_batch)) if self.parts else forward_batch
            layer(query, key, key, batch, **sinks, **self.more)


class SchedulerOutputStreamer:
    """Sends parts, each to be put behind those before, as SGLang's tokenizer manager does."""

    def __init__(self):
        self.responses: dict[str, dict[str, Any]] = {}

    def stream_output(self, reqs, return_logprob, skip_req=None):
        for req in reqs:
            if req is skip_req or not (req.stream or req.finished()):
                continue
            part = slice(req.send_token_offset, len(req.output_ids_through_stop))
            req.send_token_offset = part.stop
            response = self.responses.setdefault(req.rid, {"id": req.rid})
            response["finish_reason"] = {"type": "length"} if req.finished() else None
            for key, values in (req.customized_info or {}).items():
                response.setdefault(key, []).extend(values[part])


class Scheduler:
    streamer = SchedulerOutputStreamer

    def __init__(self, model, enable_overlap=False, padding=0):
        self.enable_overlap, self.enable_pdmux, self.is_generation = enable_overlap, False, True
        self.spec_algorithm = SimpleNamespace(is_none=lambda: True)
        self.output_streamer = self.streamer()
        self.padding, self.rows = padding, 0  # of no request
        self._model = model
        self.init_model_worker()

    def init_model_worker(self):
        pool = MHATokenToKVPool(200, self._model.dtype)
        for layer in self._model.modules():
            if isinstance(layer, RadixAttention):
                layer.pool = pool
        self.runner = SimpleNamespace(
            model=self._model,
            dtype=self._model.dtype,
            model_config=SimpleNamespace(is_encoder_decoder=False),
            token_to_kv_pool=pool,
            req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(20, 64, dtype=torch.int32, device="cpu")),
            prefill_attention_backend_str="triton",
            decode_attention_backend_str="triton",
            attn_backend=SimpleNamespace(forward_metadata=SimpleNamespace(custom_mask=None)),
        )
        self.tp_worker = SimpleNamespace(model_runner=self.runner)
        self._rows: dict[str, int] = {}

    def run_batch(self, batch):
        tokens, begins, slots = [], [], []
        ends = [len(req.slots) for req in batch.reqs]
        lengths = batch.extend_lens if batch.forward_mode.is_extend() else [1] * len(ends)
        for req, end, length in zip(batch.reqs, ends, lengths, strict=True):
            tokens.append(req.tokens()[end - length : end])
            begins.append(end - length)
            slots += req.slots[end - length :]
        forward_batch = SimpleNamespace(
            forward_mode=ForwardMode.EXTEND if batch.forward_mode.is_extend() else ForwardMode.DECODE,
            req_pool_indices=torch.tensor([self._rows[req.rid] for req in batch.reqs], device="cpu"),
            seq_lens=torch.tensor(ends, device="cpu"),
            out_cache_loc=torch.tensor(slots, device="cpu"),
            extend_seq_lens=torch.tensor(lengths, device="cpu"),
            padding=self.padding,
            multi_item_delimiter_indices=None,
        )
        self._model(tokens, begins, forward_batch)

    def step(self, *spans, decoding=()):
        """Run requests' parts (request, begin, end) of prompts, or tokens of those that are decoding, or both."""
        parts = [*spans, *((req, len(req.slots), len(req.slots) + 1) for req in decoding)]
        reqs = [req for req, *_ in parts]
        for req, begin, end in parts:
            del req.slots[begin:]
            req.slots += [self.runner.token_to_kv_pool.free.pop() for _ in range(begin, end)]
            row = self._rows.setdefault(req.rid, len(self._rows) + 1)
            table = self.runner.req_to_token_pool.req_to_token
            table[row, :end] = torch.tensor(req.slots, dtype=torch.int32, device="cpu")
        extends = {
            "prefix_lens": [begin for _, begin, _ in parts] if spans else None,
            "extend_lens": [end - begin for _, begin, end in parts] if spans else None,
        }
        mode = ForwardMode.DECODE if not spans else ForwardMode.MIXED if decoding else ForwardMode.EXTEND
        ends = torch.tensor([end for *_, end in parts] + [1] * self.rows, device="cpu")
        self.run_batch(SimpleNamespace(reqs=reqs, forward_mode=mode, seq_lens_cpu=ends, **extends))
        unfinished = None
        for req, _, end in parts:
            if end < len(req.tokens()):
                unfinished = req
                continue
            req.output_ids.append((7 * end + len(req.rid)) % 50)
            if len(req.output_ids) == req.sampling_params.max_new_tokens:
                req.finished_len = len(req.output_ids)
        self.output_streamer.stream_output(reqs, False, unfinished)

    def prefill(self, req, prefix=(), begin=0):
        """prefix: the slots of tokens that are in the cache."""
        req.slots = list(prefix)
        self.step((req, len(prefix), len(req.tokens())))


class HookType(Enum):
    AROUND = "around"


class HookRegistry:
    """Applies hooks when they are registered."""

    @classmethod
    def register(cls, target, hook, hook_type):
        module, name, method = target.rsplit(".", 2)
        owner = getattr(sys.modules[module], name)
        original = getattr(owner, method)
        setattr(owner, method, lambda *args, **kwargs: hook(original, *args, **kwargs))


class Engine:
    """Generates from one prompt, with a token for each letter."""

    scheduler: type[Scheduler]

    def __init__(self, model_path, disable_cuda_graph, disable_overlap_schedule):
        from attnstats.integrations.sglang import plugin

        assert disable_cuda_graph
        plugin.register()
        self.server = self.scheduler(model_path, enable_overlap=not disable_overlap_schedule)

    def generate(self, prompt, sampling_params):
        req = Req("a", list(prompt.encode()), sampling_params["max_new_tokens"])
        self.server.prefill(req)
        while not req.finished():
            self.server.step(decoding=[req])
        return {"text": "...", "meta_info": self.server.output_streamer.responses["a"]}


def install(monkeypatch, *, graphs=False, **parallel):
    """Have these classes, afresh, where SGLang has them."""
    widths = SimpleNamespace(**({"tp_size": 1, "pp_size": 1, "dp_size": 1} | parallel))
    streamer = type("SchedulerOutputStreamer", (SchedulerOutputStreamer,), {})
    scheduler = type("Scheduler", (Scheduler,), {"streamer": streamer})
    contents = {
        "sglang": {"Engine": type("Engine", (Engine,), {"scheduler": scheduler})},
        "sglang.version": {"__version__": "0.5.23"},
        "sglang.srt.environ": {"envs": SimpleNamespace(SGLANG_RUST_SERVER=SimpleNamespace(get=lambda: False))},
        "sglang.srt.layers.radix_attention": {"RadixAttention": RadixAttention},
        "sglang.srt.managers.scheduler": {"Scheduler": scheduler},
        "sglang.srt.managers.scheduler_components.output_streamer": {"SchedulerOutputStreamer": streamer},
        "sglang.srt.mem_cache.memory_pool": {"MHATokenToKVPool": MHATokenToKVPool},
        "sglang.srt.model_executor.cuda_graph_config": {"cuda_graph_fully_disabled": lambda: not graphs},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": HookType},
        "sglang.srt.runtime_context": {
            "get_parallel": lambda: widths,
            "get_disagg": lambda: SimpleNamespace(disaggregation_mode="null"),
            "get_model": lambda: SimpleNamespace(model_path="a/model"),
            "get_serving": lambda: SimpleNamespace(tokenizer_path=None),
        },
    }
    for name, content in contents.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            package = ".".join(parts[:i])
            if package not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return scheduler
