"""How much memory there is, read from what Linux tells."""

import jax
import pytest

from dfs_jax.ops import memory

MEMINFO = """MemTotal:       32000000 kB
MemFree:         1000000 kB
MemAvailable:    8000000 kB
SwapFree:         500000 kB
"""


class Device:
    platform = "gpu"

    def __init__(self, stats, platform="gpu"):
        self._stats, self.platform = stats, platform

    def memory_stats(self):
        return self._stats


@pytest.mark.parametrize(
    ("devices", "there_are"),
    [
        ([Device({"bytes_limit": 100, "bytes_in_use": 30})], 70),
        (
            [
                Device({"bytes_limit": 100, "bytes_in_use": 30}),
                Device({"bytes_limit": 100, "bytes_in_use": 60}),
            ],
            40,
        ),
        ([Device({"bytes_limit": 100})], 100),
        ([Device({})], None),
        ([Device(None)], None),
        ([Device(None, "cpu")] * 4, 1000),  # they share what the machine has
    ],
)
def test_of_devices(devices, there_are, monkeypatch):
    monkeypatch.setattr(memory, "of_machine", lambda: 4000)
    assert memory.available(devices) == there_are


def test_of_this_machine():
    found = memory.of_machine()  # it changes while others come and go
    assert 10**8 < found < 10**14
    assert memory.available(jax.local_devices()) <= found / 8 * 1.5


def test_of_the_system(tmp_path):
    (tmp_path / "meminfo").write_text(MEMINFO)
    assert list(memory._of_system(tmp_path / "meminfo")) == [8_500_000 * 1024]
    assert list(memory._of_system(tmp_path / "none")) == []
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    assert list(memory._of_system(tmp_path / "meminfo")) == []


def group(path, limit, used, cached, names=("memory.max", "memory.current", "inactive_file")):
    path.mkdir(parents=True, exist_ok=True)
    (path / names[0]).write_text(f"{limit}\n")
    (path / names[1]).write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


def test_of_control_groups(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    group(tmp_path / "fs" / "job", 1000, 700, 100)
    group(tmp_path / "fs" / "job" / "step", "max", 600, 0)
    assert list(memory._of_groups(tmp_path / "fs", own)) == [400]
    group(tmp_path / "fs", 300, 250, 10)  # the root, as a container sees its own
    assert min(memory._of_groups(tmp_path / "fs", own)) == 60
    assert list(memory._of_groups(tmp_path / "nowhere", tmp_path / "nothing")) == []


def test_of_control_groups_of_version_1(tmp_path):
    own = tmp_path / "cgroup"
    own.write_text("5:cpu:/job\n4:memory:/job\n")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group(tmp_path / "fs" / "memory" / "job", 1000, 1700, 100, names)
    assert list(memory._of_groups(tmp_path / "fs", own)) == [0]


def test_words():
    assert memory.in_words(49.2e9) == "49.2 GB"
    assert memory.in_words(310.4e6) == "310 MB"
    assert memory.in_words(5.3e13) == "53,000 GB"


def test_shortages():
    assert memory.is_shortage(MemoryError())
    assert memory.is_shortage(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not memory.is_shortage(jax.errors.JaxRuntimeError("INTERNAL: something"))
    assert not memory.is_shortage(ValueError("RESOURCE_EXHAUSTED"))
