"""Routes for health, metrics and the web page."""

import asyncio
import time
import urllib.request
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response
from ray import serve

from serve.health import TARGETS
from serve.routes import Errors
from serve.schema import HealthReply, RefusedError
from serve.service import Service

WEB = Path(__file__).parents[1] / "web"


class StatusRoutes:
    """Health, metrics and the web page."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._replicas: dict[str, int] = {}
        self._replicas_at = 0.0
        """Time of that count, on `time.monotonic`."""

    def add_to(self, app: FastAPI, errors: Errors) -> None:
        """Register the routes."""
        not_ready: Errors = {503: {"model": HealthReply}}
        app.add_api_route("/health", self.health, response_model=HealthReply, responses=not_ready)
        app.add_api_route("/metrics", self.prometheus, response_class=PlainTextResponse, responses=errors)
        for path, file in (("/", "index.html"), ("/style.css", "style.css"), ("/page.js", "page.js")):
            app.add_api_route(path, _page(file), include_in_schema=False)

    async def health(self, response: Response) -> HealthReply:
        """Ready; degraded, with the reasons; or not ready (503)."""
        replicas = await self._running_replicas()
        lacking = [name for name, count in replicas.items() if count == 0]
        missed = self._service.window.missed()
        breaker = self._service.pipeline.breaker
        missed += [reason for reason in (breaker.reason, self._service.rejected) if reason]
        # Without a decoder the service still answers from the corpus.
        if [name for name in lacking if name != "Decoder"]:
            status, response.status_code = "not ready", 503
        else:
            status = "degraded" if missed or lacking else "ready"
        return HealthReply(
            status=status,
            release=self._service.release.name,
            reasons=[*(f"no replica of {name} is running" for name in lacking), *missed],
            targets=TARGETS,
            figures=self._service.window.figures(),
            breaker={"open": breaker.open, "times_opened": breaker.times_opened},
            replicas=replicas,
            pending=self._service.pending,
        )

    async def _running_replicas(self) -> dict[str, int]:
        if time.monotonic() - self._replicas_at > 1.0:
            self._replicas_at = time.monotonic()
            app = serve.get_replica_context().app_name
            status = await asyncio.to_thread(serve.status)
            self._replicas = {
                name: sum(n for state, n in d.replica_states.items() if state == "RUNNING")
                for name, d in status.applications[app].deployments.items()
            }
        return self._replicas

    async def prometheus(self) -> PlainTextResponse:
        """This node's metrics of the service, as Ray's agent exports them; for a cluster, scrape the agents."""
        try:
            text = await asyncio.to_thread(_node_metrics)
        except OSError as err:
            raise RefusedError(
                503, f"Ray's metrics agent does not respond ({err}); try again later", 5
            ) from err
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


def _page(file: str) -> Callable[[], Coroutine[Any, Any, FileResponse]]:
    async def page() -> FileResponse:
        return FileResponse(
            WEB / file,
            headers={
                "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
            },
        )

    return page


def _node_metrics() -> str:
    import ray

    mine = ray.get_runtime_context().get_node_id()
    (port,) = [n["MetricsExportPort"] for n in ray.nodes() if n["NodeID"] == mine]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as reply:
        lines = reply.read().decode().splitlines()
    return "\n".join(line for line in lines if "ray_latent_" in line) + "\n"
