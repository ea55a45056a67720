"""`wtool doctor`: versions, devices, room, optional packages, what is wrong and how to mend it.

Nothing heavy is imported for it: versions come from the packages' metadata, torch's build from its version file.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from wtool import __version__, console, options

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# package -> what it unlocks
OPTIONAL: dict[str, str] = {
    "scipy": "bits spread over layers: quantize --bits 3.5, --target-size",
    "gguf": "GGUF files as input and output",
    "sentencepiece": "GGUF files whose tokenizer is a sentencepiece model",
    "datasets": "calibration and training text from datasets of the Hub",
    "peft": "LoRA in distill and in the recovery after a pruning",
    "bitsandbytes": "8-bit optimizers; teachers and LoRA students in 4 bits",
    "tensorboard": "the curves of a training in TensorBoard",
    "deepspeed": "training over several devices by ZeRO",
    "triton": "GPTQ's inner loop as a GPU kernel",
    "ray": "merges and pipelines over many machines",
    "hf-xet": "fast uploads to the Hub, which go on where they stopped",
    "compressed-tensors": "opening quantized outputs in transformers",
    "gptqmodel": "running outputs of the formats gptq and awq",
    "vllm": "serving quantized outputs",
    "llama-cpp-python": "running GGUF outputs",
    "lm-eval": "benchmarks of the outputs by EleutherAI's harness",
}
SCARCE = 5 * 10**9  # bytes free on a disk below which it is told
SCARCE_MEMORY = 2 * 10**9  # bytes


@dataclass(frozen=True)
class Remark:
    """What the user should know, and what to do about it."""

    wrong: bool  # something will fail; otherwise it is only worth knowing
    text: str
    cure: str


@app.command()
def doctor(as_json: options.Json = False) -> None:
    """Tell what this machine has, what is missing, and how to mend it. Exit code 3 where something is wrong."""
    facts = examine()
    remarks = judge(facts)
    if as_json:
        console.emit_json({**facts, "remarks": [asdict(remark) for remark in remarks]})
    else:
        _print(facts, remarks)
    raise typer.Exit(3 if any(remark.wrong for remark in remarks) else 0)


def examine() -> dict[str, Any]:
    """The machine and what is installed, in figures: sizes in bytes, versions as text, None where there is none."""
    required = _requirements()
    return {
        "wtool": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "required": {
            name: {"found": _version(name), "wanted": wanted, "fits": _fits(name, wanted)}
            for name, wanted in required.items()
        },
        "optional": {name: {"found": _version(name), "unlocks": what} for name, what in OPTIONAL.items()},
        "torch_cuda": _torch_build("cuda"),
        "torch_rocm": _torch_build("hip"),
        "devices": _devices(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _memory(),
        "disks": {"here": _disk(Path.cwd()), "hub_cache": _disk(_hub_cache())},
        "hub": {
            "endpoint": os.environ.get("HF_ENDPOINT"),
            "offline": os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
            "token": _has_token(),
        },
    }


def _requirements() -> dict[str, str]:
    """wtool's requirements: package -> range; empty where wtool runs without having been installed."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in metadata.requires("wtool") or []]
    except metadata.PackageNotFoundError:
        return {}
    return {each.name: str(each.specifier) for each in asked if not (each.marker and "extra" in str(each.marker))}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _fits(package: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    found = _version(package)
    return found is not None and SpecifierSet(wanted).contains(found, prereleases=True)


def _torch_build(kind: str) -> str | None:
    """The version of CUDA or ROCm that the installed torch is built for."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{kind}\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return found[1] if found else None


def _devices() -> list[dict[str, Any]]:
    """NVIDIA's GPUs, as the driver tells them, and Apple's."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return [{"name": "Apple GPU (mps)", "memory": None, "free": None, "driver": None}]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total,memory.free,driver_version", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in told.splitlines() if line.strip()]
        return [
            {"name": name, "memory": int(total) << 20, "free": int(free) << 20, "driver": driver}
            for name, total, free, driver in rows
        ]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _memory() -> dict[str, int] | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            told = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in file)}
        return {"total": told["MemTotal"], "available": told["MemAvailable"]}
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _has_token() -> bool:
    """Whether there is a token for the Hub; it is not read."""
    from huggingface_hub import constants

    named = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return named or Path(constants.HF_TOKEN_PATH).is_file()


