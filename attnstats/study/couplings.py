"""The paper's study of a corpus: heads profiled over all responses, then couplings under every variant (Sec. 4).

`measure` reads one response in one pass over all layers and heads, with the statistics of all variants at once, for
corpus.run to store. `examine` makes the tables in two passes over the store: first the local, global and receiver
heads, then the curves of each variant.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from attnstats.chance import Chance, Coupling, Null
from attnstats.heads import RECEIVED, HeadClasses, HeadProfile, class_mean, segment_received
from attnstats.identity import ModelIdentity
from attnstats.rhythm import CorpusRhythm, Curves, PeakRule, sets
from attnstats.segments import boundaries
from attnstats.statistics import FAI, WAAD, MeanDistance, PooledMap
from attnstats.study.models import LoadedModel
from attnstats.study.reading import Departures, pieces, read
from attnstats.study.store import Item
from attnstats.transformers.selection import middle_third

WINDOWS = (5, 10, 20)
ANALYSIS = FAI(0, None)  # the paper's analysis: to the end of the response, the token itself among its queries
SENTENCES_IGNORED = 4  # number of nearest sentences that don't count for receiver heads of sentences
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


def measure(loaded: LoadedModel, prompt: list[int], response: list[int], temperature: float) -> Item:
    """The tensors that the tables need of a response of R tokens and S sentences, by name, without the prompt.

    `waad.<W>`, `fai.<lo>.<hi>` and `mean_distance` (layers, heads, R); `valid.<lo>.<hi>` (R,) bool; `sentences`
    (layers, heads, S), the attention that each receives per pair of tokens, NaN for the last; `entropy` (R,) in nats,
    of the distribution that each token was drawn from; `layers`, their numbers. Among the texts are the `departures`.

    Raises:
        InputError: attention overflows in the model's dtype, or token entropies can't be computed.
    """
    ids = torch.tensor([prompt + response], device=loaded.device, dtype=torch.int64)
    start = len(prompt)
    bounds = boundaries(pieces(loaded.tokenizer, prompt + response), start=start)
    pooled = PooledMap(bounds, bounds)
    statistics: list[WAAD | FAI | MeanDistance] = [*map(WAAD, WINDOWS), *HORIZONS, MeanDistance()]
    # No query mask: a token of the response is seen by the response only. The row before its first token draws that
    # token; no earlier row is made into logits.
    run, drawn = read(
        loaded, ids, [*statistics, pooled], temperature, start=start, entropy_from=start - 1, layers="all", device="cpu"
    )
    tensors = {"layers": torch.tensor(run.layers, dtype=torch.int64, device="cpu"), "entropy": drawn.entropy[1:]}
    tensors |= {name_of(statistic): run[statistic][:, 0, :, start:].float() for statistic in statistics}
    tensors |= {f"valid.{name_of(horizon)}": run.valid[horizon][0, start:].cpu() for horizon in HORIZONS}
    sizes = torch.tensor(bounds, dtype=torch.int64, device="cpu").diff()
    # The first segment is the prompt.
    tensors["sentences"] = segment_received(run[pooled][:, 0, :, 1:, 1:], sizes[1:], SENTENCES_IGNORED)
    return tensors, {"departures": Departures.of(drawn.gap[1:])}


def name_of(statistic: WAAD | FAI | MeanDistance) -> str:
    """The name of a statistic's tensor in the store.

    Example:
        >>> name_of(WAAD(10)), name_of(FAI(0, None))
        ('waad.10', 'fai.0.open')
    """
    if isinstance(statistic, WAAD):
        return f"waad.{statistic.window}"
    if isinstance(statistic, FAI):
        return f"fai.{statistic.lo}.{'open' if statistic.hi is None else statistic.hi}"
    return "mean_distance"


class MeasuredResponses(Protocol):
    """Measured responses, in a store or elsewhere."""

    def items(self, names: Collection[str]) -> Iterable[Item]:
        """The tensors of these names of each response, as far as it has them."""


class Profiles(NamedTuple):
    """Profiles of all heads over all responses, with the kurtosis of what tokens receive, and of what sentences do.

    sentences: None where responses have no such tensor.
    """

    tokens: HeadProfile
    sentences: HeadProfile | None


@dataclass(frozen=True)
class Variant:
    """A choice of the settings that the paper leaves open; the main tables are of the default.

    Attributes:
        layers: the layers whose heads are classified; None: all.
        share: share of the heads that are local, and share that are global.
        window: W of WAAD. horizon: horizon of FAI.
        receivers: number of receiver heads. sentences: their kurtosis is over sentences and not over tokens.
        distinct: receiver heads are left out of the global class, so that the two curves share no head.
        rule: the peak rule. null: the null hypothesis.
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
        """Local and global heads, and receiver heads, as masks (layers, heads)."""
        classes = profiles.tokens.classes(self.share, self.layers)
        profile = profiles.sentences if self.sentences else profiles.tokens
        assert profile is not None, "variants of sentences need their tensors"
        receivers = profile.receivers(self.receivers, self.layers)
        if self.distinct:
            classes = replace(classes, global_=classes.global_ & ~receivers)
        return classes, receivers

    @property
    def tensors(self) -> tuple[str, str, str, str]:
        """The names of the tensors of an item that `curves` needs: WAAD, FAI, where that is valid, and entropy."""
        fai = name_of(self.horizon)
        return f"waad.{self.window}", fai, f"valid.{fai}", "entropy"

    def needs(self, present: Collection[str]) -> bool:
        """True if tensors of these names are enough."""
        return {*self.tensors} <= {*present} and (not self.sentences or "sentences" in present)

    def curves(self, tensors: dict[str, Tensor], classes: HeadClasses, receivers: Tensor) -> Curves:
        """The curves of one response."""
        waad, fai, valid, entropy = (tensors[name] for name in self.tensors)
        return Curves(
            waad=class_mean(waad, classes.local),
            fai=class_mean(fai, classes.global_),
            receiver_fai=class_mean(fai, receivers),
            entropy=entropy,
            fai_valid=valid,
            receiver_valid=valid,
        )


