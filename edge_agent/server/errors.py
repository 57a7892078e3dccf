"""What a client is told when something is wrong, in OpenAI's shape.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.errors import (
    BrokerUnavailable,
    EngineClosed,
    MidspanError,
    NoWorker,
    SettingsError,
    StepRefused,
    TooManySessions,
)

RETRY_AFTER_S = 1
INVALID = "invalid_request_error"
SERVER = "server_error"
UNAVAILABLE: dict[type[MidspanError], str] = {
    NoWorker: "no_worker",
    BrokerUnavailable: "broker_unavailable",
    StepRefused: "step_refused",
    EngineClosed: "shutting_down",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A status and what goes with it. `param` is the field of the request that is wrong."""

    status: int
    message: str
    kind: str = INVALID
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


class RequestFault(MidspanError):
    """A request that cannot be served as it is."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def refuse(message: str, param: str | None, code: str | None = None) -> RequestFault:
    """A 400 that names the field."""
    return RequestFault(Fault(400, message, param=param, code=code))


def busy(message: str) -> Fault:
    """A 429: a bounded queue is full."""
    return Fault(
        429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after_s=RETRY_AFTER_S
    )


def unavailable(message: str, code: str) -> Fault:
    """A 503, after which another try may go well."""
    return Fault(503, message, SERVER, code=code, retry_after_s=RETRY_AFTER_S)


def fault_of(error: BaseException) -> Fault:
    """What an error means for a client. What nobody expected is not told in words."""
    if isinstance(error, RequestFault):
        return error.fault
    if isinstance(error, TooManySessions):
        return busy(str(error))
    if isinstance(error, SettingsError):
        return Fault(400, str(error))
    code = UNAVAILABLE.get(type(error))  # type: ignore[arg-type]
    if code is not None:
        return unavailable(str(error), code)
    if isinstance(error, MidspanError):
        return Fault(500, str(error), SERVER)
    return Fault(500, "the server failed; its log says how", SERVER, code="internal_error")
