"""The monitor's figures for Prometheus. The one place that imports prometheus_client."""

from __future__ import annotations

from collections import Counter

from cluster.errors import FabricError
from cluster.fabric.monitor.windows import Window


class PrometheusEndpoint:
    """Serves `http://<this host>:<port>/metrics` from a thread of its own, until `close`.

    It listens on all of the host's interfaces, since who reads it sits elsewhere, and asks nobody for a password: whoever
    reaches the port can read the figures. `notice` says so.
    """

    def __init__(self, port: int) -> None:
        """Raises FabricError where the port is taken, or prometheus_client is not installed."""
        try:
            from prometheus_client import CollectorRegistry, Gauge, start_http_server
        except ImportError as error:
            raise FabricError(
                "fabric.prometheus_port needs prometheus_client: pip install prometheus_client, or unset it"
            ) from error
        registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"mega_{name}", text, labels, registry=registry)

        self._step = gauge("step", "Last step of the last window")
        self._step_s = gauge("step_seconds", "A step with its data")
        self._waited = gauge("wait_seconds", "Standing still for an axis, a step, mean over ranks", "axis")
        self._network = gauge("network_seconds", "What the network takes of a step on an axis", "axis")
        self._late = gauge("late_seconds", "How much later than the first a rank comes to collectives, a step", "rank")
        self._busy = gauge("busy_seconds", "How long a rank works in a step", "rank")
        self._cost = gauge("monitor_cost_ratio", "What this monitor costs, as a share of a step")
        self._findings = gauge("findings", "Findings of this start of the run", "kind")
        self.notice = (
            f"fabric.prometheus_port = {port}: the monitor's figures are served on all interfaces of this host, to whoever "
            "reaches the port"
        )
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            raise FabricError(
                f"fabric.prometheus_port = {port}: cannot listen there ({error.strerror}); choose another port"
            ) from error

    def show(self, window: Window, findings: Counter[str]) -> None:
        """From now on these figures."""
        self._step.set(window.last_step)
        self._step_s.set(window.step_s)
        for axis, times in window.axes.items():
            self._waited.labels(axis).set(times.waited_s)
            self._network.labels(axis).set(times.floor_s)
        for rank, seconds in window.late_s.items():
            self._late.labels(rank).set(seconds)
        for rank, seconds in window.busy_s.items():
            self._busy.labels(rank).set(seconds)
        self._cost.set(window.cost_share)
        for kind, count in findings.items():
            self._findings.labels(kind).set(count)

    def close(self) -> None:
        """Gives the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0)
