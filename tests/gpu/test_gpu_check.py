"""``make gpu-check``: no fault in a part loses what was found before it, every part's work runs to its end in
miniature, and bars say what the figures say.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benches.gpu.bars import bars
from benches.gpu.cases import MODELS
from benches.gpu.conductor import Part, conduct
from benches.gpu.context import Context
from benches.gpu.page import page
from benches.gpu.part import PLACES, work_of
from benches.gpu.parts.machine import double_instructions
from benches.gpu.parts.tools import counters
from benches.gpu.plan import PARTS, chosen
from benches.gpu.record import Record, rows

ROOT = Path(__file__).parents[2]
#: Programs that find something and then go wrong in some way, and what the record says of them.
FAULTS = {
    "hangs": ("time.sleep(1000)", "timed out"),
    "leaves a process behind": ("found(subprocess.Popen(['sleep', '1000']).pid); time.sleep(1000)", "timed out"),
    "crashes": ("print('Segmentation', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", "killed"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "killed"),
    "raises": ("raise RuntimeError('an illegal memory access')", "failed"),
    "torn": ("f.write(b'{\"part\": '); f.flush(); os.kill(os.getpid(), signal.SIGKILL)", "killed"),
}


def program(path, part, fault):
    """A part's process: a finding, then a fault."""
    return (
        f"import json, os, signal, subprocess, sys, time\nf = open({str(path)!r}, 'ab')\n"
        "def found(value):\n"
        f"    f.write(json.dumps({{'part': {part!r}, 'row': {{'kind': 'found', 'value': value}}}}).encode() + b'\\n')\n"
        f"    f.flush()\nfound({part!r})\n{fault}"
    )


