"""Options are listed once: the samplers' signatures are made from that list, and their docstring explains each."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from taskgrad.sampling import AdaptiveBatchSampler, AdaptiveSampler
from taskgrad.sampling.options import GUARDS, Options

SAMPLERS = pytest.mark.parametrize("kind", [AdaptiveBatchSampler, AdaptiveSampler])


@SAMPLERS
def test_the_signature_names_every_option_with_its_default(kind: Any) -> None:
    parameters = inspect.signature(kind).parameters
    assert [(name, p.default) for name, p in parameters.items()] == [(f.name, f.default) for f in fields(Options)]
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["task_of_example", "batch_size", "policy", "seed"]
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name not in positional)
    assert next(iter(inspect.signature(kind.__init__).parameters)) == "self"
    hints = get_type_hints(kind.__init__)
    assert set(hints) == {*parameters, "return"} and hints["budget"] == float | None


def test_the_docstring_explains_every_option() -> None:
    arguments = inspect.getdoc(AdaptiveBatchSampler).split("Args:\n")[1].split("\n\n")[0]
    named = re.findall(r"^    (\w+(?:, \w+)*): ", arguments, re.MULTILINE)
    assert sorted(", ".join(named).split(", ")) == sorted(field.name for field in fields(Options))


def test_what_a_policy_may_set_is_off_unless_it_does() -> None:
    defaults = {field.name: field.default for field in fields(Options)}
    assert {name: defaults[name] for name in GUARDS} == dict.fromkeys(GUARDS)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((), {"bugdet": 0.3}, "unexpected keyword argument 'bugdet'"),
        (([0, 1], 2, None, 0, {"a": 1}), {}, "takes from 1 to 5 positional arguments but 6 were given"),
        (([0, 1],), {"task_of_example": [0, 1]}, "multiple values for argument 'task_of_example'"),
    ],
)
def test_arguments_that_are_none(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        AdaptiveBatchSampler(*arguments, **options)


@SAMPLERS
def test_a_class_of_the_users_may_derive_from_it(kind: Any) -> None:
    class Mine(kind):  # type: ignore[misc]
        def __init__(self, extra: int) -> None:
            super().__init__([0, 1, 1], 2, seed=3, num_batches=extra)

    assert list(inspect.signature(Mine).parameters) == ["extra"]
    assert list(Mine(4)) == list(kind(task_of_example=[0, 1, 1], batch_size=2, seed=3, num_batches=4))
