"""Programs kept on disk: what is damaged there, or cannot be written, costs a compilation."""

import errno
import logging
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dfs_jax.config import programs


@pytest.fixture
def compiled(monkeypatch):
    """Compiles one program as a process does that keeps its own in `folder`; what JAX counted."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    programs._say_once.cache_clear()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    x, counted = jnp.ones((5, 5)), []

    def listen(event, **_):
        if event.startswith("/jax/compilation_cache/cache_"):
            counted.append(event.rpartition("/")[2])

    def compile_in(folder):
        programs.keep(str(folder))
        compilation_cache.reset_cache()
        jax.clear_caches()
        counted.clear()
        assert float(jax.jit(lambda x: (x @ x).sum())(x)) == 125
        return list(counted)

    jax.monitoring.register_event_listener(listen)
    yield compile_in
    jax.monitoring.unregister_event_listener(listen)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("left", [0, 0.5, "foreign"])
def test_a_torn_program_is_compiled_again_once(left, compiled, tmp_path, caplog):
    assert compiled(tmp_path) == ["cache_misses"]
    (entry,) = tmp_path.glob("jit__lambda*-cache")
    whole = entry.read_bytes()
    torn = b"not a program" if left == "foreign" else whole[: int(len(whole) * left)]
    entry.write_bytes(torn)
    other = tmp_path / "README"
    other.write_text("mine")
    assert compiled(tmp_path) == ["cache_misses"]
    assert entry.read_bytes() != torn
    assert compiled(tmp_path) == ["cache_hits"]
    assert other.read_text() == "mine"
    assert not caplog.messages  # it costs a compilation, nothing to tell


def test_a_folder_that_cannot_be_written_is_told_in_one_line(compiled, tmp_path, caplog):
    taken = tmp_path / "file"
    taken.write_text("mine")
    with caplog.at_level(logging.WARNING):
        assert compiled(taken) == []
        assert compiled(taken) == []
    (line,) = caplog.messages
    assert line.startswith(f"compiled programs cannot be kept in {taken}: FileExistsError")
    assert taken.read_text() == "mine"


def test_a_full_disk_is_told_in_one_line(compiled, tmp_path, caplog, monkeypatch):
    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(type(programs.epath.Path(tmp_path)), "write_bytes", full)
        compiled(tmp_path)
    (line,) = caplog.messages
    assert line.endswith(f"kept in {tmp_path}: OSError: [Errno 28] No space left on device")
    assert compiled(tmp_path) == ["cache_misses"]
    assert compiled(tmp_path) == ["cache_hits"]
    assert caplog.messages == [line]


def test_other_warnings_are_shown_as_ever(compiled, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda *said, **_: shown.append(said[0]))
    compiled(tmp_path)
    compiled(tmp_path)
    warnings.showwarning("something else", UserWarning, "file.py", 3)
    assert shown == ["something else"]
