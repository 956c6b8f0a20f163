"""Machines by name, and the devices that their names describe."""

import pytest

from mlmjax.errors import InputError
from mlmjax.training.flops import peak_flops
from mlmjax.training.planning import topology
from mlmjax.training.planning.topology import (
    CHIPS,
    FRACTION,
    GPUS,
    devices_of,
    environment,
    parse_topology,
)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("zzz:2x2", "unknown kind 'zzz'; the kinds are v4, v5e, v5p, v6e, 7x, cpu and GPUs"),
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
        ("v5e-12", "no v5e slice has this number; the numbers are 1, 4, 8, 16, 32, 64, 128, 256"),
        ("v5p-4", "no v5p slice has this number; the numbers are 8, 16, 32"),
        ("v5e:16", "found 1 side; a v5e slice has 2, and a number alone is written v5e-16"),
        ("v5e-16:4x4", "unknown kind 'v5e-16'"),
        ("tpu7x-16", "unknown kind '7x-16'"),
        ("v5litpod-16", "unknown kind 'v5litpod-16'; did you mean 'v5litepod-16'. the kinds"),
        ("v6:2x4", "unknown kind 'v6'; did you mean 'v6e:2x4'. "),
        ("rtx4091", "unknown kind 'rtx4091'; did you mean 'rtx4090'. "),
        ("h2000:8", "unknown kind 'h2000'; did you mean 'h200:8'. "),
        ("a100", "a100 comes with several sizes of memory; give a100-40g or a100-80g"),
        ("a100-24g", "there is no a100 of 24 GB; give a100-40g or a100-80g"),
        ("rtx4090-80g", "there is no rtx4090 of 80 GB; give rtx4090-24g"),
        ("2xh200:8", "found two numbers of GPUs"),
        ("2xh200x4", "found two numbers of GPUs"),
        ("h200:0", "found '0'; expected a number of GPUs, as in h200:8"),
        ("h200:9999", "found 9999 GPUs; expected 1 to 4096"),
        ("v100", "no plan is made for v100, because it is older than that: cuDNN's attention"),
        ("tesla-t4:2", "no plan is made for t4, because"),
        ("mi300x:8", "no plan is made for mi300x, because it is AMD's"),
        ("h200:2x4", "found '2x4'; expected a number of GPUs"),
    ],
)
def test_an_unknown_topology_is_rejected_with_the_known_ones(name, says):
    with pytest.raises(InputError, match=says) as caught:
        parse_topology(name)
    assert len(caught.value.details) == len(CHIPS) + 3
    assert "16x16" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("v5e-16 v5litepod-16 V5E:4x4 tpu-v5-lite-podslice:4x4 v5lite-16 tpu-v5e-16", "v5e:4x4"),
        ("v6e-8 v6e:2x4 tpu-v6e-slice:2x4 trillium-8 Trillium:2x4", "v6e:2x4"),
        ("7x:4x4x4 tpu7x:4x4x4 ironwood:4x4x4", "7x:4x4x4"),
        ("v5p-128 v5p:4x4x4 tpu-v5p-slice:4x4x4", "v5p:4x4x4"),
        ("v4-8", "v4:2x2x1"),
        ("v5e-1", "v5e:1x1"),
        ("h200:8 8xh200 h200x8 H200-141GB:8 h200-141g:8", "h200-141g:8"),
        ("a100-80g A100-80GB a100_80gb nvidia-a100-80g a100-80g:1", "a100-80g:1"),
        ("rtx4090 RTX-4090 4090 rtx_4090 rtx4090-24g", "rtx4090-24g:1"),
        ("h100 h100-80g H100 nvidia-h100-mega-80gb h100-pcie h100-sxm5-80gb", "h100-80g:1"),
        ("h100-nvl:2 h100-94g:2", "h100-94g:2"),
        ("a100-sxm4-40gb nvidia-tesla-a100-40gb", "a100-40g:1"),
        ("l4:4", "l4-24g:4"),
    ],
)
def test_names_that_people_use(names, expected):
    for name in names.split():
        found = parse_topology(name)
        assert found.name == expected
        assert parse_topology(found.name) == found


