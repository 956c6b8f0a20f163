"""Machines by name, and the devices that their names describe."""

import pytest

from mlmjax.errors import InputError
from mlmjax.training.flops import peak_flops
from mlmjax.training.planning.topology import CHIPS, devices_of, environment, parse_topology


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v9:2x2", "unknown kind 'v9'; the kinds are v4, v5e, v5p, v6e, 7x and cpu"),
        ("", "unknown kind ''"),
        ("v5e", "shape ''"),
        ("v5e:ax2", "shape 'ax2'"),
        ("v5e:02x2", "shape '02x2'"),
        ("v5e:\u0662x2", "expected whole numbers"),  # a digit, but not of ASCII
        ("v6e:0x4", "shape '0x4'"),
        ("v5e:2x2x2", "found 3 sides; a v5e slice has 2"),
        ("v5p:4x4", "found 2 sides; a v5p slice has 3"),
        ("v5e:32x2", "found a side of 32"),
        ("v5e:3x5", "found 3x5; a v5e slice has hosts of 2x2 chips"),
        ("v5p:100x100x100", "found 1000000 chips; a v5p slice has at most 8960"),
        ("cpu:0", "shape '0'"),
        ("cpu:513", "found 513; expected 1 to 512"),
        ("cpu:2x2", "found 2x2; expected 1 to 512"),
    ],
)
def test_an_unknown_topology_is_rejected_with_the_known_ones(name, says):
    with pytest.raises(InputError, match=says) as caught:
        parse_topology(name)
    assert len(caught.value.details) == len(CHIPS) + 2
    assert "16x16" in str(caught.value)


@pytest.mark.parametrize(
    ("libtpu", "message"),
    [
        ("found", "does not know a v5e slice of this shape .no such layout.;"),
        (None, r"pip install '\.\[plan\]' in a clone"),
    ],
)
def test_a_compiler_that_rejects_a_shape_or_is_not_there(monkeypatch, libtpu, message):
    def refuse(**_):
        raise RuntimeError("no such layout\nand pages more")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    monkeypatch.setattr("mlmjax.training.planning.topology.find_spec", lambda name: libtpu)
    with pytest.raises(InputError, match=message):
        devices_of(parse_topology("v5e:2x2"))


def test_every_kind_has_a_peak_and_a_memory():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
    assert set(kinds) | {"7x"} == set(CHIPS)
    for kind, device in {**kinds, "7x": "TPU7x"}.items():
        assert peak_flops(device, "bfloat16") > 1e14
        assert CHIPS[kind].memory > 10 * 2**30


def test_the_environment_of_a_topology(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4 --a=b")
    values = environment(parse_topology("cpu:12"))
    assert values["XLA_FLAGS"] == "--a=b"
    assert values["JAX_NUM_CPU_DEVICES"] == "12"
    assert environment(parse_topology("tpu-v5e:2x2"))["JAX_PLATFORMS"] == "cpu"
