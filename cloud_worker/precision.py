"""Sessions stay with workers of one precision: KV of bfloat16 is not that of float32.

Whoever answers a session first says its precision; the edge puts it into the session's opening,
and brokers send its steps nowhere else.
"""

from __future__ import annotations

from cloud_worker.batcher import Task
from common.errors import ProtocolError
from common.messages import Service


def check_precision(task: Task, service: Service) -> None:
    """Raise ProtocolError for a session that was begun in another precision."""
    wanted = task.opening.precision
    if wanted and wanted != service.precision:
        raise ProtocolError(
            f"the session was begun in {wanted}; this worker computes in {service.precision}"
        )


def tell_precision(task: Task, service: Service) -> str:
    """What an answer says: nothing once the session's opening has it."""
    return "" if task.opening.precision else service.precision
