"""A worker imports what it computes with, and whoever compiles later compiles as ever."""

from __future__ import annotations

import subprocess
import sys

import pytest
from forks import ROOT

UNUSED = ("torch._dynamo", "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes")
SERVE_TEXT = """
from common.console.processes import set_up_torch
set_up_torch(1)
import cloud_worker.loop.worker
import cloud_worker.serving
import cloud_worker.state.redis_store
from cloud_worker.text.executor import TextExecutor
from cloud_worker.text.self_test import compute_test_rows
from common.protocol.messages import Service
from common.spans.cut import Span
from common.weights.checkpoint import Checkpoint
from common.weights.demo_model import DEMO_TEXT_MODEL, find_model
from common.weights.loading import load_span

model = load_span(Checkpoint(find_model(DEMO_TEXT_MODEL)), Span(2, 6))
service = Service("f" * 16, DEMO_TEXT_MODEL, "2-6", model.hidden, "float32")
compute_test_rows(TextExecutor(model, None), service)
"""
COMPILE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1,
)).eval()
ids = torch.arange(6)[None]
with torch.no_grad():
    want = model(ids, use_cache=False).logits
    got = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
assert torch.equal(got, want)

from torch._dynamo.trace_rules import lookup_callable
print(lookup_callable(type(model).can_record_outputs.fget).__name__)  # it is to be left whole
"""


def run(*parts: str) -> list[str]:
    """The lines that a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(("import sys", *parts))],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.long
def test_a_text_worker_has_no_compiler_and_a_model_compiles_where_it_was_left_out() -> None:
    seen = f"print([name for name in {UNUSED} if name in sys.modules])"
    lines = run(SERVE_TEXT, seen, LIST, COMPILE, seen)
    assert lines == ["[]", "True True True", "TorchInGraphFunctionVariable", str([*UNUSED])]


LIST = """
import transformers.models
from transformers.utils.import_utils import define_import_structure
listed = define_import_structure.__wrapped__(transformers.models.__file__)
want = {
    name for modules in listed.values() for names in modules.values() for name in names
}
print(want <= set(transformers.models.__all__), "LlamaModel" in want, "AutoConfig" in want)
"""


LIGHTLY = """
from common.console.libraries import lightly
with lightly():
    {wanted}
"""
REAL = """
import torch
assert torch._dynamo.__file__
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex, trace_wrapped
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "wanted",
    [
        "import torch; torch.compiler.reset()",
        "from torch._dynamo._trace_wrapped_higher_order_op import trace_wrapped",
        "import torch._dynamo.utils",
    ],
)
def test_a_library_that_wants_more_of_the_compiler_gets_the_compiler(wanted: str) -> None:
    assert run(LIGHTLY.format(wanted=wanted), REAL) == ["2.0"]
