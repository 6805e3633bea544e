"""The project around the code: what the documents promise is there, and the layers keep apart."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import jtrunc.cli

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "jtrunc").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()


def imported(path: Path) -> set[str]:
    """The modules that a file imports, ``a.b`` with their packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_one_version_everywhere():
    version = PROJECT["version"]
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {version} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_readme_is_short_and_begins_with_code():
    lines = README.splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("```python") for line in lines[:30])


@pytest.mark.slow
def test_readme_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    for code in blocks:
        with jax.enable_x64(False):  # as in a reader's session
            exec(compile(code, "README.md", "exec"), {})


def commands_of_the_readme() -> list[str]:
    blocks = re.findall(r"```(?:sh|console|bash)\n(.*?)```", README, flags=re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    found = commands_of_the_readme()
    assert {"make demo", "make test"} <= set(found)
    for command in found:
        words = [word for word in command.split() if word != "\\"]
        if words[0] == "make":
            assert words[1] in targets, command
        elif words[0] == "jtrunc":
            jtrunc.cli._parse(words[1:])
        elif words[0].startswith("python"):
            assert (ROOT / words[1]).is_file(), command


def test_readme_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_keep_apart(path):
    """Only the adapters know flax; nothing uses what jax keeps private; the core needs no extra."""
    inside, names = path.relative_to(ROOT / "jtrunc"), imported(path)
    packages = {name.partition(".")[0] for name in names}
    assert not any("._src" in name for name in names)
    assert "flax" not in packages or inside.parts[0] == "adapters"
    assert not packages & set(jtrunc.cli.EXTRA) or inside.parts[0] in ("experiments", "cli.py")
    assert len(path.read_text().splitlines()) < 400


def test_the_core_imports_without_the_extra():
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in jtrunc.cli.EXTRA)
    code = f"import sys; {blocked}; import jtrunc, jtrunc.tasks, jtrunc.training; print(jtrunc.System)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "jtrunc.base.System" in done.stdout, done.stderr


def test_importing_jtrunc_starts_no_device_and_changes_no_setting():
    code = (
        "import jax; before = dict(jax.config.values); import jtrunc, jtrunc.cli;"
        "assert dict(jax.config.values) == before; jax.config.update('jax_platforms', 'none-such');"
        "exec('try:\\n jax.devices()\\nexcept RuntimeError:\\n print(1)')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