class LabelledVariant(NamedTuple):
    """A variant, the setting that it changes, and the value of that setting."""

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


def variants(layers: Sequence[int], heads: int) -> list[LabelledVariant]:
    """The default and every variant that changes one setting of it, as far as the model has enough heads."""
    default = Variant()
    five = tuple(layers[i] for i in middle_third(len(layers)))
    parts = {**thirds(layers), "five of the middle third": five}
    changes: list[tuple[str, str, dict[str, Any]]] = [
        *(("peak rule", str(rule), {"rule": rule}) for rule in RULES),
        ("chance", "marks shifted round together", {"null": "shift"}),
        *(("layers", name, {"layers": part}) for name, part in parts.items() if len(part) * heads > 1),
        *(("head share", f"{share:.0%}", {"share": share}) for share in SHARES),
        *(("W", str(window), {"window": window}) for window in WINDOWS),
        *(("lo, hi", f"{fai.lo}, {'open' if fai.hi is None else fai.hi}", {"horizon": fai}) for fai in HORIZONS),
        *(("receiver heads", str(count), {"receivers": count}) for count in RECEIVERS),
        ("receiver heads", "of sentences", {"sentences": True}),
        ("receiver heads", "left out of the global ones", {"distinct": True}),
    ]
    changed = [LabelledVariant(setting, value, replace(default, **change)) for setting, value, change in changes]
    return [LabelledVariant("default", "", default), *(label for label in changed if label.variant != default)]


class Row(NamedTuple):
    """The couplings of a variant, None if it has no heads of some class, and the densities of its peaks."""

    setting: str
    value: str
    couplings: tuple[Coupling, Coupling, Coupling] | None
    densities: dict[str, float]


@dataclass(frozen=True, eq=False)
class CorpusTables:
    """The numbers of the tables of a corpus.

    Attributes:
        profiles: profiles of all heads over all responses.
        responses, tokens: their numbers.
        local, global_, receivers: numbers of heads; receivers_global: number of receivers that are global heads.
        unranked: number of heads without a kurtosis, which are no receivers.
        rows: the default first, then the other variants.
        offsets: the default's couplings by (of, near, offset) (Table 20).
        sets: the default's shares of tokens that are chunk boundaries, anchors and both, and of anchors that are
            dominated.
    """

    profiles: Profiles
    responses: int
    tokens: int
    local: int
    global_: int
    receivers: int
    receivers_global: int
    unranked: int
    rows: list[Row]
    offsets: dict[tuple[str, str, int], Coupling]
    sets: dict[str, float]


