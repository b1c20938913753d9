"""The race over HTTP: gunicorn as it is deployed, one strategy a service, in front of one upstream that bills.

What was spent is what the upstream says that it billed to an identifier: our own books are not asked. Callers are not
held between check and record, since callers and servers share no barrier. `Plan.think_ms` makes that gap as long as an
application would that does something there.
"""

import http.client
import itertools
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from backends import open_backend
from backends.errors import StoreUnavailable
from backends.money import usd_text
from backends.progress import Progress, no_progress
from backends.store.link import Link
from flaskapp.lab.race import CLOCK, Call, CheckTimes, Plan, RaceResult, Round, Start, Watcher, at_distance, result_of
from flaskapp.lab.servers import Server, UpstreamAccount, billing_upstream
from flaskapp.ops.embedded_redis import EmbeddedServer
from flaskapp.ops.private_files import new_secret
from flaskapp.ops.running_redis import HOST

CHAT = "/api/v1/chat/stream"
INPUT_NANOUSD, OUTPUT_NANOUSD = 1, 100_000
"""Of a token. Input is as good as free, so that what is reserved and what is billed are nearly the same."""
INPUT_ALLOWANCE_NANOUSD = 1_000
"""More than the input of a request can be reserved at."""
AMPLE_USD = "900000"
CALL_SECONDS = 60.0
TIMED_REQUESTS = 50
"""At most; a whole chat each."""


@dataclass(frozen=True, slots=True)
class _Answer:
    is_admitted: bool
    begun_seconds: float
    check_ms: float


