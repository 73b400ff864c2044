"""ops/up.py on a real, tiny project: it really makes virtual environments, offline."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

UP = Path(__file__).resolve().parents[2] / "ops" / "up.py"
TOOLS = Path(importlib.import_module("pytest").__file__ or "").parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="compares POSIX paths and signals"),
]

BACKEND = '''
"""A build backend in the tree: no network, no setuptools."""
import pathlib, zipfile
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    root = pathlib.Path(".").resolve()
    if (root / "fail").exists():
        raise RuntimeError((root / "fail").read_text())
    info = "phalanx-0.1.0.dist-info"
    files = {
        "phalanx.pth": f"{root}\\nTOOLS\\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\\nName: phalanx\\nVersion: 0.1.0\\n"
        "Provides-Extra: dev\\nProvides-Extra: net\\n" + (root / "requires").read_text(),
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        f"{info}/entry_points.txt": "[console_scripts]\\nctl = fakectl:main\\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{n},,\\n" for n in files) + f"{info}/RECORD,,\\n"
    name = "phalanx-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / name, "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
    return name
'''

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "phalanx"
version = "0.1.0"
[tool.mypy]
strict = true
packages = ["tests"]
"""

FAKECTL = """
import json, os, sys
def main():
    print(json.dumps({"args": sys.argv[1:], "cwd": os.getcwd(), "python": sys.executable}))
    return 7
"""


class Project:
    """A copy of up.py with a project of three files around it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "ops").mkdir(parents=True)
        (root / "tests").mkdir()
        shutil.copy(UP, root / "ops" / "up.py")
        (root / "pyproject.toml").write_text(PYPROJECT)
        (root / "backend.py").write_text(BACKEND.replace("TOOLS", str(TOOLS)))
        (root / "requires").write_text("")
        (root / "fakectl.py").write_text(FAKECTL)
        (root / "tests" / "test_one.py").write_text(
            "def test_a() -> None:\n    pass\n\n\ndef test_b() -> None:\n    pass\n"
        )

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def popen(self, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
        env |= {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "1"}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_TIMEOUT": "2"}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        return subprocess.Popen(
            [sys.executable, str(self.root / "ops" / "up.py"), *arguments],
            cwd=cwd or "/",
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        with self.popen(*arguments, cwd=cwd) as child:
            out, err = child.communicate(timeout=100)
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)

    def start_works(self) -> str:
        """``start`` reaches ctl; what up.py said on the way."""
        done = self.run("start", "--no-model")
        assert done.returncode == 7, done.stderr
        assert json.loads(done.stdout)["args"] == ["start", "--no-model"]
        return done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Ready to start; every test leaves it so, for making it costs seconds."""
    made = Project(tmp_path_factory.mktemp("with space") / "phalanx")
    first, second = made.popen("start"), made.popen("start")
    try:
        said = [child.communicate(timeout=100)[1] for child in (first, second)]
    finally:
        for child in (first, second):
            child.kill()
            child.wait()
    # two at once: one makes it, the other waits and finds it done
    assert [first.returncode, second.returncode] == [7, 7], said
    assert sorted("making" in text for text in said) == [False, True], said
    assert sum("waiting for it" in text for text in said) == 1, said
    return made


def test_start_reaches_ctl_with_its_arguments_from_any_folder(
    project: Project, tmp_path: Path
) -> None:
    done = project.run("start", "--model", "a b", "--name=x@y", cwd=tmp_path)
    seen = json.loads(done.stdout)
    assert done.returncode == 7
    assert done.stderr == ""  # nothing to do, nothing said
    assert seen["args"] == ["start", "--model", "a b", "--name=x@y"]
    assert seen["cwd"] == str(tmp_path)  # so that `--config my.yaml` means the caller's file
    assert Path(seen["python"]).parent == project.venv / "bin"


