"""What happens to a service, and when: planned ahead from a seed, so that the same seed brings the same faults."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

_PAUSE_S = (2.0, 6.0)
"""Between two faults."""
_STOPPED_S = (1.0, 8.0)
_AWAY_S = (0.5, 4.0)
# Over before a gateway notices; after it did (3 s); and after the registry and the gateway have forgotten (15 s).
_CUT_S = ((1.0, 2.5), (4.0, 8.0), (18.0, 20.0))
_CUT_WEIGHTS = (3, 4, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Names, by what they are."""

    instances: Sequence[str]
    gateways: Sequence[str]
    etcd: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    kind: str
    """What it is in a record: an instance, a gateway or etcd, and what happens to it."""
    action: str
    """kill and drain, after which the process is started again, stop or cut."""
    targets: tuple[str, ...]
    """One part, or all of etcd."""
    pause_s: float
    """Before it, after the one before is over."""
    lasts_s: float = 0.0
    """Until the process is started again, goes on, or the network is whole."""
    cuts: tuple[tuple[str, str], ...] = ()
    """(from, to): what is dropped."""


def plan_faults(rng: Random, seconds: float, parts: Parts, *, with_network: bool) -> list[Fault]:
    """Faults for so long, each over before the next begins: somebody can always serve.

    They come in rounds of all kinds, each round in an order of its own. with_network: hosts can be cut off.
    """
    makers = _makers(parts)
    kinds = [
        kind for kind, (weight, _) in makers.items() for _ in range(weight) if with_network or "cut off" not in kind
    ]
    plan: list[Fault] = []
    while True:
        rng.shuffle(kinds)
        for kind in kinds:
            fault = makers[kind][1](rng, kind)
            seconds -= fault.pause_s + fault.lasts_s
            if seconds < 0:
                return plan
            plan.append(fault)


_Maker = Callable[[Random, str], Fault]


def _makers(parts: Parts) -> dict[str, tuple[int, _Maker]]:
    """By kind: how many of it are in a round, and what makes one."""
    instances, gateways, etcd = parts.instances, parts.gateways, parts.etcd
    return {
        "instance killed": (3, _single("kill", instances)),
        "instance stopped": (3, _single("stop", instances, _STOPPED_S)),
        "instance drained": (2, _single("drain", instances)),
        "instance cut off": (3, _cut(instances, (*instances, *gateways, *etcd))),
        "instance cut off from gateways": (3, _cut(instances, gateways)),
        "instance cut off from one gateway": (1, _cut(instances, gateways[:1])),
        "instance cut off from etcd": (1, _cut(instances, etcd)),
        "instance cut off from instances": (2, _cut(instances, instances)),
        "gateway killed": (1, _single("kill", gateways)),
        "gateway drained": (1, _single("drain", gateways)),
        "gateway stopped": (1, _single("stop", gateways, _STOPPED_S)),
        "gateway cut off from instances": (1, _cut(gateways, instances)),
        "gateway cut off from etcd": (1, _cut(gateways, etcd)),
        "etcd member killed": (1, _single("kill", etcd, _AWAY_S)),
        "etcd member cut off": (1, _cut(etcd, (*instances, *gateways, *etcd))),
        "etcd killed": (1, _all("kill", etcd, _AWAY_S)),
    }


def _single(action: str, names: Sequence[str], lasts_s: tuple[float, float] = (0.0, 0.0)) -> _Maker:
    def make(rng: Random, kind: str) -> Fault:
        pause_s = rng.uniform(*_PAUSE_S)
        return Fault(
            kind=kind, action=action, targets=(rng.choice(names),), pause_s=pause_s, lasts_s=rng.uniform(*lasts_s)
        )

    return make


def _all(action: str, names: Sequence[str], lasts_s: tuple[float, float]) -> _Maker:
    def make(rng: Random, kind: str) -> Fault:
        pause_s = rng.uniform(*_PAUSE_S)
        return Fault(kind=kind, action=action, targets=tuple(names), pause_s=pause_s, lasts_s=rng.uniform(*lasts_s))

    return make


def _cut(names: Sequence[str], others: Sequence[str]) -> _Maker:
    """Both ways, or one: what the part sends is lost, or what it is sent."""

    def make(rng: Random, kind: str) -> Fault:
        pause_s = rng.uniform(*_PAUSE_S)
        target = rng.choice(names)
        peers = [name for name in others if name != target]
        sent, received = [(target, peer) for peer in peers], [(peer, target) for peer in peers]
        cuts = rng.choice([[*sent, *received], sent, received])
        lasts_s = rng.uniform(*rng.choices(_CUT_S, _CUT_WEIGHTS)[0])
        return Fault(kind=kind, action="cut", targets=(target,), pause_s=pause_s, lasts_s=lasts_s, cuts=tuple(cuts))

    return make
