"""Measures a comparison from the first server's start to the last one's end: all I/O of it.

All arms are up together, unless asked otherwise, so that the runs of one repetition follow each
other directly; the processes of the arms that do not have their turn are stopped. What they use all
the same is measured in every run (`idle_cpu_share`). On GPUs, where each arm would hold its share
of the memory, `--residency alone` has one arm up at a time. The next repetition has new servers.
What `journal` has kept of an earlier part is not measured again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from msgspec import structs

from tinfer.bench.compare import steps as plan
from tinfer.bench.compare.arms import SERVED_NAME, Arm, servers_of
from tinfer.bench.compare.balancer import Balancer
from tinfer.bench.compare.capacity import RateSearch, Verdict, judge, max_drain_s
from tinfer.bench.compare.fleet import Fleet
from tinfer.bench.compare.journal import Alone, Ended, Found, Journal
from tinfer.bench.compare.limits import Slos, slos_of, unloaded_of
from tinfer.bench.compare.options import CompareOptions
from tinfer.bench.compare.recorded import FullLoad, Probe, Recorded, Run
from tinfer.bench.compare.samples import sample_of, work_of
from tinfer.bench.compare.steps import Step
from tinfer.bench.interruption import Interrupted, unless_stopped
from tinfer.bench.metrics import figures_of
from tinfer.bench.options import BenchOptions
from tinfer.bench.outcome import LoadRun, Outcome, Planned
from tinfer.bench.plan import check_fits, plan_of, warm_ups_of
from tinfer.bench.records import records_of
from tinfer.bench.sender import Sender, frozen_heap, open_session
from tinfer.bench.target import Target, TokenRange, find_target, scheduler_of, vocab_size_of
from tinfer.client.aio import TRACE_HEADER
from tinfer.errors import StartError
from tinfer.workloads import WORKLOADS, Request

ENDPOINT = "/v1/completions"
RAW_METRICS = ("ttft", "tpot", "itl", "e2el")
RAW_PERCENTILES = (50.0, 99.0)
_SETTLE_S = 0.3


async def record(
    options: CompareOptions,
    arms: Sequence[Arm],
    scratch: Path,
    stop: asyncio.Event,
    say: Callable[[str], None],
    journal: Journal,
    recorded: Recorded,
) -> None:
    """Measure into `recorded` what is not there yet; nothing runs any more when it ends.

    `scratch` is an empty folder for the servers. Raises `StartError` and `OSError` where there are
    no runs; later failures end up in the result.
    """
    session = _Session(options, arms, scratch, stop, say, journal, recorded)
    try:
        await session.all()
    except Interrupted:
        recorded.ended_early = "interrupted"
    except (StartError, OSError) as error:
        if not recorded.runs:
            raise
        recorded.ended_early = str(error)
    finally:
        session.fleet.stop()


class _Session:
    def __init__(
        self,
        options: CompareOptions,
        arms: Sequence[Arm],
        scratch: Path,
        stop: asyncio.Event,
        say: Callable[[str], None],
        journal: Journal,
        recorded: Recorded,
    ) -> None:
        self.recorded = recorded
        self.fleet = Fleet(options, scratch, say, self._warm_up)
        self._journal = journal
        self._options = options
        self._arms = {arm.name: arm for arm in arms}
        self._stop = stop
        self._say = say
        self._tokens = TokenRange.within(recorded.vocab_size or 2)
        done = {run.step for run in recorded.runs}
        self._todo = [one for one in plan.steps_of(options, list(self._arms)) if one not in done]

    async def all(self) -> None:
        options = self._options
        if not self._todo:
            return
        replicas = [arm for arm in self._arms.values() if arm.is_replicas]
        await self._start_all()
        if not self.recorded.unloaded:
            await self._measure_unloaded(replicas[0])
        for workload in options.workloads:
            if workload not in self.recorded.full_load:
                await self._find_full_load(workload, replicas)
        await self._run_steps()

    async def _start_all(self) -> None:
        """Where all arms are up at once: now, so that none starts amid a repetition."""
        if self._options.residency == "together":
            for arm in self._arms.values():
                await self._urls(arm)

    async def _restart_all(self) -> None:
        """Two servers that are the same may differ by a tenth for as long as they live, by where
        their memory lies. Intervals are to know of that, so each repetition draws anew."""
        await asyncio.to_thread(self.fleet.stop)
        self._check_stop()
        await self._start_all()

    async def _urls(self, arm: Arm) -> list[str]:
        return await unless_stopped(self.fleet.urls(arm), self._stop)

    async def _warm_up(self, arm: Arm, urls: Sequence[str]) -> None:
        """Requests of every class at once, so that no run pays for what happens only once."""
        if self.recorded.target is None:
            await self._look_at(urls[0])
        requests = plan.unloaded_requests(self._options)
        made = warm_ups_of(requests, self._target, self._tokens, self._bench(f"warm-up {arm.name}"))
        for url in urls:
            run, _ = await self._send(arm, [url], made, self._stop)
            failed = [one for one in run.outcomes if one.error is not None]
            if failed:
                raise StartError(f"{arm.name} failed to warm up: {failed[0].error}")
        if arm.is_tinfer:
            self.recorded.schedulers[arm.name] = await scheduler_of(urls[0])

    async def _look_at(self, url: str) -> None:
        target = await find_target(url, SERVED_NAME, {}, 0.0)
        # The server says the name it serves under; the files are where the options say.
        target = structs.replace(target, root=self._options.model)
        self.recorded.target = target
        self.recorded.vocab_size = vocab_size_of(target)[0]
        self._tokens = TokenRange.within(self.recorded.vocab_size)
        for repetition in range(self._options.repetitions):
            for point in plan.points_of(self._options):
                check_fits(plan.requests_of(self._options, point, repetition, 1.0), target)

    @property
    def _target(self) -> Target:
        if self.recorded.target is None:
            raise StartError("no server was looked at yet")
        return self.recorded.target

    async def _measure_unloaded(self, arm: Arm) -> None:
        """One request after the other on the first replica of `arm`."""
        url = (await self._urls(arm))[0]
        requests = plan.unloaded_requests(self._options)
        self._say(f"unloaded times of {len(requests)} requests on one replica of {arm.name}")
        planned = self._planned(requests, "unloaded")
        before = [None, *(one.request_id for one in planned)]
        chain = [
            structs.replace(one, planned_s=0.0, after=previous)
            for one, previous in zip(planned, before, strict=False)
        ]
        run, _ = await self._send(arm, [url], chain, self._stop)
        tasks = {request.request_id: request.task for request in requests}
        self.recorded.unloaded = unloaded_of(tasks, run.outcomes)
        missing = set(tasks.values()) - self.recorded.unloaded.keys()
        if missing:
            raise StartError(f"no unloaded time of {', '.join(sorted(missing))}: requests failed")
        self._journal.add(
            Alone(
                target=self.recorded.target,
                vocab_size=self.recorded.vocab_size,
                unloaded=self.recorded.unloaded,
            )
        )
        for task, one in self.recorded.unloaded.items():
            tpot_ms = 1000 * (one.tpot_s or 0.0)
            self._say(f"{task} alone: TTFT {1000 * one.ttft_s:.1f} ms, TPOT {tpot_ms:.2f} ms")

    async def _find_full_load(self, workload: str, replicas: Sequence[Arm]) -> None:
        given = self._options.full_load.get(workload)
        if given is not None:
            found = FullLoad(rate_rps=given, arm=None, probes=[])
        else:
            found = await self._searched(workload, list(replicas))
        self.recorded.full_load[workload] = found
        self._journal.add(Found(workload=workload, full_load=found))
        self._say(f"{workload}: 100 % load is {found.rate_rps:.3f} req/s")

    async def _searched(self, workload: str, replicas: list[Arm]) -> FullLoad:
        tasks = WORKLOADS[workload].tasks
        known = [self.recorded.unloaded[t] for t in tasks if t in self.recorded.unloaded]
        mean_s = sum(one.mean_e2el_s for one in known) / len(known)
        # Every device busy with one request at a time: batching takes it from there.
        search = RateSearch(self._options.num_workers / mean_s)
        probes: list[Probe] = []
        best: str | None = None
        while (rate_rps := search.next_rps) is not None:
            passed = False
            for arm in list(replicas):
                verdict = await self._probe(arm, workload, rate_rps)
                probes.append(Probe(arm=arm.name, rate_rps=rate_rps, verdict=verdict))
                if verdict.bounded:
                    passed, best = True, arm.name
                    # Likely the better one at the next rate too; the other is asked if it is not.
                    replicas.sort(key=lambda other, first=arm: other != first)  # type: ignore[misc]
                    break
            search.tell(passed)
        if search.best_rps is None:
            raise StartError(
                f"{workload}: no rate down to {probes[-1].rate_rps:.3g}/s is sustained"
            )
        return FullLoad(rate_rps=search.best_rps, arm=best, probes=probes)

    async def _probe(self, arm: Arm, workload: str, rate_rps: float) -> Verdict:
        requests = plan.probe_of(self._options, workload, rate_rps)
        planned = self._planned(requests, f"probe {rate_rps:.9g}")
        longest_s = max(
            self.recorded.unloaded[task].longest_e2el_s
            for task in WORKLOADS[workload].tasks
            if task in self.recorded.unloaded
        )
        tasks = {request.request_id: request.task for request in requests}
        last_s = max(one.planned_s for one in planned)
        cut = asyncio.Event()
        # A queue that is not empty by then is judged; there is no need to see the end of it.
        timer = asyncio.get_running_loop().call_later(
            last_s + max_drain_s(last_s, longest_s) + 1.0, cut.set
        )
        relay = asyncio.create_task(_relay(self._stop, cut))
        try:
            run, _ = await self._send(arm, await self._urls(arm), planned, cut)
        finally:
            timer.cancel()
            relay.cancel()
        self._check_stop()
        outcomes = run.outcomes
        num_failed = run.num_not_sent + sum(not one.ok for one in outcomes)
        verdict = judge(
            [one.sent_s for one in outcomes],
            [one.end_s for one in outcomes],
            [self._alone_s(tasks[one.request_id], one) for one in outcomes],
            num_failed,
            longest_s,
        )
        word = "bounded" if verdict.bounded else "not bounded"
        self._say(
            f"{workload} at {rate_rps:.3f} req/s on {arm.name}: {word} (backlog grows by "
            f"{verdict.growth_rps:+.2f}/s, drained in {verdict.drain_s:.1f} s)"
        )
        return verdict

    def _alone_s(self, task: str, outcome: Outcome) -> float:
        """About what this request takes on an idle replica."""
        one = self.recorded.unloaded[task]
        return one.ttft_s + (outcome.asked_tokens - 1) * (one.tpot_s or 0.0)

    async def _run_steps(self) -> None:
        todo, num_before = self._todo, len(self.recorded.runs)
        rates = {name: one.rate_rps for name, one in self.recorded.full_load.items()}
        slos = slos_of(self.recorded.unloaded)
        num_all = num_before + len(todo)
        begun_s = time.monotonic()
        expected_s = plan.expected_s(self._options, todo, rates, self.recorded.unloaded)
        self._say(f"{len(todo)} runs, about {expected_s / 60:.1f} min")
        for number, step in enumerate(todo):
            is_next = number > 0 and step.repetition != todo[number - 1].repetition
            if is_next and self._options.restart_servers:
                await self._restart_all()
            run = await self._run(step, rates[step.point.workload], slos)
            self.recorded.runs.append(run)
            self._journal.add(Ended(run=run))
            left_s = plan.expected_s(
                self._options, todo[number + 1 :], rates, self.recorded.unloaded
            )
            done_s = max(1e-9, expected_s - left_s)
            left_s *= (time.monotonic() - begun_s) / done_s
            self._say(
                f"[{num_before + number + 1}/{num_all}] {step.point.workload} at "
                f"{step.point.load:g} #{step.repetition + 1} {step.arm}: "
                f"{run.figures['completed']} answers in {run.figures['duration']:.1f} s; "
                f"about {left_s / 60:.1f} min left"
            )

    async def _run(self, step: Step, full_load_rps: float, slos: Slos) -> Run:
        arm = self._arms[step.arm]
        urls = await self._urls(arm)
        requests = plan.requests_of(self._options, step.point, step.repetition, full_load_rps)
        planned = self._planned(requests, step.salt)
        await unless_stopped(asyncio.sleep(_SETTLE_S), self._stop)
        before = self.fleet.cpu_s()
        run, placed = await self._send(arm, urls, planned, self._stop)
        after = self.fleet.cpu_s()
        self._check_stop()
        used_s = {name: after[name] - before[name] for name in after}
        tasks = {request.request_id: request.task for request in requests}
        devices = [server.devices for server in servers_of(arm, self._options)]
        return Run(
            step=step,
            rate_rps=step.point.load * full_load_rps,
            sample=sample_of(
                run,
                tasks,
                slos,
                work_of(run.outcomes, placed, devices),
                used_s[arm.name],
            ),
            figures=figures_of(run, RAW_METRICS, RAW_PERCENTILES, None),
            records=records_of(requests, run.outcomes) if self._options.save_detailed else None,
            idle_cpu_share=sum(s for name, s in used_s.items() if name != arm.name)
            / max(run.duration_s, 1e-9),
        )

    async def _send(
        self,
        arm: Arm,
        urls: Sequence[str],
        planned: Sequence[Planned],
        stop: asyncio.Event,
    ) -> tuple[LoadRun, Mapping[str, int]]:
        headers = {TRACE_HEADER: "1"} if arm.is_tinfer else {}
        async with open_session(headers, None) as session:
            balancer = Balancer(session, urls, planned)
            with frozen_heap():
                run = await Sender(balancer.as_session(), ENDPOINT).run(planned, stop)
        self._check_stop()
        # A dead server's requests fail at once: no queue, and no answer, would tell of it.
        self.fleet.check()
        return run, balancer.placed

    def _planned(self, requests: Sequence[Request], salt: str) -> list[Planned]:
        return plan_of(requests, self._target, self._tokens, self._bench(salt))

    def _bench(self, salt: str) -> BenchOptions:
        return BenchOptions(salt=salt, temperature=0.0, num_warmups=self._options.num_warmups)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Interrupted


async def _relay(source: asyncio.Event, target: asyncio.Event) -> None:
    await source.wait()
    target.set()
