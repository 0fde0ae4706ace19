"""Parameters that are one of a few words."""

from __future__ import annotations

import pytest

from clipfast.errors import InputError
from clipfast.methods import build_method, parameter_value


@pytest.mark.parametrize(("name", "parameter"), [("grad_eclip", "spatial"), ("tclip", "threshold")])
def test_none_as_it_is_written(name: str, parameter: str) -> None:
    written = build_method(name, {parameter: parameter_value("none")})
    assert written == build_method(name, {parameter: "none"})
    assert getattr(written, parameter) == "none"


def test_none_is_no_choice_elsewhere() -> None:
    with pytest.raises(InputError, match="heads=None is not a choice"):
        build_method("grad_eclip", {"heads": parameter_value("none")})
