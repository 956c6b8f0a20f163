"""Which rows of a batch each of several processes reads."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmjax.parallel.sharding import batch_sharding, make_mesh
from mlmjax.training.run.inputs import assemble, share_of

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "tensor": 8},
    {"data": 2, "tensor": 4},
]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(MESHES), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3), st.randoms())
def test_all_processes_together_count_every_row_once(sizes, processes, times, random):
    """And each has what its devices need, however the devices are dealt out."""
    mesh = make_mesh(sizes)
    owner = [n % processes for n in range(8)]
    random.shuffle(owner)
    rows = 8 * times
    shares = [
        share_of(mesh, rows, process, lambda device: owner[device.id])
        for process in range(processes)
    ]
    counted = np.concatenate([share.rows[share.counts] for share in shares])
    assert sorted(counted) == list(range(rows))
    for device, index in batch_sharding(mesh).devices_indices_map((rows,)).items():
        assert set(np.arange(rows)[index]) <= set(shares[owner[device.id]].rows)
    for share in shares:
        assert (np.diff(share.rows) > 0).all()


@pytest.mark.parametrize("sizes", MESHES)
def test_a_batch_is_put_together_from_the_rows_of_a_process(sizes):
    mesh = make_mesh(sizes)
    whole = {"x": np.arange(48).reshape(16, 3), "y": np.arange(16) * 0.5}
    share = share_of(mesh, 16, 0)
    placed = assemble(jax.tree.map(lambda x: x[share.rows], whole), mesh, share.rows, 16)
    for name, value in whole.items():
        np.testing.assert_array_equal(placed[name], value)
        assert placed[name].sharding == batch_sharding(mesh)
