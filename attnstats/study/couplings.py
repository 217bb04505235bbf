"""The paper's analysis of a corpus: heads profiled over all responses, then couplings under every settlement (Sec. 4).

`measure` reads one response in one pass over all layers and heads, with the statistics of all variants at once, for
corpus.run to keep in a store. `examine` makes the tables of what is kept, in two passes over the store: which heads
are local, global and receivers, then the curves of each variant. Called by commands/couplings.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnstats.errors import InputError
from attnstats.heads import RECEIVED, HeadClasses, HeadProfile, class_mean, segment_received
from attnstats.identity import identity
from attnstats.rhythm import Chance, Coupling, Curves, Null, PeakRule, couplings, densities, offsets, sets
from attnstats.segments import boundaries
from attnstats.statistics import FAI, WAAD, MeanDistance, PooledMap
from attnstats.study.analysis import drawn_entropy, hidden_states, pieces
from attnstats.study.corpus import Measured
from attnstats.study.models import LoadedModel
from attnstats.study.store import Store
from attnstats.transformers.capture import capture
from attnstats.transformers.selection import middle_third

WINDOWS = (5, 10, 20)
ANALYSIS = FAI(0, None)  # of the paper's analysis: to the end of the response, the token itself among its queries
SENTENCES_IGNORED = 4  # the nearest, where sentences are what receives
HORIZONS = (ANALYSIS, RECEIVED, FAI(10, None), FAI(0, 100), FAI(10, 100), FAI(10, 50))
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
MAXIMA = PeakRule()
RULES = (
    MAXIMA,
    PeakRule(quantile=0.5),
    PeakRule(prominence=0.5),
    PeakRule(prominence=1.0),
    PeakRule(maxima=False, quantile=0.8),
)
RECEIVERS = (10, 20, 40)


def measure(loaded: LoadedModel, prompt: list[int], response: list[int], temperature: float) -> Measured:
    """What the tables need of a response, its R tokens and S sentences alone: tensors by name.

    `waad.<W>`, `fai.<lo>.<hi>` and `mean_distance` (layers, heads, R); `valid.<lo>.<hi>` (R,) bool; `sentences`
    (layers, heads, S), what each receives per pair of tokens, NaN for the last; `entropy` (R,) in nats, of the
    distribution that each token was drawn from; `layers`, their numbers.

    Raises:
        InputError: attention overflows in the model's dtype, or token entropies can't be computed.
    """
    ids = torch.tensor([prompt + response], device=loaded.device)
    start = len(prompt)
    bounds = boundaries(pieces(loaded.tokenizer, prompt + response), start=start)
    pooled = PooledMap(bounds, bounds)
    statistics: list[WAAD | FAI | MeanDistance] = [*map(WAAD, WINDOWS), *HORIZONS, MeanDistance()]
    asked = [*statistics, pooled]
    # No query mask: what a response's token receives comes from the response.
    with torch.no_grad(), capture(loaded.model, statistics=asked, layers="all", device="cpu") as run:
        hidden, last_logits = hidden_states(loaded, ids)
    tensors = {"layers": torch.tensor(run.layers)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN is an error of its own below
        for statistic in statistics:
            tensors[name_of(statistic)] = run[statistic][:, 0, :, start:].float()
        sizes = torch.tensor(bounds).diff()
        # The first segment is the prompt.
        tensors["sentences"] = segment_received(run[pooled][:, 0, :, 1:, 1:], sizes[1:], SENTENCES_IGNORED)
    for horizon in HORIZONS:
        tensors[f"valid.{name_of(horizon)}"] = run.valid[horizon][0, start:].cpu()
    if not tensors[name_of(MeanDistance())].isfinite().all():
        raise InputError(f"--dtype {loaded.dtype}: attention of {loaded.name} overflows in it; use --dtype float32")
    # The row before the response's first draws it; no row of the prompt before that is made into logits.
    tensors["entropy"] = drawn_entropy(loaded, hidden[start - 1 :], last_logits, temperature)[1:]
    return tensors, {}


def name_of(statistic: WAAD | FAI | MeanDistance) -> str:
    """The name that a statistic's tensor is kept under.

    Example:
        >>> name_of(WAAD(10)), name_of(FAI(0, None))
        ('waad.10', 'fai.0.open')
    """
    if isinstance(statistic, WAAD):
        return f"waad.{statistic.window}"
    if isinstance(statistic, FAI):
        return f"fai.{statistic.lo}.{'open' if statistic.hi is None else statistic.hi}"
    return "mean_distance"


class Profiles(NamedTuple):
    """The heads of all layers over all responses, with the kurtosis of what tokens, and of what sentences receive."""

    tokens: HeadProfile
    sentences: HeadProfile


@dataclass(frozen=True)
class Variant:
    """One way to settle what the paper leaves open; the default is what the tables are of.

    Attributes:
        layers: whose heads are classed; None: all.
        share: of the heads that are local, and that are global.
        window: W of WAAD. horizon: of FAI.
        receivers: how many heads are receivers. sentences: their kurtosis is of sentences and not of tokens.
        distinct: receiver heads are left out of the global class, so that the two curves share no head.
        rule: which tokens are peaks. null: what chance is.
    """

    layers: tuple[int, ...] | None = None
    share: float = 0.30
    window: int = 10
    horizon: FAI = ANALYSIS
    receivers: int = 20
    sentences: bool = False
    distinct: bool = False
    rule: PeakRule = MAXIMA
    null: Null = "shuffle"

    def heads(self, profiles: Profiles) -> tuple[HeadClasses, Tensor]:
        """Local and global heads, and receivers: masks (layers, heads)."""
        classes = profiles.tokens.classes(self.share, self.layers)
        of = profiles.sentences if self.sentences else profiles.tokens
        receivers = of.receivers(self.receivers, self.layers)
        if self.distinct:
            classes = replace(classes, global_=classes.global_ & ~receivers)
        return classes, receivers

    def curves(self, tensors: dict[str, Tensor], classes: HeadClasses, receivers: Tensor) -> Curves:
        """The curves of one response."""
        fai, valid = tensors[name_of(self.horizon)], tensors[f"valid.{name_of(self.horizon)}"]
        return Curves(
            waad=class_mean(tensors[f"waad.{self.window}"], classes.local),
            fai=class_mean(fai, classes.global_),
            receiver_fai=class_mean(fai, receivers),
            entropy=tensors["entropy"],
            fai_valid=valid,
            receiver_valid=valid,
        )


class Labelled(NamedTuple):
    """A variant, and which setting of the default it changes to what."""

    setting: str
    value: str
    variant: Variant


def thirds(layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The bottom, middle and top third of the layers (Table 10).

    Example:
        >>> thirds(range(7))
        {'bottom third': (0, 1), 'middle third': (2, 3), 'top third': (4, 5, 6)}
    """
    count = len(layers)
    first, second = count // 3, 2 * count // 3
    parts = layers[:first], layers[first:second], layers[second:]
    names = ("bottom third", "middle third", "top third")
    return {name: tuple(part) for name, part in zip(names, parts, strict=True) if part}