def test_a_name_with_blanks():
    assert parse_topology(" NVIDIA GeForce RTX 4090 ").name == "rtx4090-24g:1"
    assert parse_topology("A100 80GB").kind == "a100-80g"
    assert parse_topology("RTX A6000").kind == "rtxa6000-48g"
    # As JAX and nvidia-smi write them.
    assert parse_topology("NVIDIA H100 80GB HBM3").kind == "h100-80g"
    assert parse_topology("NVIDIA A100-SXM4-80GB").kind == "a100-80g"


def test_a_gpu_has_the_share_of_its_memory_that_jax_takes(monkeypatch):
    monkeypatch.delenv(FRACTION, raising=False)
    for model, (_, sizes) in GPUS.items():
        for gigabytes in sizes:
            gpu = parse_topology(f"{model}-{gigabytes}g:2")
            assert (gpu.platform, gpu.devices) == ("gpu", 2)
            assert 0.9 < gpu.gpu[1] / (gigabytes * 2**30) < 1.03
            assert gpu.memory == 0.75 * gpu.gpu[1]
    monkeypatch.setenv(FRACTION, "0.9")
    assert parse_topology("h200").memory == 0.9 * 143_771 * 2**20
    for wrong in ("2", "0", "much", "nan"):
        monkeypatch.setenv(FRACTION, wrong)
        with pytest.raises(InputError, match=f"{FRACTION}: found '{wrong}'"):
            _ = parse_topology("h200").memory


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
        assert CHIPS[kind].device == device
        assert peak_flops(device, "bfloat16") > 1e14
        assert CHIPS[kind].memory > 10 * 2**30


class Device:
    """A GPU as JAX describes it."""

    def __init__(self, kind, limit):
        self.device_kind, self.stats = kind, limit and {"bytes_limit": limit}

    def memory_stats(self):
        return self.stats


def test_gpus_of_this_machine_are_found_by_name_and_memory(monkeypatch):
    monkeypatch.delenv(FRACTION, raising=False)
    monkeypatch.setattr("jax.devices", lambda platform: here[platform])
    big, small = 60 * 2**30, 30 * 2**30
    here = {"gpu": [Device("NVIDIA A100-SXM4-80GB", big)] * 2 + [Device("NVIDIA A10G", None)]}
    assert len(devices_of(parse_topology("a100-80g:2"))) == 2
    assert len(devices_of(parse_topology("a100-80g"))) == 1
    assert len(devices_of(parse_topology("a10g"))) == 1
    here["gpu"][0] = Device("NVIDIA A100-SXM4-40GB", small)
    assert len(devices_of(parse_topology("a100-40g"))) == 1
    for lacking in ("a100-80g:2", "a10", "h200", "l4"):
        with pytest.raises(InputError, match="JAX finds no such GPUs in this machine"):
            devices_of(parse_topology(lacking))


def test_a_machine_without_gpus_has_none():
    with pytest.raises(InputError, match="JAX finds no such GPUs in this machine"):
        devices_of(parse_topology("h200"))


def test_gpus_are_looked_for_where_jax_may_use_them(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    installed = {"jax_cuda13_plugin"}
    monkeypatch.setattr(topology, "find_spec", lambda name: name if name in installed else None)
    assert topology.may_have_gpus()
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert topology.may_have_gpus()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not topology.may_have_gpus()
    monkeypatch.setenv("JAX_PLATFORMS", "")
    installed.clear()
    assert not topology.may_have_gpus()


def test_the_environment_of_a_topology(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4 --a=b")
    values = environment(parse_topology("cpu:12"))
    assert values["XLA_FLAGS"] == "--a=b"
    assert values["JAX_NUM_CPU_DEVICES"] == "12"
    assert environment(parse_topology("tpu-v5e:2x2"))["JAX_PLATFORMS"] == "cpu"
    values = environment(parse_topology("h200"))
    assert values["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "JAX_PLATFORMS" not in values
