"""Checkpoints: what comes back is what was saved, or it is a clear error."""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtrunc.training import checkpoint
from jtrunc.training.checkpoint import CheckpointError, list_steps, restore, save
from tests.training_cases import assert_same


class Inner(NamedTuple):
    key: jax.Array
    flags: jax.Array


def state_of(seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    return {
        "weights": jnp.asarray(generator.normal(size=(4, 3)), jnp.float32),
        "half": jnp.asarray(generator.normal(size=5), jnp.bfloat16),
        "phasor": jnp.asarray(generator.normal(size=2) * 1j, jnp.complex64),
        "wide": jnp.asarray(generator.normal(size=2), jnp.float64),
        "empty": jnp.zeros((0, 3), jnp.float32),
        "count": jnp.int32(seed),
        "inner": (Inner(jax.random.split(jax.random.key(seed), 2), jnp.array([True, False])), ()),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for update in (10, 20, 30):
        save(tmp_path / "c", update, state_of(update), config_hash="abc", extra={"timesteps": update})
    return tmp_path / "c"


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_every_kind_of_leaf_comes_back(folder: Path) -> None:
    restored = restore(folder, state_of(), config_hash="abc")
    assert restored.update == 30 and restored.extra == {"timesteps": 30}
    assert_same(restored.state, state_of(30))
    assert jax.tree.map(jax.typeof, restored.state) == jax.tree.map(jax.typeof, state_of())
    assert not np.array_equal(restored.state["weights"], state_of(20)["weights"])


def test_a_state_without_any_entries(tmp_path: Path) -> None:
    save(tmp_path, 1, (jnp.zeros((0,)), ()))
    assert_same(restore(tmp_path, (jnp.zeros((0,)), ())).state, (jnp.zeros((0,)), ()))


def test_only_the_newest_are_kept_and_a_step_may_be_written_again(folder: Path) -> None:
    save(folder, 40, state_of(40), keep=2)
    assert list_steps(folder) == [30, 40]
    save(folder, 40, state_of(41), keep=2)
    assert_same(restore(folder, state_of()).state, state_of(41))
    assert sorted(path.name for path in folder.iterdir()) == ["00000030", "00000040"]


@pytest.mark.parametrize("which", range(10))
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_any_damaged_file_means_the_step_before(folder: Path, which: int, damage: str) -> None:
    files = files_of(folder / "00000030")
    victim = files[which % len(files)]
    content = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    elif damage == "cut":
        if not content:
            pytest.skip("an empty file cannot be cut")
        victim.write_bytes(content[: len(content) // 2])
    elif content:
        content[len(content) // 3] ^= 1 << (which % 8)
        victim.write_bytes(content)
    else:
        victim.write_bytes(b"\0")
    with pytest.warns(RuntimeWarning, match="00000030") as record:
        restored = restore(folder, state_of(), config_hash="abc")
    assert len(record) == 1
    assert restored.update == 20
    assert_same(restored.state, state_of(20))


def test_a_damaged_later_step_does_not_count_among_the_newest(folder: Path) -> None:
    """A run that went on from update 20 saves 25 and keeps it, although the damaged 30 is newer."""
    (folder / "00000030" / "manifest.json").write_text("{")
    save(folder, 25, state_of(25), keep=1)
    assert list_steps(folder) == [25, 30]
    with pytest.warns(RuntimeWarning, match="update 25"):
        assert_same(restore(folder, state_of()).state, state_of(25))


def test_an_unfinished_step_is_no_step(folder: Path) -> None:
    shutil.copytree(folder / "00000030", folder / ".unfinished-00000040")
    assert restore(folder, state_of()).update == 30
    save(folder, 50, state_of(50))
    assert not (folder / ".unfinished-00000040").exists()


def test_none_intact_and_none_at_all(folder: Path, tmp_path: Path) -> None:
    for update in list_steps(folder):
        (folder / f"{update:08d}" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is intact"):
        restore(folder, state_of())
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        restore(tmp_path / "nowhere", state_of())


def test_another_configuration_is_an_error_and_no_reason_to_fall_back(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="another configuration"):
        restore(folder, state_of(), config_hash="abd")


@pytest.mark.parametrize(
    ("name", "leaf", "message"),
    [
        ("weights", jnp.zeros((4, 3), jnp.float64), r"float32 \(4, 3\) there and float64 \(4, 3\) here"),
        ("weights", jnp.zeros((4, 4), jnp.float32), r"\['weights'\] is float32 \(4, 3\)"),
        ("count", (jnp.int32(0), jnp.int32(0)), r"\['count'\]"),
        ("extra", jnp.int32(0), r"\['extra'\] is absent there"),
    ],
)
def test_another_structure_or_dtype_is_an_error(folder: Path, name: str, leaf: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        restore(folder, state_of() | {name: leaf})


def test_a_manifest_with_an_edited_hash_is_noticed(folder: Path) -> None:
    path = folder / "00000030" / "manifest.json"
    sealed = json.loads(path.read_text())
    sealed["body"]["content"]["config_hash"] = "abd"
    path.write_text(json.dumps(sealed))
    with pytest.warns(RuntimeWarning, match=r"manifest\.json was changed"):
        assert restore(folder, state_of(), config_hash="abc").update == 20


@pytest.mark.parametrize("place", ["rename", "manifest", "orbax"])
def test_a_full_disk_leaves_the_older_steps(folder: Path, monkeypatch: Any, place: str) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        if place == "rename":
            patched.setattr(os, "replace", full)
        elif place == "manifest":
            patched.setattr(checkpoint, "seal", full)
        else:
            import orbax.checkpoint

            patched.setattr(orbax.checkpoint.Checkpointer, "save", full)
        with pytest.raises(CheckpointError, match=r"update 40 .*No space left.* \[10, 20, 30\] are intact"):
            save(folder, 40, state_of(40))
    assert list_steps(folder) == [10, 20, 30]
    assert sorted(path.name for path in folder.iterdir()) == ["00000010", "00000020", "00000030"]
    assert_same(restore(folder, state_of()).state, state_of(30))


def test_a_missing_orbax_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"pip install 'jtrunc\[experiments\]'"):
        save(tmp_path, 1, state_of())
    assert list(tmp_path.iterdir()) == []


def test_keep_below_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`keep`"):
        save(tmp_path, 1, state_of(), keep=0)


def test_an_intact_folder_gives_no_warning(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert restore(folder, state_of()) is not None