def test_a_second_start_costs_less_than_0_3_s(project: Project) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    project.start_works()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # processor time, fakectl's own start included: the clock on the wall also counts neighbours
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_a_venv_without_interpreter_is_made_again(project: Project) -> None:
    for link in (project.venv / "bin").glob("python*"):
        link.unlink()
    (project.venv / "bin" / "python").symlink_to("/nowhere/python")
    assert "its Python does not run" in project.start_works()
    assert project.start_works() == ""


def test_a_venv_that_was_cut_short_is_made_again(project: Project) -> None:
    (project.venv / "phalanx-stamp.json").unlink()
    (project.venv / "phalanx-incomplete").touch()
    assert "cut short" in project.start_works()
    assert project.start_works() == ""


def test_a_broken_pip_and_a_missing_stamp_are_repaired(project: Project) -> None:
    (project.venv / "phalanx-stamp.json").write_text("{half")
    (pip,) = project.venv.glob("lib/python*/site-packages/pip/__main__.py")
    pip.write_text("import half_of_pip")
    assert "its pip does not run" in project.start_works()
    assert project.start_works() == ""


def test_a_healthy_venv_is_kept_when_the_dependencies_change(project: Project) -> None:
    kept = project.venv / "kept"
    kept.touch()
    with (project.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    said = project.start_works()
    assert "installing" in said
    assert "making" not in said
    assert kept.exists()
    (info,) = project.venv.glob("lib/python*/site-packages/phalanx-*.dist-info")
    shutil.rmtree(info)  # someone removed a package by hand
    assert "installing" in project.start_works()
    assert project.start_works() == ""


def test_an_install_without_network_says_so_and_the_next_one_succeeds(project: Project) -> None:
    (project.root / "requires").write_text("Requires-Dist: not-there-at-all==1.0\n")
    (project.venv / "phalanx-stamp.json").unlink()
    try:
        done = project.run("start")
    finally:
        (project.root / "requires").write_text("")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "FAILED while installing the dependencies (status 1)" in done.stderr
    assert "| ERROR: No matching distribution found for not-there-at-all" in done.stderr
    assert "what to do: the package index was not reached: check the network" in done.stderr
    assert "cut short" in project.start_works()


def test_a_full_disk_is_named(project: Project) -> None:
    fail = project.root / "fail"
    fail.write_text("[Errno 28] No space left on device")
    (project.venv / "phalanx-stamp.json").unlink()
    try:
        done = project.run("start")
    finally:
        fail.unlink()
        (project.venv / "phalanx-incomplete").unlink()  # spares the next test a rebuild
    assert done.returncode == 1
    assert "what to do: the disk is full" in done.stderr
    project.start_works()


def test_a_run_that_waits_for_the_lock_can_be_ended(project: Project) -> None:
    import fcntl

    stamp = project.venv / "phalanx-stamp.json"
    text = stamp.read_text()
    stamp.unlink()
    with (project.root / ".venv.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with project.popen("start") as child:
            assert child.stderr is not None
            assert "waiting for it" in child.stderr.readline()
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=20) == 128 + signal.SIGTERM
    stamp.write_text(text)
    assert project.start_works() == ""


def test_test_runs_all_four_checks_and_ends_with_pytests_summary(project: Project) -> None:
    (project.root / "ruff.toml").write_text(
        'extend-exclude = ["backend.py", "fakectl.py", "ops"]\n'
    )
    good = project.run("test", "tests/test_one.py", "-k", "test_b")
    (project.root / "tests" / "test_two.py").write_text("import os\ndef test_c(): pass\n")
    bad = project.run("test")
    assert good.returncode == 0, good.stdout + good.stderr
    assert " 1 passed in " in good.stdout.splitlines()[-1]
    assert bad.returncode == 1
    assert "FAILED: ruff format, ruff check, mypy" in bad.stderr
    assert "3 passed" in bad.stdout.splitlines()[-1]
    assert bad.stderr.splitlines()[-1] == "up: pytest"


def test_bad_usage_is_explained(project: Project) -> None:
    for arguments, status in (((), 2), (("begin",), 2), (("--help",), 0)):
        done = project.run(*arguments)
        assert done.returncode == status
        assert "python3 ops/up.py start" in done.stderr
