"""Attention: every path equals the dense reference, forward and backward, at every edge."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from noisy_models import build, config_of, padded_batch

from mlmjax import ModernBertForMaskedLM
from mlmjax.errors import InputError
from mlmjax.model import attention, blockwise
from mlmjax.model.attention import attend
from mlmjax.model.layers import product
from mlmjax.parallel import sharding


def heads(shape, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))


def segments(length, seed=0):
    """Three rows: packed neighbours with padding behind, padding in front, padding only."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((3, length), np.int32)
    if length > 4:
        first, second = sorted(rng.integers(1, length - 1, 2))
        rows[0, :first], rows[0, first:second], rows[0, second : length - 2] = 1, 2, 3
        rows[1, first:] = 7
    else:
        rows[0], rows[1] = 1, 2
    return jnp.asarray(rows)


def by_hand(query, key, value, segment_ids, window):
    """The definition, row by row, in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros_like(query)
    for b, h, i in np.ndindex(query.shape[:3]):
        if segment_ids is None:
            seen = np.full(query.shape[2], True)
        else:
            ids = np.asarray(segment_ids)[b]
            seen = (ids == ids[i]) & (ids != 0)
        if window is not None:
            seen &= np.abs(np.arange(query.shape[2]) - i) <= window
        if seen.any():
            scores = key[b, h, seen] @ query[b, h, i] / np.sqrt(query.shape[3])
            weights = np.exp(scores - scores.max())
            out[b, h, i] = weights / weights.sum() @ value[b, h, seen]
    return out


def assert_is_dense(implementation, arrays, segment_ids, window, **options):
    """Outputs and gradients are those of the dense path, and zero at padding: one program."""

    def both(*arrays):
        results = []
        for name, more in (("dense", {}), (implementation, options)):
            path = partial(attend, window=window, implementation=name, **more)
            out, pull_back = jax.vjp(lambda *x, path=path: path(*x, segment_ids), *arrays)
            results.append((out, *pull_back(jnp.sin(arrays[2]))))
        return results

    expected, found = jax.jit(both)(*arrays)
    np.testing.assert_allclose(found[0], expected[0], atol=2e-6)
    for a, b in zip(expected[1:], found[1:], strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(b, a, atol=5e-6)
    if segment_ids is not None:
        padding = np.broadcast_to((segment_ids == 0)[:, None, :, None], arrays[0].shape)
        assert not any(np.asarray(array)[padding].any() for array in (*expected, *found))


@pytest.mark.parametrize("window", [None, 0, 3, 40])
@pytest.mark.parametrize("packed", [True, False])
def test_dense_is_the_definition(window, packed):
    q, k, v = heads((3, 2, 17, 4))
    ids = segments(17) if packed else None
    out = attend(q, k, v, ids, window=window, implementation="dense")
    np.testing.assert_allclose(out, by_hand(q, k, v, ids, window), atol=1e-6)


@settings(max_examples=2, deadline=None)
@given(
    length=st.integers(1, 75),
    window=st.none() | st.integers(0, 80),
    packed=st.booleans(),
    seed=st.integers(0, 100),
    where=st.sampled_from(["cpu", "gpu"]),
)
@example(length=75, window=5, packed=True, seed=0, where="cpu")
@example(length=75, window=12, packed=True, seed=0, where="gpu")
@example(length=75, window=None, packed=True, seed=0, where="cpu")
def test_banded_is_dense_at_any_length_and_window(length, window, packed, seed, where):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "is_single_cpu", lambda: where == "cpu")
        patch.setattr(blockwise, "_BLOCK", 8)
        ids = segments(length, seed) if packed else None
        assert_is_dense("banded", heads((3, 2, length, 4), seed), ids, window)


@pytest.mark.parametrize(
    ("where", "length", "window"),
    [
        *(("cpu", 513, 63), ("cpu", 520, 200), ("cpu", 600, None)),
        *(("gpu", 512, 64), ("gpu", 520, 200), ("gpu", 600, None)),
        pytest.param("gpu", 1000, 130, marks=pytest.mark.long),
    ],
)
def test_banded_is_dense_with_its_own_blocks(monkeypatch, where, length, window):
    monkeypatch.setattr(blockwise, "is_single_cpu", lambda: where == "cpu")
    assert_is_dense("banded", heads((3, 1, length, 4)), segments(length), window)


@pytest.mark.parametrize(
    ("implementation", "length", "block"),
    [
        *(("dense", 600, 128), ("banded", 600, 128), ("splash", 384, 128)),
        pytest.param("splash", 512, 256, marks=pytest.mark.long),
    ],
)
def test_window_includes_both_its_ends(request, implementation, length, block):
    """At window 64 a token sees, and sends gradient to, distance 64 but not 65, over blocks too."""
    if implementation == "splash":
        request.getfixturevalue("splash_without_tpu")
    query, key, value = heads((1, 1, length, 64))
    options = {"segment_ids": None, "window": 64, "implementation": implementation, "block": block}
    path = partial(attend, **options)
    at = jax.jit(jax.grad(lambda k, v, row: path(query, k, v)[0, 0, row].sum(), (0, 1)))
    for row in (0, 63, 64, 65, 127, 128, 129, 191, 192, 256, length - 64, length - 1):
        expected = np.abs(np.arange(length) - row) <= 64
        for gradient in at(key, value, row):
            sees = np.asarray(jnp.abs(gradient[0, 0]).sum(axis=-1)) != 0
            np.testing.assert_array_equal(sees, expected)


@pytest.mark.parametrize("implementation", ["dense", "banded", "splash"])
@pytest.mark.parametrize("window", [None, 64])
def test_neighbours_and_padding_do_not_touch(request, implementation, window):
    """Another text, or padding behind it, changes no bit of the first text."""
    if implementation == "splash":
        request.getfixturevalue("splash_without_tpu")
    length, cut, end = 384, 170, 300
    arrays, rows = heads((1, 2, length, 64)), jnp.arange(length)
    ids = jnp.where(rows < cut, 1, jnp.where(rows < end, 2, 0))[None]
    path = jax.jit(partial(attend, window=window, implementation=implementation))
    together = path(*arrays, ids)
    assert not np.asarray(together[:, :, end:]).any()
    for start in (cut, end):
        changed = path(*(x.at[:, :, start:].set(9.0) for x in arrays), ids)
        np.testing.assert_array_equal(together[:, :, :start], changed[:, :, :start])
    if implementation != "splash":
        alone = path(*(x[:, :, cut:end] for x in arrays), jnp.ones((1, end - cut), jnp.int32))
        np.testing.assert_allclose(together[:, :, cut:end], alone, atol=2e-6)


@pytest.mark.parametrize("implementation", ["dense", "banded"])
def test_huge_scores_stay_finite(implementation):
    q, k, v = heads((1, 1, 40, 4))
    path = partial(attend, segment_ids=segments(40)[:1], window=4, implementation=implementation)
    out, grad = jax.jit(jax.value_and_grad(lambda q: path(q, 1e4 * k, v).sum()))(1e4 * q)
    assert np.isfinite(out)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("window", [None, 64])
def test_low_precision_stays_close(window):
    length = 520
    exact = heads((1, 2, length, 16))
    low = [x.astype(jnp.bfloat16) for x in exact]
    ids = segments(length)[:1]
    dense, banded = (
        jax.jit(partial(attend, window=window, implementation=name)) for name in ("dense", "banded")
    )
    expected = dense(*exact, ids)
    for out in (dense(*low, ids), banded(*low, ids)):
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)


def test_local_layers_do_not_score_distant_keys():
    """Products of the banded path grow with the length, those of the dense path with its square."""
    shapes = [jax.ShapeDtypeStruct((1, 2, length, 8), jnp.float32) for length in (512, 2048)]

    def flops(shape, name):
        path = partial(attend, segment_ids=None, window=64, implementation=name)
        compiled = jax.jit(path).lower(shape, shape, shape).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(shapes[1], "banded") < 4.2 * flops(shapes[0], "banded")
    assert flops(shapes[1], "dense") > 12 * flops(shapes[0], "dense")


@pytest.mark.parametrize("window", [None, 2000])
def test_long_rows_never_hold_all_scores(window):
    shape = jax.ShapeDtypeStruct((1, 2, 4096, 8), jnp.float32)
    path = partial(attend, segment_ids=None, window=window, implementation="banded")
    step = jax.jit(jax.grad(lambda q, k, v: path(q, k, v).sum()))
    memory = step.lower(shape, shape, shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.3 * (2 * 4096 * 4096 * 4)


@pytest.fixture
def splash_without_tpu(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "splash", partial(attention.splash, interpret=True))


@pytest.mark.parametrize(
    ("length", "window", "block", "width"),
    [
        *((130, None, 128, 8), (6, 0, 128, 8), (512, 64, 256, 64)),
        pytest.param(512, None, 512, 64, marks=pytest.mark.long),
    ],
)
def test_splash_is_dense(splash_without_tpu, length, window, block, width):
    """Packed neighbours, padding on either side, a row of padding; forward and backward."""
    arrays = heads((3, 2, length, width))
    if width == 64:  # sums of eight times as many products
        arrays = tuple(x * 0.5 for x in arrays)
    assert_is_dense("splash", arrays, segments(length), window, block=block)


def test_splash_runs_on_every_device_of_a_mesh(splash_without_tpu):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 2})
    arrays = heads((2, 4, 128, 8))
    ids = segments(128)[:2]
    alone = attend(*arrays, ids, window=9, implementation="dense")
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
        cut = [jax.device_put(x, spec) for x in arrays]
        path = jax.jit(partial(attend, window=9, implementation="splash"))
        out = path(*cut, ids)
        assert out.sharding.spec[:2] == spec.spec[:2]
    np.testing.assert_allclose(out, alone, atol=2e-6)


def test_auto_lowers_to_the_kernels_of_each_platform(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    q, k, v = heads((2, 2, 256, 64), dtype=jnp.bfloat16)
    ids = segments(256)[:2]

    def lowered(platform, window):
        def loss(q):
            return attend(q, k, v, ids, window=window).astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss)).trace(q).lower(lowering_platforms=(platform,)).as_text()

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    assert "cudnn$fmha" in lowered("cuda", None)
    assert "cudnn" not in lowered("cuda", 16)
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    for window in (None, 16):
        assert "tpu_custom_call" in lowered("tpu", window)


@pytest.mark.parametrize(
    ("implementation", "dtype", "platform", "says"),
    [
        ("flash", jnp.float32, "cpu", "expected one of auto, dense"),
        ("splash", jnp.float32, "cpu", "needs a TPU, and this is cpu"),
        ("cudnn", jnp.bfloat16, "cpu", "needs an NVIDIA GPU, and this is cpu"),
        ("cudnn", jnp.float32, "gpu", "not float32"),
        ("cudnn", jnp.bfloat16, "gpu", "head_dim"),
    ],
)
def test_what_cannot_run_here_is_rejected(monkeypatch, implementation, dtype, platform, says):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    arrays = heads((1, 1, 8, 4), dtype=dtype)
    for window in (None, 2):
        with pytest.raises(InputError, match=says):
            attend(*arrays, None, window=window, implementation=implementation)


def test_mesh_decides_the_platform():
    with jax.set_mesh(sharding.make_mesh({})):
        assert sharding.platform() == "cpu"
    assert sharding.platform() == jax.default_backend()


def dots(jaxpr):
    """Yield every product of a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from dots(inner)


