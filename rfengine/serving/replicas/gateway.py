"""The gateway: what clients of several replicas talk to.

It lets in who may come as a single server does, sends each request to the replica that has its session or to
one that has room, and knows no engine. What a client sees is the application of the replicas.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.concurrency import run_in_threadpool
from starlette.routing import WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketClose

from rfengine.serving.access import ClientIdentity
from rfengine.serving.errors import Fault
from rfengine.serving.jobs.store import JobStore
from rfengine.serving.jobs.table import Journal
from rfengine.serving.operations import RequestCount
from rfengine.serving.realtime.endpoint import refuse
from rfengine.serving.replicas.choice import LOST, by_room, named_replica, reachable
from rfengine.serving.replicas.http_relay import HttpRelay, new_session
from rfengine.serving.replicas.merged_metrics import RELAYED, STATES, RequestCounts, merged
from rfengine.serving.replicas.shared_directory import SharedDirectory, this_machine
from rfengine.serving.replicas.table import Replica, ReplicaTable
from rfengine.serving.replicas.websocket_relay import WebSocketRelay
from rfengine.serving.server import ServerOptions, add_access, answer_errors

logger = logging.getLogger(__name__)

_REFRESH_S = 0.25
_DRAINING = Fault("draining", "the server is stopping; try another one", 503, True, 5)
_ITSELF = ClientIdentity(None, "gateway")


class Gateway:
    """The replicas of one data directory, as they were a moment ago, and the way to them.

    The directory's jobs are repaired and locked here, so that no other server takes it. Raises RuntimeError
    where one has it, or it cannot be used.
    """

    def __init__(self, options: ServerOptions, journal: Journal) -> None:
        self.options = options
        self.draining = False
        self.requests = RequestCounts()
        self.relay: WebSocketRelay | None = None  # while the application runs
        self._shared = SharedDirectory(options.data_directory)
        self._store = JobStore(
            options.data_directory / "videos", options.video_bytes, options.file_life_s,
            options.waiting_jobs, journal=journal,
        )  # fmt: skip
        self._table = ReplicaTable(self._shared.table_path, journal)
        self._http: HttpRelay | None = None
        self._replicas: dict[str, Replica] = {}
        self._read_at = 0.0
        self._unreachable: set[str] = set()
        self._asked = 0
        self._machine = this_machine()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Know the replicas during the block, and let go of the directory at its end."""
        options, secret = self.options, self._shared.secret
        async with AsyncExitStack() as stack:
            stack.callback(self._store.close)
            stack.callback(self._table.close)
            session = await stack.enter_async_context(new_session())
            self._http = HttpRelay(session, secret, self._is_silent)
            self.relay = WebSocketRelay(
                session, secret, options.realtime, options.service.idle_s, self._by_room, self._is_silent,
                self._note_refusal,
            )  # fmt: skip
            await self._refresh()
            following = asyncio.create_task(self._follow())
            try:
                yield
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await self._refresh()
            except RuntimeError:
                logger.exception("the table of replicas cannot be read")

    async def _refresh(self) -> None:
        self._replicas = await run_in_threadpool(self._table.replicas)
        self._read_at = time.time()
        for each in self._replicas.values():
            if each.is_gone or reachable(each, self._machine) or each.name in self._unreachable:
                continue
            self._unreachable.add(each.name)
            logger.error(
                "replica %s listens at %s on %s, which %s cannot reach; let replicas listen at their "
                "machines' addresses (replica_host=node)",
                *(each.name, each.address, each.machine, self._machine),
            )

    def _note_refusal(self) -> None:
        """On a thread: the table may be busy for a moment."""
        asyncio.get_running_loop().run_in_executor(None, self._table.note_refusal)

    def _is_silent(self, replica: Replica) -> bool:
        """Whether a replica, by the table as it was last read, has not renewed its lease for twice its time,
        and did not end by itself."""
        known = self._replicas.get(replica.name)
        if known is None or known.load.state == "ended":
            return False
        return known.lease_until + self._table.lease_s <= self._read_at

    def _live(self) -> list[Replica]:
        return [each for each in self._replicas.values() if reachable(each, self._machine)]

    def _by_room(self) -> list[Replica]:
        return by_room(self._live(), self.relay.relayed)

    # What clients ask

    async def websocket(self, websocket: WebSocket) -> None:
        """A realtime session, at the replica with most room."""
        if self.draining:
            await websocket.accept(subprotocol=websocket.scope["state"].get("subprotocol"))
            await refuse(websocket, _DRAINING)
            return
        await self.relay.serve(websocket)

    async def other(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What no route of the gateway's own takes, as ASGI has it."""
        scope["route"] = RELAYED
        if scope["type"] == "websocket":
            await WebSocketClose()(scope, receive, send)
            return
        response = await self.http(Request(scope, receive))
        await response(scope, receive, send)

    async def http(self, request: Request) -> Response:
        """A request: at the replica that has the session it names, else at each in turn."""
        replica = self._replicas.get(named_replica(request.scope["path"]) or "")
        if replica is not None:
            return await self._http.ask(request, [] if replica.is_gone else [replica], LOST)
        live = self._live()
        ready = [each for each in live if each.load.state == "ready"] or live
        self._asked += 1
        at = self._asked % max(1, len(ready))
        return await self._http.ask(request, ready[at:] + ready[:at])

    async def live(self) -> JSONResponse:
        """The event loop answers."""
        return JSONResponse({"status": "live"})

    async def ready(self) -> JSONResponse:
        """Whether a session would be served, by any replica."""
        states = self._states()
        status = next((each for each in ("ready", "warming up", "draining") if states[each]), "warming up")
        if self.draining:
            status = "draining"
        body = {"status": status, "replicas": {state: states[state] for state in STATES}}
        return JSONResponse(body, 200 if status == "ready" else 503)

    def _states(self) -> Counter[str]:
        return Counter(each.condition for each in self._replicas.values())

    async def metrics(self) -> Response:
        """Prometheus's text of all replicas."""
        live = self._live()
        texts = await asyncio.gather(*(self._http.text(each, "/metrics", _ITSELF) for each in live))
        found = {each.name: text for each, text in zip(live, texts, strict=True) if text is not None}
        body = await run_in_threadpool(merged, found, self._states(), self.requests)
        return Response(body, media_type=CONTENT_TYPE_PLAIN_0_0_4)


def create_gateway(options: ServerOptions, journal: Journal = "WAL") -> FastAPI:
    """The application; state.gateway is its Gateway. options: as of a single server; those of sessions and
    jobs are the replicas'. journal: as theirs."""
    gateway = Gateway(options, journal)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with gateway.running():
            yield

    app = FastAPI(title="rfengine", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.gateway = gateway
    app.router.routes.append(WebSocketRoute("/v1/realtime/video", gateway.websocket))
    for path, answer in (("/livez", gateway.live), ("/readyz", gateway.ready), ("/metrics", gateway.metrics)):
        app.add_api_route(path, answer)
    app.router.redirect_slashes = False  # what the replicas redirect they redirect themselves
    app.router.default = gateway.other
    answer_errors(app)
    add_access(app, options)
    app.add_middleware(RequestCount, metrics=gateway.requests)  # outside: refused requests count too
    return app
