"""Sessions stay with workers of one precision: KV of bfloat16 is not that of float32.

Whoever answers a session first says its precision, and brokers send its steps nowhere else. The
edge remembers it too, and tells a broker that has forgotten.
"""

from __future__ import annotations

from cloud_worker.loop.batcher import Task
from common.errors import ProtocolError
from common.protocol.messages import Service


def check_precision(task: Task, service: Service) -> None:
    """Raise ProtocolError for a session that was begun in another precision."""
    wanted = task.precision
    if wanted and wanted != service.precision:
        raise ProtocolError(
            f"the session was begun in {wanted}; this worker computes in {service.precision}"
        )


def tell_precision(task: Task, service: Service) -> str:
    """What an answer says: nothing once it is known. The first may have been lost on its way."""
    is_first = task.step.position == 0
    return service.precision if is_first or not task.precision else ""
