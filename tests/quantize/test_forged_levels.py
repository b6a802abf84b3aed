"""Forged archives of the second codec, by the benchmark's forger: a few dozen, with --thorough 1,500."""

import pytest
import torch

from benchmarks.forged_archives import DAMAGED, KINDS, SECTION, Forged, _read, forgeries, honest_archive, read_bounded, rows_of
from quantize.archive import load_archive


@pytest.fixture(scope="module")
def honest():
    return honest_archive()


def test_none_is_accepted_wrongly_and_none_is_over_the_bounds(honest, request):
    files = 1500 if request.config.option.thorough else 24
    readings = read_bounded(honest, files=files, seed=0)
    rows = {row["files"]: row for row in rows_of(readings)}
    assert [row["count"] for row in rows.values()] == [files // 3] * 3 and set(rows) == set(KINDS)
    assert [reading.wrong for reading in readings if reading.wrong] == []
    assert not any(row["over the bounds"] for row in rows.values())
    assert rows[DAMAGED]["refused"] == files // 3
    assert rows[SECTION]["accepted as another network"] > 0  # the forger reaches what valid files hold


def test_what_is_accepted_wrongly_is_told(honest, tmp_path):
    path = tmp_path / "model.huff"
    path.write_bytes(honest)
    reading = _read(path, Forged(DAMAGED, honest, is_invalid=True))
    assert reading.accepted and reading.wrong == "an invalid file is read"
    assert _read(path, Forged(DAMAGED, honest, is_invalid=False)).wrong is None
    assert load_archive(path)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_forgeries_differ_from_the_file_and_are_those_of_their_seed(honest):
    files = list(forgeries(honest, files=30, seed=3))
    assert all(forged.data != honest for forged in files)
    assert files == list(forgeries(honest, files=30, seed=3)) != list(forgeries(honest, files=30, seed=4))
