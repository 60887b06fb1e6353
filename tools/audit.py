"""Whether what is about to be published is what it says: ``python tools/audit.py dist/*``.

Of a wheel: its tags, its licenses, and on Linux the newest glibc that its core asks for; then auditwheel and abi3audit
are asked, too. Of an sdist: that all is there that a build needs. Exits with 1 and a reason if anything is amiss.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

LICENSES = {"LICENSE-MIT", "LICENSE-APACHE"}
SOURCES = {
    "python/orthdion/py.typed",
    "Cargo.toml",
    "Cargo.lock",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "rust/lib.rs",
}
#: Older names of manylinux tags, by the glibc that they allow.
ALIASES = {"2014": (2, 17), "2010": (2, 12), "1": (2, 5)}


class Amiss(Exception):
    """What is wrong with a file."""


def newest_glibc(core: bytes) -> tuple[int, ...]:
    """The newest symbol version that an ELF file names; the names stand in its string table."""
    found = re.findall(rb"\0GLIBC_(\d+(?:\.\d+)+)(?=\0)", core)
    return max((tuple(map(int, v.split(b"."))) for v in found), default=(0,))


def allowed_glibc(platform: str) -> tuple[int, int] | None:
    """The newest glibc that a platform tag promises to do with; None for what is no manylinux tag."""
    if match := re.fullmatch(r"manylinux_(\d+)_(\d+)_\w+", platform):
        return int(match[1]), int(match[2])
    match = re.fullmatch(r"manylinux(1|2010|2014)_\w+", platform)
    return ALIASES[match[1]] if match else None


def metadata(text: bytes, names: set[str]) -> str:
    """Name, version and licenses of METADATA or PKG-INFO; the files that it names are among ``names``."""
    said = message_from_bytes(text)
    if said["License-Expression"] != "MIT OR Apache-2.0":
        raise Amiss(f"License-Expression is {said['License-Expression']!r}")
    files = set(said.get_all("License-File") or ())
    if files != LICENSES or not all(any(n.endswith(f"/{f}") for n in names) for f in files):
        raise Amiss(f"License-File is {sorted(files)}, in a package of {sorted(n for n in names if 'LICENSE' in n)}")
    return f"{said['Name']} {said['Version']}, {said['License-Expression']}"


def wheel(path: Path) -> str:
    """Looks into a wheel.

    Raises:
        Amiss: saying what is wrong.
    """
    _, _, python, abi, platforms = path.name.removesuffix(".whl").split("-")
    if (python, abi) != ("cp310", "abi3"):
        raise Amiss(f"the tag is {python}-{abi}, not cp310-abi3")
    with zipfile.ZipFile(path) as packed:
        names = set(packed.namelist())
        (info,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        words = metadata(packed.read(info), names)
        cores = [n for n in names if re.fullmatch(r"orthdion/_core(\.abi3\.so|\.pyd)", n)]
        if len(cores) != 1 or "orthdion/py.typed" not in names:
            raise Amiss(f"one compiled core and py.typed should be there, not {cores}")
        newest = newest_glibc(packed.read(cores[0]))
    for platform in platforms.split("."):
        allowed = allowed_glibc(platform)
        if platform.startswith("linux"):
            raise Amiss(f"{platform} is a tag for this machine only")
        if allowed is not None and newest > allowed:
            raise Amiss(f"the core asks for glibc {'.'.join(map(str, newest))}, which {platform} does not promise")
    return f"{words}, glibc {'.'.join(map(str, newest))}" if "linux" in platforms else words


def sdist(path: Path) -> str:
    """Looks into an sdist, and raises as :func:`wheel`."""
    with tarfile.open(path) as packed:
        names = {n.partition("/")[2]: n for n in packed.getnames()}
        if missing := (SOURCES | LICENSES) - names.keys():
            raise Amiss(f"{', '.join(sorted(missing))} missing")
        known = re.compile(r"(python/orthdion|rust)/[\w/]+\.(pyi?|cu|cuh|rs)")
        if more := [n for n in names if not known.fullmatch(n) and n not in SOURCES | LICENSES | {"PKG-INFO"}]:
            raise Amiss(f"{more[0]} does not belong there")
        info = packed.extractfile(names["PKG-INFO"])
        assert info is not None
        return metadata(info.read(), set(names.values()))


def ask(*command: str) -> str:
    """Has another program look, and returns its words."""
    done = subprocess.run([sys.executable, "-m", *command], check=False, capture_output=True, text=True)
    if done.returncode:
        raise Amiss(f"{command[0]}: {(done.stdout + done.stderr).strip()}")
    return " ".join(done.stdout.split())


def main(paths: list[Path]) -> int:
    """Audits every file; 1 if any is amiss or none is there."""
    status = 0 if paths else 1
    for path in paths:
        try:
            if path.suffix == ".whl":
                words = wheel(path)
                tag = path.stem.rpartition(".")[2]
                if "linux" in tag and f'platform tag: "{tag}"' not in (said := ask("auditwheel", "show", str(path))):
                    raise Amiss(f"auditwheel: {said}")
                ask("abi3audit", "--strict", str(path))
            else:
                words = sdist(path)
        except Amiss as why:
            words, status = f"AMISS: {why}", 1
        print(f"{path.name}: {words}")
    return status


if __name__ == "__main__":
    sys.exit(main([Path(p) for p in sys.argv[1:]]))