def test_low_precision_products_take_and_sum_as_promised():
    x, y = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5, 6), jnp.float32)

    def loss(x, y):
        out = product("abi,ixy->abxy", x, y)
        assert out.dtype == jnp.float32
        return jnp.sin(out).sum()

    found = list(dots(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, y).jaxpr))
    assert len(found) == 3
    for equation in found:
        assert {v.aval.dtype for v in equation.invars} == {jnp.dtype(jnp.bfloat16)}
        assert equation.outvars[0].aval.dtype == jnp.float32
    # What reads the gradient of a weight, as AdamW does, goes against the grain otherwise.
    assert found[-1].outvars[0].aval.shape == y.shape
    grads = jax.grad(loss, argnums=(0, 1))(x, y)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_what_all_devices_share_is_summed_over_them(dtype):
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    x, y, weight = heads((8, 8))
    x, y, weight = (jnp.round(array * 4) for array in (x, y, weight[:1]))  # exact in either dtype

    def loss(x, y):
        return jax.lax.psum((product("ij,jk->ik", x, y) * weight).sum(), "data")

    shared = jax.shard_map(loss, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    expected = jax.grad(lambda x, y: (x @ y * weight).sum(), argnums=1)(x, y)
    found = jax.jit(jax.grad(shared, argnums=1))(x.astype(dtype), y)
    np.testing.assert_array_equal(found, expected)


def test_a_call_outside_of_jit_compiles_nothing_the_second_time(monkeypatch):
    """Each loop over blocks is its own program there, and must be found again."""
    monkeypatch.setattr(blockwise, "_BLOCK", 8)
    model = build(ModernBertForMaskedLM, config_of())
    ids, _, _ = padded_batch(61)
    compiled = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    model.encode(ids)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        model.encode(ids)
        assert compiled == []
        jax.jit(lambda x: x + 1)(1.0)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