def settlements(layers: Sequence[int], heads: int) -> list[Labelled]:
    """The default and every variant that changes one setting of it, where the model has heads enough for it."""
    base = Variant()
    found = [Labelled("default", "", base)]
    found += [Labelled("peak rule", str(rule), replace(base, rule=rule)) for rule in RULES if rule != base.rule]
    found.append(Labelled("chance", "marks shifted round together", replace(base, null="shift")))
    five = tuple(layers[i] for i in middle_third(len(layers)))
    for name, part in {**thirds(layers), "five of the middle third": five}.items():
        if len(part) * heads > 1:
            found.append(Labelled("layers", name, replace(base, layers=part)))
    found += [Labelled("head share", f"{q:.0%}", replace(base, share=q)) for q in SHARES if q != base.share]
    found += [Labelled("W", str(window), replace(base, window=window)) for window in WINDOWS if window != base.window]
    for horizon in HORIZONS:
        if horizon != base.horizon:
            hi = "open" if horizon.hi is None else horizon.hi
            found.append(Labelled("lo, hi", f"{horizon.lo}, {hi}", replace(base, horizon=horizon)))
    found += [
        Labelled("receiver heads", str(count), replace(base, receivers=count))
        for count in RECEIVERS
        if count != base.receivers
    ]
    found.append(Labelled("receiver heads", "of sentences", replace(base, sentences=True)))
    found.append(Labelled("receiver heads", "left out of the global ones", replace(base, distinct=True)))
    return found


