"""Whole engines of plain data on a fake clock, driven by the scheduler alone: what must hold whatever arrives."""

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.policies.items import Item, MillisecondsPerToken
from xllm_compile.runtime.local_scheduler import SchedulingRules, schedule
from xllm_compile.runtime.policies.order import POLICIES, Order, PolicyName
from xllm_compile.runtime.policies.state import Capacity, Limits, Schedule
from xllm_compile.runtime.policies.waiting_queue import WaitingQueue

TPOT_S = 0.004


@dataclass(eq=False)
class Job(Item):
    """A sequence that wants so many outputs, and may stop before its max_tokens."""

    arrival_s: float = 0.0
    wants: int = 1
    num_outputs: int = 0
    num_preemptions: int = 0


def is_prefill(job: Item) -> bool:
    return job.num_uncomputed_tokens > 1


@dataclass
class World:
    """Plays the engine's part. A step takes a millisecond per token."""

    limits: Limits
    num_blocks: int
    block_tokens: int
    rules: SchedulingRules
    starvation_s: float
    now: float = 0.0
    running: list[Job] = field(default_factory=list)
    finished: list[Job] = field(default_factory=list)
    too_large: list[Job] = field(default_factory=list)
    log: list[list[tuple[str, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting: WaitingQueue[Job] = WaitingQueue(self.rules.order.queue_key)

    @property
    def has_work(self) -> bool:
        return bool(len(self.waiting) or self.running)

    def elder(self) -> Job | None:
        oldest = min((*self.waiting, *self.running), key=lambda job: job.number, default=None)
        return oldest if oldest is not None and self.now - oldest.arrival_s > self.starvation_s else None

    def abort(self, name: str) -> None:
        for job in list(self.waiting):
            if job.name == name:
                self.waiting.remove(job)
        self.running = [job for job in self.running if job.name != name]

    def step(self) -> None:
        elder = self.elder()
        used = sum(job.num_kv_blocks for job in self.running)
        capacity = Capacity(
            num_blocks=self.num_blocks, num_free_blocks=self.num_blocks - used, block_tokens=self.block_tokens
        )
        inputs = (self.waiting, self.running, self.limits, capacity, MillisecondsPerToken())
        plan = schedule(*inputs, rules=self.rules, now=self.now, token_s=1e-3, elder=elder)
        again = schedule(*inputs, rules=self.rules, now=self.now, token_s=1e-3, elder=elder)
        assert plan == again, "the same state gives the same plan"
        self.check(plan, elder)
        self.apply(plan)

    def check(self, plan: Schedule[Job], elder: Job | None) -> None:
        scheduled = [job for job, _ in plan.chunks]
        listed = scheduled + plan.preempted + plan.too_large
        assert len({id(job) for job in listed}) == len(listed)
        assert {id(job) for job in listed} <= {id(job) for job in (*self.waiting, *self.running)}
        assert not plan.swapped
        assert all(job in self.running for job in plan.preempted)
        assert all(1 <= count <= min(job.num_uncomputed_tokens, job.max_chunk) for job, count in plan.chunks)
        assert sum(count for _, count in plan.chunks) <= self.limits.max_num_batched_tokens
        gone = plan.preempted + plan.too_large
        after = {id(job): job for job in (*self.running, *scheduled) if job not in gone}
        assert len(after) <= self.limits.max_num_seqs
        counts = {id(job): count for job, count in plan.chunks}
        held = [job.num_computed_tokens + counts.get(key, 0) for key, job in after.items()]
        assert sum(-(-tokens // self.block_tokens) for tokens in held) <= self.num_blocks
        # Nobody of a better tier loses a place that somebody of a worse one keeps.
        tier = self.rules.order.tier
        kept = [tier(job) for job in after.values() if job is not elder]
        lost = [tier(job) for job in plan.preempted]
        assert not kept or not lost or max(kept) <= max(lost)
        assert elder not in plan.preempted
        # The most senior one moves in every step, which is why everything ends.
        if self.running:
            first = min(self.running, key=lambda job: (job is not elder, *self.rules.order.seniority(job)))
            better = [job for job in self.waiting if tier(job) < tier(first)]
            if self.rules.order.policy == "deadline":
                # There a prompt gives way to one that is due before; a sequence that decodes does not.
                better += [job for job in (*self.waiting, *self.running) if job is not first and is_prefill(first)]
            assert first in scheduled or first in plan.too_large or any(job is elder for job in self.waiting) or better
        else:
            assert plan.chunks or plan.too_large or not len(self.waiting), "an idle engine takes what waits"

    def apply(self, plan: Schedule[Job]) -> None:
        for job in plan.preempted:
            self.running.remove(job)
            job.num_computed_tokens = 0
            job.num_preemptions += 1
            self.waiting.add(job)
        for job in plan.too_large:
            if job in self.running:
                self.running.remove(job)
            else:
                self.waiting.remove(job)
            self.too_large.append(job)
        self.now += sum(count for _, count in plan.chunks) / 1e3
        for job, count in plan.chunks:
            if job not in self.running:
                self.waiting.remove(job)
                self.running.append(job)
            job.num_computed_tokens += count
            if job.num_uncomputed_tokens == 0:
                self.add_token(job)
        self.log.append([(job.name, count) for job, count in plan.chunks])

    def add_token(self, job: Job) -> None:
        job.num_tokens += 1
        job.num_outputs += 1
        job.num_growth_tokens = max(0, job.num_growth_tokens - 1)
        job.first_deadline_s = float("-inf")
        if job.tpot_slo_s is not None:
            job.next_due_s = self.now + job.tpot_slo_s
        if job.num_outputs == job.wants:
            self.running.remove(job)
            self.finished.append(job)


@dataclass(frozen=True)
class Shape:
    at: int
    prompt: int
    wants: int
    slack: int
    """How far max_tokens is beyond what it wants."""
    offline: bool
    priority: int
    ttft_ms: int
    has_tpot: bool
    chunk: int
    abort_after: int

    def job(self, name: str, now: float, block_tokens: int) -> Job:
        return Job(
            name,
            self.prompt,
            max_chunk=self.chunk,
            num_growth_tokens=self.wants - 1 + self.slack,
            is_offline=self.offline,
            priority=self.priority,
            first_deadline_s=now + self.ttft_ms / 1e3 if self.ttft_ms else float("inf"),
            tpot_slo_s=TPOT_S if self.has_tpot else None,
            block_tokens=block_tokens,
            arrival_s=now,
            wants=self.wants,
        )


SHAPES = st.builds(
    Shape,
    at=st.integers(0, 25),
    prompt=st.integers(1, 40),
    wants=st.integers(1, 20),
    slack=st.sampled_from([0, 0, 5, 100]),
    offline=st.booleans(),
    priority=st.integers(0, 2),
    ttft_ms=st.sampled_from([0, 20, 200]),
    has_tpot=st.booleans(),
    chunk=st.sampled_from([3, 1_000_000]),
    abort_after=st.sampled_from([0, 0, 0, 3, 12]),
)
WORLDS = st.builds(
    lambda seqs, extra, blocks, block_tokens, policy, horizon, starvation_s: World(
        Limits(max_num_seqs=seqs, max_num_batched_tokens=seqs + extra),
        blocks,
        block_tokens,
        SchedulingRules(order=Order(policy), admission_horizon=horizon, min_prefill_tokens=2),
        starvation_s,
    ),
    seqs=st.integers(1, 6),
    extra=st.integers(0, 20),
    blocks=st.integers(10, 80),
    block_tokens=st.sampled_from([1, 1, 4]),
    policy=st.sampled_from(POLICIES),
    horizon=st.sampled_from([0, 3, 256]),
    starvation_s=st.sampled_from([0.0, 0.05, 60.0]),
)


@settings(max_examples=300)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=14), world=WORLDS)
def test_everything_ends_once_and_no_limit_is_passed(shapes: list[Shape], world: World) -> None:
    arrivals = sorted(enumerate(shapes), key=lambda entry: entry[1].at)
    aborts: dict[int, list[str]] = {}
    jobs: list[Job] = []
    # The elder, or else the most senior, moves in every step: prompt and outputs, and both again for each that was
    # preempted meanwhile, bound the time to the end.
    bound = 30 + sum((shape.prompt + shape.wants) * (1 + shape.wants) for shape in shapes)
    steps = 0
    while arrivals or world.has_work:
        while arrivals and arrivals[0][1].at <= steps:
            index, shape = arrivals.pop(0)
            jobs.append(shape.job(str(index), world.now, world.block_tokens))
            world.waiting.add(jobs[-1])
            if shape.abort_after:
                aborts.setdefault(steps + shape.abort_after, []).append(str(index))
        for name in aborts.pop(steps, ()):
            world.abort(name)
        world.step()
        steps += 1
        assert steps <= bound, "a request starves or the schedule livelocks"
    aborted = {str(index) for index, shape in enumerate(shapes) if shape.abort_after}
    ended = world.finished + world.too_large
    assert len({id(job) for job in ended}) == len(ended)
    assert {job.name for job in jobs} - aborted <= {job.name for job in ended}
    for job in ended:
        # The last generated token needs no place in the cache.
        tokens = job.num_tokens - job.num_outputs + job.wants - 1
        fits = -(-tokens // world.block_tokens) <= world.num_blocks
        assert (job in world.finished) == fits


@settings(max_examples=100)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=10), world=WORLDS)
def test_with_the_whole_output_as_horizon_nobody_is_preempted_for_memory(shapes: list[Shape], world: World) -> None:
    rules = SchedulingRules(order=Order("fcfs"), admission_horizon=1000, min_prefill_tokens=2)
    world = replace(world, rules=rules)
    jobs = [shape.job(str(index), 0.0, world.block_tokens) for index, shape in enumerate(shapes)]
    for job in jobs:
        job.is_offline = False
        world.waiting.add(job)
    while world.has_work:
        world.step()
    # One that outgrows the cache alone still has to be admitted, and takes from those beside it.
    if all(shape.prompt + shape.wants - 1 + shape.slack <= world.num_blocks for shape in shapes):
        assert not any(job.num_preemptions for job in jobs)


def saturated(policy: PolicyName, starvation_s: float, steps: int) -> tuple[World, Job]:
    """Two offline jobs among online ones that keep coming, two for every place that comes free."""
    rules = SchedulingRules(order=Order(policy))
    world = World(Limits(max_num_seqs=2, max_num_batched_tokens=8), 60, 1, rules, starvation_s)
    target = Job("offline", 12, num_growth_tokens=9, is_offline=True, priority=9, wants=10)
    world.waiting.add(Job("busy", 4, num_growth_tokens=9, wants=10))
    world.waiting.add(target)
    for at in range(steps):
        if len(world.waiting) < 6:
            world.waiting.add(Job(f"online {at}", 4, num_growth_tokens=5, arrival_s=world.now, wants=6))
        world.step()
        if target in world.finished:
            break
    return world, target


def test_under_endless_online_load_an_offline_request_still_ends_in_bounded_time() -> None:
    for policy in POLICIES:
        world, target = saturated(policy, starvation_s=0.1, steps=400)
        assert target in world.finished
        # Waiting until it is the elder, and then at most the steps that it needs itself.
        assert world.now < 0.1 + 30 * 8e-3
        never, starved = saturated(policy, starvation_s=float("inf"), steps=400)
        assert starved not in never.finished
        assert len(never.finished) > len(world.finished)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_without_pressure_first_tokens_come_in_order_of_arrival(prompts: list[int]) -> None:
    world = World(Limits(max_num_seqs=8, max_num_batched_tokens=16), 1000, 1, SchedulingRules(), 60.0)
    jobs = [Job(str(index), prompt) for index, prompt in enumerate(prompts)]
    for job in jobs:
        world.waiting.add(job)
    while world.has_work:
        world.step()
    assert world.finished == jobs