def gone(pid):
    """Whether a process has ended, be it unburied."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_every_part_loses_no_finding(tmp_path, fault):
    what, end = FAULTS[fault]
    names = [p.name for p in PARTS][: 2 if end == "timed out" else None]
    record, limit = Record(tmp_path / "lines.jsonl"), 4.0 if end == "timed out" else 120.0

    def command(part, limit):
        return [sys.executable, "-c", program(record.path, part.name, what)]

    conduct([Part(name, limit, "", 0.0) for name in names], command, record, 60.0, tmp_path / "logs")
    lines = record.read()
    ends = {line["part"]: line for line in lines if "end" in line}
    values = [r["value"] for r in rows(lines, "found")]
    assert [v for v in values if isinstance(v, str)] == names
    assert list(ends) == names and {e["end"] for e in ends.values()} == {end}
    assert all(gone(pid) for pid in values if isinstance(pid, int))
    assert len([v for v in values if isinstance(v, int)]) == (2 if fault.startswith("leaves") else 0)
    said = [f"{e.get('why')} {e['said']}" for e in ends.values()]
    for word in {"crashes": ("SIGSEGV", "Segmentation"), "raises": ("an illegal memory access",)}.get(fault, ()):
        assert all(word in s for s in said)


def test_the_conductors_own_death_loses_nothing_and_the_page_stands(tmp_path):
    code = (
        "import sys; import benches.gpu.plan as plan; from benches.gpu.conductor import Part\n"
        "import benches.gpu.__main__ as m\n"
        "m.chosen = lambda names, dry: (Part('machine', 60, ''), Part('correct', 60, ''))\n"
        "m.sys = type('S', (), {'executable': sys.argv[1]})\n"
        "m.main(['--out', sys.argv[2]])"
    )
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/sh\n# part's name is the fifth word, the record the seventh\n"
        'echo "{\\"part\\": \\"$5\\", \\"row\\": {\\"kind\\": \\"found\\", \\"value\\": 1}}" >> "$7"\n'
        'if [ "$5" = correct ]; then sleep 1000; fi\n'
    )
    fake.chmod(0o700)
    out, environment = tmp_path / "out", {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(fake), str(out)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    found = []
    for _ in range(600):
        found = Record(next(iter(out.glob("*.jsonl")), out)).read() if out.exists() else []
        if len(rows(found, "found")) == 2:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) != 0
    lines = Record(next(out.glob("*.jsonl"))).read()
    assert len(rows(lines, "found")) == 2
    assert [(line["part"], line["end"]) for line in lines if "end" in line] == [("machine", "done")]
    said = next(out.glob("*.md")).read_text()
    assert "| machine | done |" in said and "| correct | not ended |" in said


def test_what_there_is_no_time_for_is_named(tmp_path):
    record, parts = Record(tmp_path / "lines.jsonl"), [Part(name, 100, "") for name in ("machine", "correct")]
    conduct(parts, lambda part, limit: [sys.executable, "-c", ""], record, 0.1, tmp_path)
    found = [(line["part"], line["end"], line["why"]) for line in record.read()]
    assert found == [("machine", "not run", "out of time"), ("correct", "not run", "out of time")]


def test_the_conductor_needs_no_torch():
    code = "import sys; sys.modules['torch'] = sys.modules['orthdion'] = None; import benches.gpu.__main__"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_part_has_its_work_and_misspelt_ones_are_refused(capsys):
    assert list(PLACES) == [p.name for p in PARTS]
    for name in PLACES:
        assert callable(work_of(name))
    assert [p.name for p in chosen("correct,machine")] == ["machine", "correct"]
    with pytest.raises(ValueError, match="--parts llama-9: known are machine, "):
        chosen("llama-9")


#: What each part must have found in miniature: kinds of findings, and how many of each at least.
FINDINGS = {
    "machine": {"machine": 1, "first step": 1, "not run": 1},
    "memcheck": {"rehearsed": 1, "not run": 1},
    "correct": {"check": 10},
    "asynchronous": {"not run": 3},
    "llama-3-8b": {"step": 4},
    "microsoft-dion": {"step": 1},
    "microsoft-dion2": {"not run": 1},
    "torch-muon": {"step": 1},
    "ceilings": {"rates": 1, "product": 8},
    "factors": {"factor": 4},
    "dram": {"rehearsed": 1, "not run": 1},
    "spectra": {"step": 6},
    "forms": {"step": 9},
    "kernels": {"kernel": 8},
    "gpt-2-small": {"step": 3},
    "llama-3.2-1b": {"step": 2},
    "moe": {"step": 2},
    "layers": {"step": 2},
    "cpu-tests": {"check": 1},
}


@pytest.fixture
def peer(tmp_path):
    """A checkout of somebody who has a Dion, and no Dion2."""
    (tmp_path / "peer" / "dion").mkdir(parents=True)
    (tmp_path / "peer" / "dion" / "__init__.py").write_text(
        "import torch\nclass Dion(torch.optim.SGD):\n"
        "    def __init__(self, params, lr, rank_fraction):\n        super().__init__(params, lr=lr)\n"
    )
    yield tmp_path / "peer"
    sys.path[:] = [p for p in sys.path if p != str(tmp_path / "peer")]
    sys.modules.pop("dion", None)


#: Whose program is another part's under another tool.
SAME = ("racecheck", "synccheck")
#: Which do what others do, for longer.
LONG = ("memcheck", "correct", "dram", "spectra", "forms", "llama-3-8b", "llama-3.2-1b", "moe", "cpu-tests")
EACH = [pytest.param(p, marks=pytest.mark.slow) if p in LONG else p for p in PLACES if p not in SAME]


@pytest.mark.parametrize("part", EACH)
def test_every_parts_work_runs_in_miniature(shim, tmp_path, peer, monkeypatch, part):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "python"))
    monkeypatch.chdir(ROOT)
    record = Record(tmp_path / "lines.jsonl")
    context = Context(part, torch.device("cpu"), record, 0.001, peer)
    work_of(part)(context)
    lines = record.read()
    assert not rows(lines, "error"), rows(lines, "error")
    assert [c["name"] for c in rows(lines, "check") if not c["holds"]] == []
    for kind, least in FINDINGS[part].items():
        assert len(rows(lines, kind)) >= least, (kind, lines)
    if part == "microsoft-dion":
        import torch._dynamo.config as dynamo

        assert dynamo.recompile_limit == 4096
        dynamo.recompile_limit = 8  # torch's own


def test_a_part_runs_as_a_process_and_its_page_is_written(tmp_path):
    """The whole way: conductor, child, record, page, bars; the child finds no device and says so."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    command = [sys.executable, "-m", "benches.gpu", "--parts", "ceilings", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "ceilings: failed" in done.stdout or "ceilings: timed out" in done.stdout
    assert "not measured: every check holds" in done.stdout
    page_of = next(tmp_path.glob("*.md")).read_text()
    assert "| ceilings | failed |" in page_of or "| ceilings | timed out |" in page_of