def _disk(path: Path) -> dict[str, Any]:
    """The room on the disk of a folder, or of the nearest above it that exists."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    usage = shutil.disk_usage(there)
    return {"path": str(path), "total": usage.total, "free": usage.free}


def judge(facts: Mapping[str, Any]) -> list[Remark]:
    """What is wrong or worth knowing, the wrong first."""
    remarks = [*_of_packages(facts), *_of_devices(facts), *_of_room(facts), *_of_hub(facts["hub"])]
    return sorted(remarks, key=lambda remark: not remark.wrong)


def _of_packages(facts: Mapping[str, Any]) -> list[Remark]:
    remarks = []
    for name, entry in facts["required"].items():
        if entry["found"] is None:
            remarks.append(Remark(True, f"{name} is not installed", f"pip install '{name}{entry['wanted']}'"))
        elif not entry["fits"]:
            text = f"{name} {entry['found']} is installed, wtool needs {name}{entry['wanted']}"
            remarks.append(Remark(True, text, f"pip install '{name}{entry['wanted']}'"))
    if not facts["required"]:
        remarks.append(Remark(False, "wtool is not installed, so what it needs is not known", "pip install -e ."))
    return remarks


def _of_devices(facts: Mapping[str, Any]) -> list[Remark]:
    nvidia = [device for device in facts["devices"] if device["driver"]]
    built = facts["torch_cuda"] or facts["torch_rocm"]
    if facts["torch_cuda"] and not nvidia:
        text = f"torch is built for CUDA {facts['torch_cuda']}, and there is no NVIDIA driver (nvidia-smi): CPU only"
        return [Remark(False, text, "install the driver, or torch's smaller CPU build if there is no such GPU")]
    if nvidia and not built:
        text = f"{nvidia[0]['name']} is here, and torch is a CPU build that cannot use it"
        return [Remark(True, text, f"install torch's CUDA build (driver {nvidia[0]['driver']})")]
    return []


def _of_room(facts: Mapping[str, Any]) -> list[Remark]:
    remarks = []
    cures = {"here": "free some, or work on another disk", "hub_cache": "set HF_HOME to a larger disk, or --low-disk"}
    for place, disk in facts["disks"].items():
        if disk["free"] < SCARCE:
            text = f"{disk['path']}: {console.human_bytes(disk['free'])} free of {console.human_bytes(disk['total'])}"
            remarks.append(Remark(True, text, cures[place]))
    memory = facts["memory"]
    if memory and memory["available"] < SCARCE_MEMORY:
        text = f"{console.human_bytes(memory['available'])} of memory available"
        remarks.append(Remark(False, text, "end other programs, or --activations disk for calibrated methods"))
    return remarks


def _of_hub(hub: Mapping[str, Any]) -> list[Remark]:
    remarks = []
    if hub["offline"]:
        remarks.append(Remark(False, "HF_HUB_OFFLINE is set: only what is in the cache can be had", "unset it"))
    if not hub["token"]:
        text = "no token for the Hub: private and gated repositories and `wtool push` need one"
        remarks.append(Remark(False, text, "set HF_TOKEN, or run `hf auth login`"))
    return remarks


def _print(facts: Mapping[str, Any], remarks: Sequence[Remark]) -> None:
    size = console.human_bytes
    memory = facts["memory"]
    lines = {
        "wtool": f"{facts['wtool']}, Python {facts['python']}, {facts['platform']}",
        "packages": ", ".join(f"{name} {entry['found'] or 'missing'}" for name, entry in facts["required"].items()),
        "torch": f"built for CUDA {facts['torch_cuda']}" if facts["torch_cuda"] else f"built for {_other_build(facts)}",
        "processors": str(facts["processors"]),
        "memory": f"{size(memory['available'])} available of {size(memory['total'])}" if memory else "",
    }
    for number, device in enumerate(facts["devices"]):
        room = f", {size(device['free'])} free of {size(device['memory'])}" if device["memory"] else ""
        lines[f"device {number}"] = f"{device['name']}{room}"
    for what, place in (("disk", "here"), ("Hub cache", "hub_cache")):
        disk = facts["disks"][place]
        lines[what] = f"{disk['path']}: {size(disk['free'])} free of {size(disk['total'])}"
    for key, value in lines.items():
        if value:
            console.emit(f"{key:<11} {value}")
    console.emit("\noptional packages, and what each unlocks")
    for name, entry in facts["optional"].items():
        console.emit(f"  {name:<19}{entry['found'] or '-':<12}{entry['unlocks']}")
    console.emit("")
    for remark in remarks:
        console.emit(f"{'problem' if remark.wrong else 'note'}: {remark.text}; {remark.cure}")
    if not any(remark.wrong for remark in remarks):
        console.emit("no problem found")


def _other_build(facts: Mapping[str, Any]) -> str:
    return f"ROCm {facts['torch_rocm']}" if facts["torch_rocm"] else "CPUs"
