"""Whole models with random weights: what statistics cost a forward pass that computes log-probs. Part "end_to_end".

The headline is the paper's own workload: Qwen3 4B and 8B at full depth, a prompt and a response of 1k or 8k
tokens, five layers of the middle third, WAAD on 30 % of their heads and FAI on another 30 %. Against it stands what
the paper does: a pass of its own with eager attention and `output_attentions=True`, which keeps every layer's maps,
and the same with hooks that reduce each of the five layers' maps and keep none. Truncated models with every head of
every layer at 8k and 32k tokens show the other end. Weights are drawn, not loaded; nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnstats
from attnstats import FAI, WAAD
from attnstats.presets import paper_v2
from attnstats.transformers.selection import middle_third
from benchmarks.gpu.measure import Entrant, race, ratio
from benchmarks.gpu.part import Part, release_memory, wrong

PROMPT = 512
CHUNK = 1024  # tokens whose logits are held at once
WAAD_, FAI_ = WAAD(paper_v2.window), FAI(paper_v2.fai_lo, paper_v2.fai_hi)
NAME = "measured"  # of the attention function, for transformers
FORWARD, IN_PASS, BESIDE, CAPTURE = (
    "log-probs",
    "+ attnstats in the pass",
    "+ attnstats beside the fastest attention",
    "+ attnstats.capture",
)
MAPS, HOOKS = "eager output_attentions, a pass of its own", "eager, maps reduced by hooks, a pass of its own"

# Between ways to compute the same in bfloat16, where eager rounds the maps.
TOLERANCE = {"log_probs": 0.5, "waad": 0.2, "fai": 0.1}

QWEN3 = {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936}
MODELS: dict[str, tuple[str, dict[str, int]]] = {
    "Qwen3-4B": ("Qwen3", QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}),
    "Qwen3-8B": ("Qwen3", QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}),
    "Llama-3-8B": (
        "Llama",
        QWEN3 | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    ),
}
TINY = {
    "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "hidden_size": 32,
    "intermediate_size": 32, "num_hidden_layers": 6,
}  # fmt: skip


class Case(NamedTuple):
    model: str
    tokens: int
    depth: int | None  # layers; None: all
    paper: bool  # the paper's layers and heads, or all of both

    @property
    def name(self) -> str:
        depth = "" if self.depth is None else f" with {self.depth} layers"
        what = "the paper's workload" if self.paper else "every head and layer"
        return f"{self.model}{depth}, {self.tokens} tokens, {what}"


def cases(smoke: bool) -> list[Case]:
    if smoke:
        return [Case("tiny", 20, None, True), Case("tiny", 16, 2, False)]
    paper = [
        Case(model, PROMPT + response, None, True) for model in ("Qwen3-4B", "Qwen3-8B") for response in (8192, 1024)
    ]
    every = [Case(model, tokens, 4, False) for model in ("Qwen3-4B", "Llama-3-8B") for tokens in (8192, 32768)]
    return [*paper[:2], every[0], *paper[2:], *every[1:]]


class Choice(NamedTuple):
    """Heads by layer of each statistic, and the tokens that count: the response."""

    waad: dict[int, list[int]]
    fai: dict[int, list[int]]
    counted: Tensor  # [1, T] bool

    @property
    def layers(self) -> list[int]:
        return sorted(set(self.waad) | set(self.fai))

    def heads(self, layer: int) -> dict[Any, list[int]]:
        found = {WAAD_: self.waad.get(layer, []), FAI_: self.fai.get(layer, [])}
        return {statistic: heads for statistic, heads in found.items() if heads}


def run(part: Part) -> None:
    import transformers

    part.section["transformers"] = transformers.__version__
    rows = part.section.setdefault("rows", [])
    done = part.section.setdefault("cases", [])
    built: dict[tuple[str, int | None], Any] = {}
    pending = [case for case in cases(part.smoke) if case.name not in done]
    for i, case in enumerate(pending):
        rows[:] = [row for row in rows if row["case"] != case.name]
        if part.out_of_time(case.name, 0.0 if part.smoke else 6.0):
            continue
        key = case.model, case.depth
        if key not in built:
            built.clear()
            release_memory()
            outcome = part.attempt(f"building {case.model}", _build, case, part.device)
            if outcome.value is None:
                part.leave_out(case.name, f"the model cannot be built: {outcome.failure}")
                continue
            built[key] = outcome.value
        rows += _measure(part, case, built[key], part.left() / (len(pending) - i))
        done.append(case.name)
        part.save()


def _build(case: Case, device: torch.device) -> Any:
    """Drawn on the device in bfloat16 (the interpreter's is wrong: float32 there)."""
    import transformers

    family, sizes = MODELS.get(case.model, ("Qwen3", TINY))
    if case.depth is not None:
        sizes = sizes | {"num_hidden_layers": case.depth}
    config = getattr(transformers, f"{family}Config")(**sizes, max_position_embeddings=65536, use_cache=False)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
        with device:
            model = getattr(transformers, f"{family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(before)
    return model.to(device).eval()


def choose(case: Case, layers: int, heads: int, device: torch.device) -> Choice:
    counted = torch.ones(1, case.tokens, dtype=torch.bool, device=device)
    if not case.paper:
        every = {layer: list(range(heads)) for layer in range(layers)}
        return Choice(every, every, counted)
    counted[:, : min(PROMPT, case.tokens // 4)] = False
    chosen = middle_third(layers)
    share = int(paper_v2.head_share * heads * len(chosen))
    # Which heads is for the model to say; here any, local and global ones apart.
    order = torch.randperm(heads * len(chosen), generator=torch.Generator().manual_seed(0)).tolist()
    local, far = order[:share], order[-share:]

    def by_layer(picked: list[int]) -> dict[int, list[int]]:
        found = {layer: sorted(p % heads for p in picked if p // heads == i) for i, layer in enumerate(chosen)}
        return {layer: indices for layer, indices in found.items() if indices}

    return Choice(by_layer(local), by_layer(far), counted)


def _workload(case: Case, model: Any, device: torch.device) -> tuple[Choice, Tensor]:
    """Layers, heads and counted tokens; and token ids [1, T]."""
    config = model.config
    choice = choose(case, config.num_hidden_layers, config.num_attention_heads, device)
    generator = torch.Generator(device).manual_seed(0)
    return choice, torch.randint(config.vocab_size, (1, case.tokens), generator=generator, device=device)


def check_capture(case: Case, device: torch.device) -> dict[str, float]:
    """Errors of log-probs and statistics under attnstats.capture, which must be within the tolerance.

    They are measured against the plain forward pass and against the maps of eager attention.
    """
    model = _build(case, device)
    choice, ids = _workload(case, model, device)
    log_probs = _log_probs(model, ids)
    captured = _capturing(model, choice, log_probs)(0)
    with _implementation(model, "eager"):
        maps = _reduce_by_hooks(model, ids, choice)
    errors = _errors(captured, (log_probs(), maps), choice.counted)
    failure = wrong(errors, TOLERANCE)
    assert failure is None, failure
    return errors


def _measure(part: Part, case: Case, model: Any, seconds: float) -> list[dict[str, Any]]:
    choice, ids = _workload(case, model, part.device)
    log_probs = _log_probs(model, ids)
    entrants = {FORWARD: Entrant(lambda _: (log_probs(), {}))}
    for name, backend in ((IN_PASS, "triton"), (BESIDE, "flash")):
        attend = functools.partial(_attention, backend)
        entrants[name] = Entrant(_recording(attend, choice, log_probs), functools.partial(_implementation, model, NAME))
    entrants[CAPTURE] = Entrant(_capturing(model, choice, log_probs))
    separate: dict[str, Entrant] = {}
    if case.paper:
        eager = functools.partial(_implementation, model, "eager")
        separate[MAPS] = Entrant(lambda _: (None, _read_maps(model, ids, choice)), eager)
        separate[HOOKS] = Entrant(lambda _: (None, _reduce_by_hooks(model, ids, choice)), eager)
    agreement = _agreement(part, case, entrants | separate, choice)
    # Apart, so that a hundredth of the forward pass is measured in many rounds and a multiple of it in few.
    found: dict[str, Any] = {}
    for group, share in ((entrants, 0.55), (separate, 0.15)):
        right = {name: entrant for name, entrant in group.items() if "failure" not in agreement[name]}
        found |= {name: agreement[name] for name in group} | race(part, case.name, right, 1, share * seconds)
    base, rows = found[FORWARD], []
    for name, times in found.items():
        row = {"case": case.name, "model": case.model, "tokens": case.tokens, "paper": case.paper, "contender": name}
        row |= agreement[name] | times | {"separate": name in separate, "ours": name in (IN_PASS, BESIDE, CAPTURE)}
        if times.get("ms") and base.get("ms"):
            # A pass of its own costs all of its time, and needn't pair with rounds of the other.
            row["overhead"] = round(times["ms"] / base["ms"] if row["separate"] else ratio(times, base) - 1, 5)
        rows.append(row)
    return rows


def _agreement(part: Part, case: Case, entrants: dict[str, Entrant], choice: Choice) -> dict[str, dict[str, Any]]:
    """By name how far an answer is from that of attnstats in the pass, or the failure. What it says is held to float64
    by the part "correctness"; here a mask or a head that went astray shows."""
    answers = {}
    for name, entrant in entrants.items():
        outcome = part.attempt(f"{case.name}: {name}", _answer, entrant)
        answers[name] = outcome.value or outcome.failure
    found: dict[str, dict[str, Any]] = {}
    for name, answer in answers.items():
        found[name] = {"failure": answer} if isinstance(answer, str) else {}
        right = answers[IN_PASS]
        if isinstance(answer, str) or isinstance(right, str):
            continue
        errors = found[name]["errors"] = _errors(answer, right, choice.counted)
        if failure := wrong(errors, TOLERANCE):
            found[name]["failure"] = failure
    return found


def _answer(entrant: Entrant) -> Any:
    with torch.no_grad(), entrant.around():
        return entrant.call(0)


def _errors(answer: Any, right: Any, counted: Tensor) -> dict[str, float]:
    """Largest errors: of log-probs and of WAAD absolute, of FAI by the largest value."""
    pairs = {"log_probs": (answer[0], right[0])}
    if answer[1]:
        pairs["waad"] = (answer[1][WAAD_][counted], right[1][WAAD_][counted])
        scale = right[1][FAI_].float().max()
        pairs["fai"] = (answer[1][FAI_] / scale, right[1][FAI_] / scale)
    return {k: float((a.float() - b.float()).abs().max()) for k, (a, b) in pairs.items() if a is not None}


def _log_probs(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    """The log-prob of each token of a finished response, as an RL trainer computes it: logits by chunks."""

    def run() -> Tensor:
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        parts = []
        for start in range(0, len(hidden), CHUNK):
            logits = model.lm_head(hidden[start : start + CHUNK]).float()
            target = ids[0, start + 1 : start + 1 + len(logits), None]
            parts.append(logits.gather(1, target)[:, 0] - logits.logsumexp(1))
        return torch.cat(parts)

    return run


@contextlib.contextmanager
def _implementation(model: Any, name: str) -> Iterator[None]:
    """The model with another attention function, set without the checks of the config's setter."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


_STATE: dict[str, Any] = {}  # of the attention function: `attend` of the chosen layers, the choice, and the results


def _recording(attend: Callable[..., Any], choice: Choice, log_probs: Callable[[], Tensor]) -> Callable[[int], Any]:
    def call(_: int) -> Any:
        found: list[tuple[Any, Tensor]] = []
        _STATE.update(attend=attend, choice=choice, found=found)
        return log_probs(), means_of(found)

    return call


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    """SDPA everywhere but in the chosen layers. There is no padding, so the mask is the causal one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    choice = _STATE["choice"]
    heads = choice.heads(module.layer_idx)
    if not heads:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)
    output, stats = _STATE["attend"](query, key, value, kwargs.get("scaling"), heads, choice.counted)
    _STATE["found"] += [(statistic, stats[statistic]) for statistic in heads]
    return output.transpose(1, 2).contiguous(), None


def _attention(
    backend: Any, query: Tensor, key: Tensor, value: Tensor, scale: Any, heads: dict[Any, list[int]], counted: Tensor
) -> Any:
    return attnstats.attention(
        query, key, value, statistics=list(heads), heads=heads, scale=scale, enable_gqa=True, query_mask=counted,
        backend=backend,
    )  # fmt: skip


def means_of(found: list[tuple[Any, Tensor]]) -> dict[Any, Tensor]:
    """One mean over all chosen heads of all layers, per statistic."""
    return {s: torch.cat([x for t, x in found if t == s], dim=1).mean(1) for s in dict.fromkeys(s for s, _ in found)}


def _capturing(model: Any, choice: Choice, log_probs: Callable[[], Tensor]) -> Callable[[int], Any]:
    """As a user of attnstats.capture: every layer attends through attnstats."""

    heads: dict[Any, Any] = {WAAD_: choice.waad, FAI_: choice.fai}

    def call(_: int) -> Any:
        with attnstats.capture(
            model, statistics=[WAAD_, FAI_], layers=choice.layers, heads=heads,
            reduce=("layers", "heads"), query_mask=choice.counted,
        ) as run:  # fmt: skip
            result = log_probs()
        return result, {WAAD_: run[WAAD_], FAI_: run[FAI_]}

    return call


def _read_map(weights: Tensor, heads: dict[Any, list[int]], counted: Tensor) -> list[tuple[Any, Tensor]]:
    """WAAD and the sums of FAI of a layer's map [1, H, T, T]."""
    length = weights.shape[-1]
    position = torch.arange(length, device=weights.device)
    distance = position[:, None] - position
    found = []
    for statistic, chosen in heads.items():
        weight = statistic.weight(distance).to(weights.dtype)
        mine = weights[:, chosen]
        if statistic == WAAD_:
            found.append((statistic, torch.einsum("bhts,ts->bht", mine, weight)))
        else:
            weight *= counted[0, :, None]
            sums = torch.einsum("bhts,ts->bhs", mine, weight).float()
            found.append((statistic, sums / weight.sum(0, dtype=torch.float32).clamp(min=1)))
    return found


def _read_maps(model: Any, ids: Tensor, choice: Choice) -> dict[Any, Tensor]:
    maps = model.model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    return means_of(
        [pair for layer in choice.layers for pair in _read_map(maps[layer], choice.heads(layer), choice.counted)]
    )


def _reduce_by_hooks(model: Any, ids: Tensor, choice: Choice) -> dict[Any, Tensor]:
    """Statistics of one map at a time; the pass stops after the last layer that is needed."""

    class Enough(Exception):
        pass

    found: list[tuple[Any, Tensor]] = []
    last = choice.layers[-1]

    def hook(layer: int) -> Callable[..., None]:
        def reduce(module: Any, inputs: Any, output: Any) -> None:
            found.extend(_read_map(output[1], choice.heads(layer), choice.counted))
            if layer == last:
                raise Enough

        return reduce

    handles = [model.model.layers[i].self_attn.register_forward_hook(hook(i)) for i in choice.layers]
    try:
        model.model(input_ids=ids, use_cache=False)
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return means_of(found)