def findings(ours=10.0, dion=50.0, dion2=12.0, adamw=1.0, gpt=2.0, launches=200, second=0.1, drams=30.0):
    """A record's lines with such figures."""

    def step(part, candidate, compute, mode, median, **more):
        times = dict.fromkeys(("median", "low", "high", "host"), median)
        row = {"kind": "step", "candidate": candidate, "compute": compute, "mode": mode, **times, **more}
        row |= {"model": "Llama-3-8B", "layers": 4, "fraction": 1 / 8}
        return {"part": part, "row": row}

    counted = {"kernels": launches - 20, "products": 20}
    rates = {"copy": 3000.0, "float32": 5e4, "tf32": 4e5, "bfloat16": 8e5, "float64": 5e4}
    return [
        step("llama-3-8b", "orth-dion", "bfloat16", "eager", 3 * ours, launches=counted),
        step("llama-3-8b", "orth-dion", "bfloat16", "captured", ours),
        step("microsoft-dion", "microsoft/dion Dion", None, "eager", dion),
        step("microsoft-dion2", "microsoft/dion Dion2", None, "captured", dion2),
        step("gpt-2-small", "torch.optim.AdamW fused", None, "captured", adamw),
        step("gpt-2-small", "orth-dion", "bfloat16", "captured", gpt),
        {"part": "ceilings", "row": {"kind": "rates", **rates}},
        {"part": "machine", "row": {"kind": "first step", "first": 1.0 + second, "second": second}},
        {"part": "dram", "row": {"kind": "dram in all", "bytes_an_entry": drams}},
        {"part": "correct", "row": {"kind": "check", "name": "equals", "holds": True, "said": ""}},
    ]


def test_bars_say_what_the_figures_say():
    assert [b.met for b in bars(findings())] == [True] * 8
    assert [b.met for b in bars([])] == [None] * 8
    for change, which in (
        ({"dion": 39.0}, 1),
        ({"dion2": 9.9}, 2),
        ({"ours": 11.5}, 3),
        ({"gpt": 2.6}, 4),
        ({"drams": 33.0}, 6),
        ({"launches": 301}, 7),
    ):
        met = [b.met for b in bars(findings(**change))]
        assert met[which] is False and met.count(False) == 1, change
    wrong = [*findings(), {"part": "correct", "row": {"kind": "check", "name": "bits", "holds": False, "said": ""}}]
    assert bars(wrong)[0].met is False and "not bits" in bars(wrong)[0].figures
    assert "MISSED" in page(wrong)


def test_the_floor_is_the_longer_of_bytes_and_products():
    cases = importlib.import_module("benches.gpu.cases")
    model, candidate = MODELS["llama-3-8b"].with_layers(1), cases.ours("orth-dion", 1 / 8, "bfloat16")
    rates = {"copy": 1.0, "bfloat16": 1e9, "tf32": 1e9}
    assert candidate.floor(model, rates) == pytest.approx(20e-6 * model.entries)
    products = sum(8 * m * n * (min(m, n) // 8) + 2 * (m + n) * (min(m, n) // 8) ** 2 for m, n in model.matrices)
    assert candidate.floor(model, {"copy": 1e9, "bfloat16": 1.0, "tf32": 1.0}) == pytest.approx(products / 1e6)


def test_instructions_and_counters_are_read_from_what_the_tools_print():
    sass = "\tFunction : multiply\n  /*0010*/ DMMA.884 R4, R2 ;\n /*0020*/ DFMA R4, R2 ;\n  /*0030*/ FFMA R1, R2 ;\n"
    sass += "\tFunction : keep\n /*0010*/ MUFU.RSQ64H R1, R2 ;\n"
    assert double_instructions(sass) == {"multiply": {"DMMA": 1, "DFMA": 1}, "keep": {"MUFU.RSQ64H": 1}}
    read, hits = "dram__bytes_read.sum", "lts__t_sector_hit_rate.pct"
    lines = [
        "==PROF== Connected",
        f'"ID","Kernel Name","{read}","{hits}","gpu__time_duration.sum"',
        '"","","Mbyte","%","us"',
    ]
    lines += ['"0","form","1,001.5","50","2"', '"1","form","0.5","70","4"', '"2","apply","1","10","1"']
    found = counters(lines)
    assert found["form"][read] == pytest.approx(1002e6) and found["apply"][read] == pytest.approx(1e6)
    assert found["form"][hits] == pytest.approx(60.0) and found["form"]["launches"] == 2
    assert found["form"]["gpu__time_duration.sum"] == pytest.approx(6e-3)
