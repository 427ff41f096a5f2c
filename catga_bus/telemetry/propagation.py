"""Carries the trace context of OpenTelemetry into the envelope, as a W3C `traceparent`."""

from collections.abc import Callable

from opentelemetry import trace


def current_traceparent() -> str | None:
    """Return the `traceparent` of the current span, or None if there is none.

    Source:
        W3C Trace Context, level 1, section 3.2: `00-<trace id>-<span id>-<flags>`.
    """
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def trace_source() -> Callable[[], str | None] | None:
    """Return where calls take their trace context from: None if no SDK is configured, so that nothing is paid.

    The SDK itself is not imported to find out: that alone takes a third of a second.
    """
    without = (trace.ProxyTracerProvider, trace.NoOpTracerProvider)
    return None if isinstance(trace.get_tracer_provider(), without) else current_traceparent
