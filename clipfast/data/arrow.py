"""pyarrow, which only those need who keep or read parquet."""

from __future__ import annotations

from typing import Any

from clipfast.errors import InputError


def pyarrow() -> tuple[Any, Any]:
    """pyarrow and its parquet module. Raises InputError, with what to install, where it is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("parquet files need pyarrow: pip install 'clipfast[data]'.") from error
    return pyarrow, pyarrow.parquet
