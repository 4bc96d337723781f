"""The rows of Parquet files, a batch of them at a time."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mllm_jax.data.foreign.report import Entry
from mllm_jax.data.reading import DataError

_BATCH = 16  # rows of Parquet that are in memory together: each may hold several images


def open_parquet(path: Path) -> Any:
    """The `pyarrow.parquet.ParquetFile` of a file.

    Raises:
      DataError: it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Buffered: without, a whole row group's compressed bytes would be read first.
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged or no Parquet file: {error}") from None


def parquet_rows(
    path: Path, group: int, wanted: frozenset[str], leave: Callable[[str, int], None]
) -> Iterator[Entry]:
    """The rows of a row group.

    Args:
      wanted: columns that are read.
      leave: called with the name of a column that is not, and the number of its rows.

    Raises:
      DataError: it is damaged.
    """
    import pyarrow as pa

    file = open_parquet(path)
    names = file.schema_arrow.names
    for name in names:
        if name not in wanted:
            leave(name, file.metadata.row_group(group).num_rows)
    columns = [name for name in names if name in wanted]
    try:
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: row group {group} is damaged: {error}") from None
    finally:
        file.close()