def profiles_of(responses: MeasuredResponses, model: ModelIdentity | None) -> Profiles:
    """Head profiles over all responses. Raises ValueError where there is none."""
    profiles = None
    received_valid = f"valid.{name_of(RECEIVED)}"
    names = ("layers", "mean_distance", "sentences", name_of(RECEIVED), received_valid)
    for tensors, _ in responses.items(names):
        distance, sentences = tensors["mean_distance"], tensors.get("sentences")
        if profiles is None:
            empty = HeadProfile.empty(tensors["layers"].tolist(), distance.shape[1], model)
            profiles = Profiles(empty, None if sentences is None else empty)
        received, valid = tensors[name_of(RECEIVED)], tensors[received_valid]
        profiles = profiles._replace(tokens=profiles.tokens.add(distance, None, received, valid))
        if profiles.sentences and sentences is not None:
            of_sentences = profiles.sentences.add(distance, None, sentences, sentences[0, 0].isfinite())
            profiles = profiles._replace(sentences=of_sentences)
    if profiles is None:
        raise ValueError("responses: there is none")
    return profiles


def curves_of(store: MeasuredResponses, profiles: Profiles, variant: Variant) -> Iterator[Curves]:
    """The curves of each response under a variant, one at a time; none if it has no heads of some class."""
    heads = variant.heads(profiles)
    if not _has_heads(*heads):
        return
    for tensors, _ in store.items(variant.tensors):
        yield variant.curves(tensors, *heads)


def _has_heads(classes: HeadClasses, receivers: Tensor) -> bool:
    return all(bool(chosen.any()) for chosen in (classes.local, classes.global_, receivers))


def examine(
    store: MeasuredResponses, model: ModelIdentity | None, chance: Chance, present: Collection[str] | None = None
) -> CorpusTables:
    """All tables of the responses in a store, read twice and one at a time.

    Args:
        present: the names of their tensors: variants that need others are left out, and those of depth where layers
            are missing. None: all that `measure` makes.
    """
    profiles = profiles_of(store, model)
    profile = profiles.tokens
    labelled = variants(profile.layers, profile.distance.shape[1])
    if present is not None:
        labelled = [each for each in labelled if each.setting != "layers" and each.variant.needs(present)]
    default = labelled[0].variant
    heads_of = {label.variant: label.variant.heads(profiles) for label in labelled}
    sums = {
        variant: CorpusRhythm(variant.rule, replace(chance, null=variant.null), 1 if variant is default else None)
        for variant, heads in heads_of.items()
        if _has_heads(*heads)
    }
    sets_of = SetShares()
    for tensors, _ in store.items({name for variant in sums for name in variant.tensors}):
        for variant, total in sums.items():
            curves = variant.curves(tensors, *heads_of[variant])
            total.add(curves)
            if variant is default:
                sets_of.add(curves)
    classes, receivers = heads_of[default]
    return CorpusTables(
        profiles=profiles,
        responses=profile.sequences,
        tokens=profile.rows,
        local=int(classes.local.sum()),
        global_=int(classes.global_.sum()),
        receivers=int(receivers.sum()),
        receivers_global=int((receivers & classes.global_).sum()),
        unranked=int(profile.kurtosis.isnan().sum()),
        rows=[
            Row(setting, value, sums[variant].couplings(), sums[variant].densities())
            if variant in sums
            else Row(setting, value, None, {})
            for setting, value, variant in labelled
        ],
        offsets=sums[default].offsets() if default in sums else {},
        sets=sets_of.shares(),
    )


class SetShares:
    """The shares in 0..1 of the sets of rhythm.sets over responses that come one at a time."""

    def __init__(self) -> None:
        self._tokens = self._chunk = self._anchor = self._both = self._dominated = 0

    def add(self, curves: Curves) -> None:
        """Count one more response."""
        of_response = sets(curves)
        self._tokens += len(of_response.chunk)
        self._chunk += int(of_response.chunk.sum())
        self._anchor += int(of_response.anchor.sum())
        self._both += int((of_response.chunk & of_response.anchor).sum())
        self._dominated += int(of_response.dominated.sum())

    def shares(self) -> dict[str, float]:
        """The share of each set; empty without responses."""
        if not self._tokens:
            return {}
        return {
            "chunk": self._chunk / self._tokens,
            "anchor": self._anchor / self._tokens,
            "chunk and anchor": self._both / self._tokens,
            "dominated, of anchors": self._dominated / max(1, self._anchor),
        }