class Row(NamedTuple):
    """What a variant comes to: its couplings, None where it has no heads of a kind, and its densities of peaks."""

    setting: str
    value: str
    couplings: tuple[Coupling, Coupling, Coupling] | None
    densities: dict[str, float]


@dataclass(frozen=True, eq=False)
class Findings:
    """The tables of a corpus.

    Attributes:
        profiles: of all heads over all responses.
        responses, tokens: how many there were.
        local, global_, receivers: numbers of heads; receivers_global: of receivers that are global heads.
        rows: the default first, then each variant (`settlements`).
        offsets: of the default (Table 20), by (of, near, offset).
        sets: of the default: the shares of all tokens that are chunk boundaries, anchors and both, and of anchors that are dominated.
    """

    profiles: Profiles
    responses: int
    tokens: int
    local: int
    global_: int
    receivers: int
    receivers_global: int
    rows: list[Row]
    offsets: dict[tuple[str, str, int], Coupling] = field(default_factory=dict)
    sets: dict[str, float] = field(default_factory=dict)


def profiles_of(store: Store, loaded: LoadedModel) -> Profiles:
    """Head profiles over all responses of a store."""
    heads = int(loaded.model.config.get_text_config().num_attention_heads)
    model = identity(loaded.model)
    found = None
    for tensors, _ in store:
        if found is None:
            empty = HeadProfile.empty(tensors["layers"].tolist(), heads, model)
            found = Profiles(empty, empty)
        received, sentences = tensors[name_of(RECEIVED)], tensors["sentences"]
        found = Profiles(
            found.tokens.add(tensors["mean_distance"], None, received, tensors[f"valid.{name_of(RECEIVED)}"]),
            found.sentences.add(tensors["mean_distance"], None, sentences, sentences[0, 0].isfinite()),
        )
    if found is None:
        raise ValueError("store: holds no results")
    return found


def curves_of(store: Store, profiles: Profiles, variants: Sequence[Variant]) -> dict[Variant, list[Curves]]:
    """The curves of all responses under each variant that has heads of every kind; each response is read once."""
    chosen = {}
    for variant in variants:
        classes, receivers = variant.heads(profiles)
        if all(mask.any() for mask in (classes.local, classes.global_, receivers)):
            chosen[variant] = classes, receivers
    found: dict[Variant, list[Curves]] = {variant: [] for variant in chosen}
    for tensors, _ in store:
        for variant, heads in chosen.items():
            found[variant].append(variant.curves(tensors, *heads))
    return found


def examine(store: Store, loaded: LoadedModel, chance: Chance) -> Findings:
    """All tables of the responses in a store."""
    profiles = profiles_of(store, loaded)
    profile = profiles.tokens
    labelled = settlements(profile.layers, profile.distance.shape[1])
    curves = curves_of(store, profiles, [label.variant for label in labelled])
    base = labelled[0].variant
    classes, receivers = base.heads(profiles)
    rows = []
    for setting, value, variant in labelled:
        of = curves.get(variant)
        found = None if of is None else couplings(of, variant.rule, replace(chance, null=variant.null))
        rows.append(Row(setting, value, found, {} if of is None else densities(of, variant.rule)))
    return Findings(
        profiles=profiles,
        responses=profile.sequences,
        tokens=profile.rows,
        local=int(classes.local.sum()),
        global_=int(classes.global_.sum()),
        receivers=int(receivers.sum()),
        receivers_global=int((receivers & classes.global_).sum()),
        rows=rows,
        offsets=offsets(curves[base], base.rule, chance) if base in curves else {},
        sets=shares_of_sets(curves.get(base, [])),
    )


def shares_of_sets(curves: Sequence[Curves]) -> dict[str, float]:
    """How large the sets of rhythm.sets are over all responses, each a share of 0..1; nothing where there are none."""
    if not curves:
        return {}
    of_responses = [sets(c) for c in curves]
    chunk, anchor, dominated = (
        torch.cat([getattr(of_response, name) for of_response in of_responses])
        for name in ("chunk", "anchor", "dominated")
    )
    return {
        "chunk": chunk.double().mean().item(),
        "anchor": anchor.double().mean().item(),
        "chunk and anchor": (chunk & anchor).double().mean().item(),
        "dominated, of anchors": dominated.sum().item() / max(1, int(anchor.sum())),
    }
