"""A log line is one line, whatever a peer calls itself."""

from __future__ import annotations

import json
import logging

from common.console.log_lines import JsonFormatter, OneLineFormatter


def test_a_name_with_line_breaks_forges_no_line() -> None:
    record = logging.LogRecord(
        "midspan",
        logging.INFO,
        "",
        0,
        "worker %s joined",
        ("w1\n12:00:00 all is \x1b[2Jwell",),
        None,
    )
    line = OneLineFormatter("%(name)s: %(message)s").format(record)
    assert line == r"midspan: worker w1\n12:00:00 all is \x1b[2Jwell joined"


def test_an_exception_keeps_its_lines() -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("midspan", logging.ERROR, "", 0, "a service failed", (), info)
    lines = OneLineFormatter("%(message)s").format(record).splitlines()
    assert lines[0] == "a service failed"
    assert lines[-1] == "ValueError: boom"
    assert len(lines) > 3


def test_a_record_is_one_json_object_exception_and_all() -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("midspan.w", logging.ERROR, "", 0, "%s\nfailed", ("w1",), info)
    (line,) = JsonFormatter().format(record).splitlines()
    read = json.loads(line)
    assert (read["level"], read["logger"], read["message"]) == ("error", "midspan.w", "w1\nfailed")
    assert read["exception"].endswith("ValueError: boom")
    assert read["time"].endswith("Z")
