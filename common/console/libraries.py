"""Import torch, transformers and diffusers without what midspan never uses of them.

The two model libraries bring in torch's compiler (with sympy), for a few decorators that only a
compiler reads, and torch's distributed tensors, for models that are spread over processes: two
seconds and a hundred megabytes of every process that is to compute a few layers. So while they are
imported here the compiler's decorators wait until the function is called, which is torch's own way
within torch, and transformers hears that what it would import for others is not installed. It also
lists the files of all its models twice, which is half a second.

Nothing is taken away for good. Whoever compiles something later gets the compiler, and whatever
else a new release of a library wants of it while it is imported makes it be imported, as it used
to be. Only commands call this, whose process is midspan's: `import midspan` is left alone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
# where transformers' masks find a class that they need for masks given as functions only
INDEXING = f"{COMPILER}._trace_wrapped_higher_order_op"
# what transformers asks before it imports tensor parallelism, losses and assistants' statistics
ASKED = ("is_torch_distributed_available", "is_scipy_available", "is_sklearn_available")


def import_libraries() -> None:
    """Import what every command needs that computes; a second time does nothing."""
    with lightly():
        import transformers.utils

        asked = transformers.utils.import_utils
        with answering_no(transformers.utils, asked), listing_once(asked):
            import transformers.generation.utils
            import transformers.modeling_utils


def import_diffusers() -> None:
    """Import what every part of an image model needs as well."""
    with lightly():
        from diffusers import UNet2DConditionModel  # noqa: F401


@contextlib.contextmanager
def lightly() -> Iterator[None]:
    """Import what can be; what another release has elsewhere is imported by whoever needs it."""
    with contextlib.suppress(ImportError, AttributeError), uncollected(), without_compiler():
        yield


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is looked for: imports make little, and a million objects to look at."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Have the compiler's decorators do without it until they matter."""
    import torch  # noqa: F401 - which does not import it

    if COMPILER in sys.modules:
        yield
        return
    marks = Marks()
    stand_ins = [
        StandIn(
            COMPILER, disable=disable_later, assume_constant_result=mark_constant,
            allow_in_graph=marks.allow_in_graph,
        ),
        StandIn(INDEXING, TransformGetItemToIndex=index_by_items),
    ]  # fmt: skip
    sys.modules.update({module.__name__: module for module in stand_ins})
    try:
        yield
    finally:
        for module in stand_ins:
            module.leave()
        marks.hand_over()


def disable_later(
    fn: Callable[..., Any] | None = None, recursive: bool = True, **_: Any
) -> Callable[..., Any]:
    """As torch.compiler.disable does it, when `fn` is called."""
    from torch._compile import _disable_dynamo

    return _disable_dynamo(fn, recursive)


def mark_constant(fn: Callable[..., Any]) -> Callable[..., Any]:
    """As torch.compiler.assume_constant_result does it."""
    vars(fn)["_dynamo_marked_constant"] = True
    return fn


def index_by_items() -> Any:
    """Makes what the class of this name makes."""
    return importlib.import_module(INDEXING).TransformGetItemToIndex()


class Marks(MetaPathFinder):
    """Functions that the compiler is to be told of when it is imported."""

    def __init__(self) -> None:
        self._allowed: list[Callable[..., Any]] = []

    def allow_in_graph(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """As torch.compiler.allow_in_graph does it, when there is a compiler."""
        self._allowed.append(fn)
        return fn

    def hand_over(self) -> None:
        """Now, or when somebody imports it."""
        if COMPILER in sys.modules:
            self._tell(sys.modules[COMPILER])
        elif self._allowed:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The compiler's own, which tells it when it is there."""
        if name != COMPILER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                self._tell(module)

            vars(spec.loader)["exec_module"] = execute_and_tell
        return spec

    def _tell(self, compiler: ModuleType) -> None:
        for fn in self._allowed:
            compiler.allow_in_graph(fn)


class StandIn(ModuleType):
    """In a module's place until something is wanted of it that only the module itself has."""

    def __init__(self, name: str, **known: Any) -> None:
        super().__init__(name)
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.leave()
        return getattr(importlib.import_module(self.__name__), name)

    def leave(self) -> None:
        """Make room for the module, unless it is there already."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]


@contextlib.contextmanager
def answering_no(*modules: ModuleType) -> Iterator[None]:
    """Have `modules` answer no to what is asked for the sake of others than midspan."""
    answers = [(module, name, vars(module).get(name)) for module in modules for name in ASKED]
    found = [(module, name, answer) for module, name, answer in answers if answer is not None]
    for module, name, _ in found:
        setattr(module, name, lambda: False)
    try:
        yield
    finally:
        for module, name, answer in found:
            setattr(module, name, answer)


@contextlib.contextmanager
def listing_once(import_utils: Any) -> Iterator[None]:
    """Have the package of all models know what the import of transformers has listed already."""
    usual = import_utils.define_import_structure
    models = Path(import_utils.__file__).parent.parent / "models"

    def define(path: str, prefix: str | None = None) -> dict[Any, dict[str, Any]]:
        if prefix is not None or Path(path) != models / "__init__.py":
            found: dict[Any, dict[str, Any]] = usual(path, prefix)
            return found
        known = usual(models, prefix="models")  # which it remembers
        return {
            needs: {
                name.removeprefix("models."): objects
                for name, objects in modules.items()
                if name.startswith("models.")
            }
            for needs, modules in known.items()
        }

    import_utils.define_import_structure = define
    try:
        yield
    finally:
        import_utils.define_import_structure = usual