def race_over_http(
    names: Sequence[str],
    plan: Plan,
    *,
    rtt_ms: float = 0.0,
    workers: int = 2,
    progress: Progress = no_progress,
    watch: Watcher = lambda _: None,
) -> list[RaceResult]:
    """Race the strategies `names`, each behind a service of its own with that many workers, on a Redis of its own.

    Raises:
        ConfigurationError: a name that is not registered, or a service that did not start.
        StoreError: the Redis or the upstream of the race failed.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tollgate-race-")))
        store = stack.enter_context(EmbeddedServer(directory / "redis", password=new_secret()))
        with closing(Link(store.url, clock=CLOCK)) as link:
            # An unknown name fails here, before a server is started.
            promises = {name: open_backend(name, link).promises_atomicity for name in names}
        account = stack.enter_context(billing_upstream(INPUT_NANOUSD, OUTPUT_NANOUSD))
        url = stack.enter_context(at_distance(store.url, rtt_ms))
        progress("services start", 0, len(names))
        services = {}
        for name in names:
            server = Server(directory / name, workers, plan.think_ms, _environment(name, url, account, plan))
            services[name] = stack.enter_context(server)
        for number, server in enumerate(services.values()):
            server.wait()
            progress("services start", number + 1, len(names))
        racers = [_Http(name, server.port, account, plan, rtt_ms) for name, server in services.items()]
        for racer in racers:
            # A round that does not count: connections, scripts and vocabularies are loaded.
            racer.at_once("warm")
        for number, racer in itertools.product(range(plan.rounds), racers):
            progress(f"{racer.name}: {plan.requests} callers at once, over HTTP", number, plan.rounds)
            watch(racer.run_round(number))
        return [racer.result(progress, promises=promises[racer.name]) for racer in racers]


def _tokens(plan: Plan) -> list[int]:
    """Output tokens of each request. Over HTTP every round has the same, since the limit is the same."""
    return [max(1, round(cost / OUTPUT_NANOUSD)) for cost in plan.costs_nanousd(0)]


def _limit_nanousd(plan: Plan) -> int:
    """Room for any `room` of them, whatever their input is reserved at."""
    costs_nanousd = [tokens * OUTPUT_NANOUSD for tokens in _tokens(plan)]
    return plan.limit_nanousd(costs_nanousd) + plan.room * INPUT_ALLOWANCE_NANOUSD


def _environment(name: str, redis_url: str, account: UpstreamAccount, plan: Plan) -> dict[str, str]:
    return {
        "REDIS_URL": redis_url,
        "THROTTLE_BACKEND": name,
        "ENABLE_COST_THROTTLING": "true",
        "ENABLE_CHALLENGE_RESPONSE": "false",
        "HIGH_COST_THRESHOLD_USD": usd_text(_limit_nanousd(plan)),
        "DAILY_COST_LIMIT_USD": AMPLE_USD,
        "NETWORK_COST_LIMIT_USD": "0",
        "NETWORK_DAILY_COST_LIMIT_USD": "0",
        "HOURLY_SPEND_LIMIT_USD": AMPLE_USD,
        "DAILY_SPEND_LIMIT_USD": AMPLE_USD,
        "CHAT_RATE_LIMIT": "1000000 per minute",
        "LLM_BASE_URL": account.base_url,
        "LLM_PRICE_INPUT_USD_PER_MTOK": f"{INPUT_NANOUSD / 1_000:.3f}",
        "LLM_PRICE_OUTPUT_USD_PER_MTOK": f"{OUTPUT_NANOUSD / 1_000:.3f}",
        "LLM_MAX_TOKENS": str(max(_tokens(plan))),
        # A failure must be seen: it must not open the guard.
        "THROTTLE_ON_ERROR": "closed",
    }


@dataclass(frozen=True, slots=True)
class _Http:
    """The callers of one service."""

    name: str
    port: int
    account: UpstreamAccount
    plan: Plan
    rtt_ms: float
    rounds: list[Round] = field(default_factory=list)

    def run_round(self, number: int) -> Round:
        """All callers at once, on an identifier that is new."""
        who = f"race-{self.name}-{number}"
        calls = self.at_once(who)
        billed_nanousd = self.account.billed_nanousd(who)
        seen = Round(self.name, self.rtt_ms, number, calls, billed_nanousd, _limit_nanousd(self.plan), None)
        self.rounds.append(seen)
        return seen

    def result(self, progress: Progress, *, promises: bool) -> RaceResult:
        """All rounds, and the time of the check."""
        return result_of(
            self.rounds,
            CheckTimes(self._check_times_ms(progress)),
            promises_atomicity=promises,
            was_held=False,
            round_trips_a_request=None,
            measured_by="the upstream's bill",
        )

    def at_once(self, who: str) -> tuple[Call, ...]:
        """The calls of one round."""
        tokens = _tokens(self.plan)
        start = Start(len(tokens))

        def call(number: int) -> Call:
            with closing(self._connection()) as connection:
                connection.connect()
                start.wait(CALL_SECONDS)
                asked_ms = start.elapsed_ms()
                answer = self._ask(connection, who, tokens[number])
            answered_ms = (answer.begun_seconds - start.at_seconds) * 1_000
            cost_nanousd = tokens[number] * OUTPUT_NANOUSD
            return Call(number, cost_nanousd, asked_ms, None, answered_ms, answer.is_admitted)

        with ThreadPoolExecutor(len(tokens), thread_name_prefix="caller") as callers:
            try:
                return tuple(callers.map(call, range(len(tokens))))
            except BaseException:
                # The others would wait for a caller that will not come.
                start.abort()
                raise

    def _check_times_ms(self, progress: Progress) -> list[float]:
        """The service's own word (`Server-Timing`), one caller after another, each with a limit of its own."""
        is_slow = self.rtt_ms or self.plan.think_ms
        of = self.plan.far_timed_requests if is_slow else min(self.plan.timed_requests, TIMED_REQUESTS)
        times_ms = []
        with closing(self._connection()) as connection:
            for number in range(of):
                progress(f"{self.name}: the time of the check", number, of)
                times_ms.append(self._ask(connection, f"timed-{number}", 1).check_ms)
        return times_ms

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, self.port, timeout=CALL_SECONDS)

    def _ask(self, connection: http.client.HTTPConnection, who: str, tokens: int) -> _Answer:
        """One chat, read to its end.

        Raises:
            StoreUnavailable: it was neither admitted nor refused for its cost.
        """
        body = json.dumps({"query": f"{who} asks: what is Litecoin?", "chat_history": [], "max_tokens": tokens})
        headers = {"Content-Type": "application/json", "X-Fingerprint": who}
        try:
            connection.request("POST", CHAT, body, headers)
            response = connection.getresponse()
            begun_seconds = CLOCK.monotonic_seconds()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            raise StoreUnavailable(f"{self.name}: the service of the race hung up ({error})") from error
        if response.status not in {200, 429}:
            raise StoreUnavailable(f"{self.name}: the service of the race answered {response.status}")
        timing = response.headers.get("Server-Timing", "")
        return _Answer(response.status == http.HTTPStatus.OK, begun_seconds, float(timing.partition("dur=")[2] or 0))
