"""An installed package checks itself, and what is published is what it says."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch

import orthdion
from orthdion import _core, selftest

ROOT = Path(__file__).resolve().parents[1]


def lines(capsys):
    """The verdict of each check."""
    return {line.split()[1]: line for line in capsys.readouterr().out.splitlines()[1:]}


def test_the_selftest_passes_as_a_program_and_says_what_it_skipped():
    done = subprocess.run([sys.executable, "-m", "orthdion.selftest"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = {line.split()[1]: line for line in done.stdout.splitlines()[1:]}
    assert set(said) == {check.__name__ for check in selftest.CHECKS}
    for name, line in said.items():
        assert line.startswith("ok ") or (name == "cupy" and line.startswith("skip ")), line
    if not torch.cuda.is_available():
        assert "no CUDA device" in said["cupy"]


def test_the_selftest_fails_where_the_core_is_wrong(monkeypatch, capsys):
    right = _core.factors

    def wrong(rows, triangle, *rest):
        right(rows, triangle, *rest)
        triangle *= 1.001

    monkeypatch.setattr(selftest, "CHECKS", (selftest.core, selftest.factors))
    assert selftest.main() == 0
    assert lines(capsys)["factors"].startswith("ok ")
    monkeypatch.setattr(_core, "factors", wrong)
    assert selftest.main() == 1
    said = lines(capsys)
    assert said["core"].startswith("ok ") and said["factors"].startswith("FAIL ") and "VT of 300x40" in said["factors"]


@pytest.mark.parametrize("check", ["rust", "checkpoints"])
def test_the_selftest_fails_where_a_step_or_a_checkpoint_is_wrong(check, monkeypatch, capsys):
    from orthdion.selftest import checks

    made = checks.made

    def off(name, *rest, **options):
        params, optimizer = made(name, *rest, **options)
        if name == "lion" and options != {"backend": "torch"}:
            load = optimizer.load_state_dict
            optimizer.param_groups[0]["lr"] *= 1.001
            optimizer.load_state_dict = lambda states: (load(states), optimizer.param_groups[0].update(lr=0.5))
        return params, optimizer

    monkeypatch.setattr(checks, "made", off)
    monkeypatch.setattr(selftest, "CHECKS", (getattr(selftest, check),))
    assert selftest.main() == 1
    said = lines(capsys)[check]
    assert said.startswith("FAIL ") and "lion" in said


def test_the_selftest_fails_where_a_process_does(monkeypatch, capsys, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such thing\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    monkeypatch.setattr(selftest, "CHECKS", (selftest.processes,))
    assert selftest.main() == 1
    assert "status 3: no such thing" in lines(capsys)["processes"]


def test_every_place_tells_the_same_version():
    cargo = re.search(r'^version = "(.+)"', (ROOT / "Cargo.toml").read_text(), re.M)
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cargo and citation and cargo[1] == citation[1] == orthdion.__version__


def test_workflows_try_every_python_that_the_package_names_and_run_nothing_that_can_change():
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    ci, wheels = (ROOT / ".github/workflows" / name for name in ("ci.yml", "wheels.yml"))
    tried = re.search(r"^  test:.*?python: \[(.*?)\]", ci.read_text(), re.M | re.S)
    assert tried and re.findall(r'"(.*?)"', tried[1]) == named
    for text in (ci.read_text(), wheels.read_text()):
        uses = re.findall(r"uses: (\S+)(.*)", text)
        assert uses and all(re.search(r"@[0-9a-f]{40}$", at) and re.match(r" # v\d", note) for at, note in uses)
        assert "\npermissions:\n  contents: read\n" in text and "secrets." not in text


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "tools/audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


METADATA = """Metadata-Version: 2.4
Name: orthdion
Version: 0.1.0
License-Expression: MIT OR Apache-2.0
License-File: LICENSE-MIT
License-File: LICENSE-APACHE
"""


def wheel(folder, platform, core, metadata=METADATA, tag="cp310-abi3"):
    path = folder / f"orthdion-0.1.0-{tag}-{platform}.whl"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("orthdion/py.typed", "")
        packed.writestr("orthdion/_core.abi3.so", core)
        packed.writestr("orthdion-0.1.0.dist-info/METADATA", metadata)
        for name in ("LICENSE-MIT", "LICENSE-APACHE"):
            packed.writestr(f"orthdion-0.1.0.dist-info/licenses/{name}", (ROOT / name).read_text())
    return path


def test_a_wheel_is_refused_for_symbols_newer_than_its_tag(audit, tmp_path):
    core = b"\x7fELF\0GLIBC_2.2.5\0memcpy\0GLIBC_2.%d\0"
    two = "manylinux2014_x86_64.manylinux_2_17_x86_64"
    assert "glibc 2.17" in audit.wheel(wheel(tmp_path, two, core % 17))
    for platform, newest in [(two, 18), ("manylinux_2_28_aarch64", 34)]:
        with pytest.raises(audit.Amiss, match=f"glibc 2.{newest}, which manylinux"):
            audit.wheel(wheel(tmp_path, platform, core % newest))
    assert "glibc 2.28" in audit.wheel(wheel(tmp_path, "manylinux_2_28_aarch64", core % 28))
    with pytest.raises(audit.Amiss, match="this machine only"):
        audit.wheel(wheel(tmp_path, "linux_x86_64", core % 17))


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_the_newest_symbol_is_read_off_a_real_library(audit):
    (core,) = Path(orthdion.__file__).parent.glob("_core*.so")
    assert (2, 2) < audit.newest_glibc(core.read_bytes()) < (3,)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("License-Expression", "License", "License-Expression is None"),
        ("License-File: LICENSE-MIT\n", "", "License-File is"),
    ],
)
def test_a_wheel_is_refused_for_its_licenses(audit, tmp_path, old, new, words):
    with pytest.raises(audit.Amiss, match=words):
        audit.wheel(wheel(tmp_path, "win_amd64", b"", METADATA.replace(old, new)))


def test_a_wheel_for_one_python_only_is_refused(audit, tmp_path):
    with pytest.raises(audit.Amiss, match="not cp310-abi3"):
        audit.wheel(wheel(tmp_path, "win_amd64", b"", tag="cp311-cp311"))


def test_an_sdist_has_all_that_a_build_needs_and_nothing_else(audit, tmp_path):
    def sdist(names):
        with tarfile.open(tmp_path / "orthdion-0.1.0.tar.gz", "w:gz") as packed:
            for name in names:
                content = METADATA.encode() if name == "PKG-INFO" else b""
                info = tarfile.TarInfo(f"orthdion-0.1.0/{name}")
                info.size = len(content)
                packed.addfile(info, BytesIO(content))
        return tmp_path / "orthdion-0.1.0.tar.gz"

    names = [*audit.SOURCES, *audit.LICENSES, "PKG-INFO", "rust/gemm/mod.rs", "python/orthdion/create.py"]
    assert "MIT OR Apache-2.0" in audit.sdist(sdist(names))
    with pytest.raises(audit.Amiss, match=r"Cargo\.lock missing"):
        audit.sdist(sdist([n for n in names if n != "Cargo.lock"]))
    with pytest.raises(audit.Amiss, match=r"README\.md does not belong"):
        audit.sdist(sdist([*names, ".venv/lib/README.md"]))
