"""The Hub, imitated on this machine (tests/hub_server.py): what is fetched, and what is said when it fails."""

import errno
import json
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.numpy import save_file

from wtool.checkpoint.folder import open_local
from wtool.checkpoint.hub import download, open_downloaded, open_remote
from wtool.checkpoint.resolve import local_folder, open_checkpoint
from wtool.errors import DiskFull, MalformedFile, MissingInput, OutputError, RuntimeProblem, UsageError, WtoolError

SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json", "modeling_tiny.py", "README.md")


def write(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def small_files() -> dict[str, str]:
    return {name: "{}" if name.endswith(".json") else f"# {name}\n" for name in SMALL}


def tensors(shard: int, rows: int = 64) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(shard)
    return {f"model.layers.{shard}.{n}.weight": generator.random((rows, 32), dtype=np.float32) for n in "abc"}


def sharded(folder: Path, shards: int = 3, rows: int = 64) -> Path:
    """A model in shards, with all that a repository may hold besides."""
    write(folder, small_files())
    weight_map: dict[str, str] = {}
    for shard in range(1, shards + 1):
        name = f"model-{shard:05}-of-{shards:05}.safetensors"
        save_file(tensors(shard, rows), folder / name)
        weight_map |= dict.fromkeys(tensors(shard, rows), name)
    write(folder, {"model.safetensors.index.json": json.dumps({"weight_map": weight_map})})
    return folder


def single(folder: Path, seed: int = 1) -> Path:
    write(folder, small_files())
    save_file(tensors(seed), folder / "model.safetensors")
    return folder


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def said(error: type[WtoolError], reference: str, opener: Any = download) -> str:
    """The error's text, which must be one line that begins with the reference."""
    with pytest.raises(error) as caught:
        opener(reference)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(reference)
    return text


# --- what is downloaded


def test_only_what_is_needed_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    source = sharded(tmp_path / "source")
    wanted = names(source)
    surplus = {
        "pytorch_model.bin": "x",
        "pytorch_model.bin.index.json": "{}",
        "consolidated.safetensors": "x",
        "consolidated.00.pth": "x",
        "original/consolidated.00.pth": "x",
        "original/model.safetensors": "x",
        "onnx/model.onnx": "x",
        "flax_model.msgpack": "x",
        "tf_model.h5": "x",
        "training_args.bin": "x",
        "optimizer.pt": "x",
        "tiny.Q4_K_M.gguf": "x",
        "left-over.safetensors": "x",
        "picture.png": "x",
    }
    commit = hub.add("acme/tiny", write(source, surplus))

    folder = download("acme/tiny")

    assert names(folder) == wanted
    assert folder.name == commit
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in wanted)


@pytest.mark.parametrize(
    ("held", "taken"),
    [
        ({"model.safetensors", "pytorch_model.bin", "a.gguf"}, {"model.safetensors"}),
        ({"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors"},
         {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}),
        ({"pytorch_model.bin", "training_args.bin", "a.gguf"}, {"pytorch_model.bin"}),
        ({"pytorch_model-00001-of-00001.bin", "optimizer.bin"}, {"pytorch_model-00001-of-00001.bin"}),
        ({"tiny.gguf"}, {"tiny.gguf"}),
        ({"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "training_args.bin"},
         {"adapter_config.json", "adapter_model.safetensors"}),
        ({"adapter_config.json", "adapter_model.bin"}, {"adapter_config.json", "adapter_model.bin"}),
    ],
)  # fmt: skip
def test_the_weights_come_in_one_format(hub: HubServer, tmp_path: Path, held: set[str], taken: set[str]) -> None:
    hub.add("acme/tiny", write(tmp_path / "source", dict.fromkeys(held | {"config.json"}, "{}")))
    assert names(download("acme/tiny")) == taken | {"config.json"}


def test_shards_of_bin_follow_their_index(hub: HubServer, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}})
    files = {
        "pytorch_model.bin.index.json": index,
        "pytorch_model-00001-of-00001.bin": "x",
        "pytorch_model_old.bin": "x",
    }
    hub.add("acme/tiny", write(tmp_path / "source", files))
    assert names(download("acme/tiny")) == set(files) - {"pytorch_model_old.bin"}


def test_nothing_is_fetched_twice(hub: HubServer, tmp_path: Path) -> None:
    hub.add("acme/tiny", sharded(tmp_path / "source"))
    first = download("acme/tiny")
    hub.requests.clear()
    assert download("acme/tiny") == first
    assert [request.path for request in hub.requests] == ["/api/models/acme/tiny"]


def test_an_opened_download_knows_its_name_and_commit(hub: HubServer, tmp_path: Path) -> None:
    source = sharded(tmp_path / "source")
    commit = hub.add("acme/tiny", source)
    checkpoint = open_checkpoint("acme/tiny@main")
    assert (checkpoint.label, checkpoint.revision) == ("acme/tiny@main", commit)
    assert checkpoint.tensors == open_local(source, "").tensors
    assert open_local(source, "").revision is None


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, tmp_path: Path) -> None:
    old = hub.add("acme/tiny", single(tmp_path / "source", seed=1))
    new = hub.add("acme/tiny", single(tmp_path / "source", seed=2))
    tag = hub.add("acme/tiny", single(tmp_path / "source", seed=3), branch="refs/pr/4")
    assert download("acme/tiny").name == new
    assert download(f"acme/tiny@{old}").name == old
    assert download("acme/tiny@refs/pr/4").name == tag
    assert open_downloaded(f"acme/tiny@{old}").tensors.keys() == tensors(1).keys()
    assert open_remote("acme/tiny@refs/pr/4").tensors.keys() == tensors(3).keys()


def test_a_push_between_the_requests_is_noticed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    hub.add("acme/tiny", single(tmp_path / "source", seed=1))
    true, pushed = huggingface_hub.snapshot_download, []

    def push_first(*args: Any, **kwargs: Any) -> str:
        if not kwargs.get("local_files_only") and not pushed:
            pushed.append(hub.add("acme/tiny", single(tmp_path / "source", seed=2)))
        return true(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", push_first)
    checkpoint = open_downloaded("acme/tiny")
    assert checkpoint.revision == pushed[0]
    assert checkpoint.tensors.keys() == tensors(2).keys()


def test_a_dropped_connection_is_taken_up_where_it_was(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # huggingface_hub keeps whole chunks, else of 10 MB
    source = single(tmp_path / "source")
    hub.add("acme/tiny", source)
    size = (source / "model.safetensors").stat().st_size
    hub.drop("model.safetensors")

    folder = download("acme/tiny")

    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    kept = size // 2 // 4096 * 4096
    assert [request.range for request in hub.fetched("model.safetensors")] == [None, f"bytes={kept}-"]
    assert hub.sent("model.safetensors") == size // 2 + size - kept


def test_after_a_lost_connection_the_same_call_fetches_what_is_missing(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sharded(tmp_path / "source")
    hub.add("acme/tiny", source)
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.drop("model-00003-of-00003.safetensors", times=10**9)
    text = said(RuntimeProblem, "acme/tiny")
    assert "no connection to the Hub" in text and "run it again" in text

    hub.drops.clear()
    hub.requests.clear()
    folder = download("acme/tiny")
    assert {r.path.rpartition("/")[2] for r in hub.fetched(".safetensors")} == {"model-00003-of-00003.safetensors"}
    assert open_local(folder, "").tensors == open_local(source, "").tensors


def test_the_token_goes_to_the_hub_alone(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("acme/secret", sharded(tmp_path / "source"), token="hf_mine")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    open_remote("acme/secret")
    download("acme/secret")
    elsewhere = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert elsewhere and all(request.token is None for request in elsewhere)
    assert all(request.token == "hf_mine" for request in hub.requests if not request.path.startswith("/cdn/"))


# --- adapters


def test_an_adapter_is_downloaded_as_a_folder(hub: HubServer, tmp_path: Path) -> None:
    source = write(tmp_path / "source", {"adapter_config.json": "{}", "README.md": "", "optimizer.pt": "x"})
    save_file(tensors(1), source / "adapter_model.safetensors")
    hub.add("acme/lora", source)
    folder = local_folder("acme/lora")
    assert names(folder) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    for opener in (open_downloaded, open_remote):
        assert "BASE+acme/lora" in said(MissingInput, "acme/lora", opener)


# --- offline


def test_offline_the_cache_does(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("acme/tiny", sharded(tmp_path / "source"))
    online = download("acme/tiny")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download("acme/tiny") == download(f"acme/tiny@{commit}") == online
    assert open_downloaded("acme/tiny").revision == open_remote("acme/tiny").revision == commit
    assert hub.requests == []


@pytest.mark.parametrize("how", ["refused", "down"])
def test_where_the_hub_cannot_be_reached_the_cache_does(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    commit = hub.add("acme/tiny", sharded(tmp_path / "source"))
    online = download("acme/tiny")
    if how == "refused":
        hub.stop()
    hub.down = 503
    assert download("acme/tiny") == online
    assert f"the Hub cannot be reached; using commit {commit} from the cache" in caplog.text


def test_offline_and_not_in_the_cache(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for opener in (download, open_downloaded, open_remote):
        text = said(MissingInput, "acme/tiny@v1", opener)
        assert "HF_HUB_OFFLINE" in text and constants.HF_HUB_CACHE in text


@pytest.mark.parametrize("lost", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_offline_a_part_is_not_taken_for_the_whole(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    hub.add("acme/tiny", sharded(tmp_path / "source"))
    folder = download("acme/tiny")
    (folder / lost).unlink()
    if "index" in lost:
        (folder / "model-00003-of-00003.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not complete in the local cache" in said(MissingInput, "acme/tiny")


# --- headers alone


def test_headers_alone_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    source = sharded(tmp_path / "source", rows=4096)  # 1.5 MB a shard
    commit = hub.add("acme/tiny", source)
    here = open_local(source, "acme/tiny")

    remote = open_checkpoint("acme/tiny", headers_only=True)

    assert remote.tensors == here.tensors
    assert list(remote.tensors) == list(here.tensors)
    assert (remote.label, remote.revision, remote.config) == ("acme/tiny", commit, {})
    assert remote.nbytes == here.nbytes > 4_000_000
    assert [(f.name, f.size, f.header) for f in remote.identity()] == [
        (f.name, f.size, f.header) for f in here.identity()
    ]
    shards = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert [(r.method, r.range, r.sent) for r in shards] == [("GET", "bytes=0-99999", 100_000)] * 3
    assert {r.path.rpartition("/")[2] for r in hub.fetched() if "/resolve/" in r.path} == {
        "config.json",
        "model.safetensors.index.json",
    }
    with pytest.raises(MissingInput, match=r"acme/tiny/model-00001-of-00003.safetensors: only the header was fetched"):
        remote.read("model.layers.1.a.weight")


def test_a_long_header_takes_a_second_request(hub: HubServer, tmp_path: Path) -> None:
    source = write(tmp_path / "source", small_files())
    save_file({f"layers.{n}.weight": np.zeros((8, 8), np.float16) for n in range(3000)}, source / "model.safetensors")
    hub.add("acme/tiny", source)
    remote, here = open_remote("acme/tiny"), open_local(source, "")
    assert remote.tensors == here.tensors
    assert len(hub.fetched("model.safetensors")) == 2
    data_start = 8 + struct.unpack("<Q", (source / "model.safetensors").read_bytes()[:8])[0]
    assert hub.sent("model.safetensors") == data_start > 100_000


def test_a_server_without_ranges_is_read_no_further_than_needed(hub: HubServer, tmp_path: Path) -> None:
    source = single(tmp_path / "source")
    hub.add("acme/tiny", source)
    hub.ignore_ranges = True
    assert open_remote("acme/tiny").tensors == open_local(source, "").tensors


def test_a_header_survives_a_dropped_connection(hub: HubServer, tmp_path: Path) -> None:
    source = single(tmp_path / "source")
    hub.add("acme/tiny", source)
    hub.drop("model.safetensors")
    assert open_remote("acme/tiny").tensors == open_local(source, "").tensors


def test_files_beside_the_weights_come_when_they_are_asked_for(hub: HubServer, tmp_path: Path) -> None:
    source = single(tmp_path / "source")
    write(source, {"tokenizer.json": '{"model": 1}'})
    hub.add("acme/tiny", source)
    remote, here = open_remote("acme/tiny"), open_local(source, "")
    assert list(remote.files) == list(here.files)
    assert "tokenizer.json" in remote.files and "vocab.json" not in remote.files
    assert len(remote.files) == len(here.files)
    assert not hub.fetched("tokenizer.json")
    assert remote.files["tokenizer.json"].read_text() == '{"model": 1}'
    assert {name: path.read_text() for name, path in remote.files.items()} == {
        name: path.read_text() for name, path in here.files.items()
    }
    assert remote.files.get("vocab.json") is None


def test_a_model_in_the_cache_is_opened_there(hub: HubServer, tmp_path: Path) -> None:
    hub.add("acme/tiny", sharded(tmp_path / "source"))
    folder = download("acme/tiny")
    hub.requests.clear()
    checkpoint = open_remote("acme/tiny")
    here = open_local(folder, "")
    assert [(f.name, f.size, f.header) for f in checkpoint.identity()] == [
        (f.name, f.size, f.header) for f in here.identity()
    ]
    assert {f.version for f in checkpoint.identity()} == {folder.name}  # the same on every machine that has the commit
    assert checkpoint.revision == folder.name
    assert [request.path for request in hub.requests] == ["/api/models/acme/tiny"]


@pytest.mark.parametrize("held", ["pytorch_model.bin", "tiny.gguf"])
def test_without_safetensors_there_are_no_headers_to_fetch(hub: HubServer, tmp_path: Path, held: str) -> None:
    commit = hub.add("acme/tiny", write(tmp_path / "source", {held: "x", "config.json": "{}"}))
    text = said(MissingInput, "acme/tiny", open_remote)
    assert held in text and f"hf download acme/tiny --revision {commit}" in text
    assert not hub.fetched(held)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "0 bytes is too short"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a safetensors file"),
        (struct.pack("<Q", 4) + b"{no}", "header is not valid JSON"),
        (struct.pack("<Q", 400) + b"{}", "cut short"),
        (struct.pack("<Q", 59) + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}    ', "cut short"),
    ],
)
def test_a_damaged_remote_header_is_told_in_words(hub: HubServer, tmp_path: Path, content: bytes, told: str) -> None:
    hub.add("acme/tiny", write(tmp_path / "source", {"model.safetensors": content}))
    text = said(MalformedFile, "acme/tiny", open_remote)
    assert text.startswith("acme/tiny/model.safetensors: ") and told in text


def test_an_index_and_shards_that_disagree_are_told(hub: HubServer, tmp_path: Path) -> None:
    source = sharded(tmp_path / "source")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    hub.add("acme/tiny", write(source, {"model.safetensors.index.json": json.dumps(index)}))
    assert "'ghost'" in said(MissingInput, "acme/tiny", open_remote)


# --- what goes wrong


@pytest.mark.parametrize("opener", [download, open_downloaded, open_remote])
def test_no_such_repository(hub: HubServer, monkeypatch: pytest.MonkeyPatch, opener: Any) -> None:
    text = said(MissingInput, "acme/tyni", opener)
    assert "no such repository on the Hub" in text and hub.url in text and "set HF_TOKEN" in text
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert "the token in use may not read it" in said(MissingInput, "acme/tyni", opener)


def test_a_private_repository(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("acme/secret", single(tmp_path / "source"), token="hf_mine")
    assert "set HF_TOKEN" in said(MissingInput, "acme/secret")
    monkeypatch.setenv("HF_TOKEN", "expired")
    assert "refuses the token (401" in said(MissingInput, "acme/secret", open_remote)
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert (download("acme/secret") / "model.safetensors").is_file()


def test_a_gated_repository(hub: HubServer, tmp_path: Path) -> None:
    hub.add("acme/gated", single(tmp_path / "source"), gated=True)
    for opener in (download, open_remote):
        text = said(MissingInput, "acme/gated", opener)
        assert f"ask for access at {hub.url}/acme/gated" in text and "HF_TOKEN" in text


@pytest.mark.parametrize("opener", [download, open_remote])
def test_no_such_revision(hub: HubServer, tmp_path: Path, opener: Any) -> None:
    hub.add("acme/tiny", single(tmp_path / "source"))
    assert "no revision 'v9'" in said(MissingInput, "acme/tiny@v9", opener)
    assert f"no revision '{'0' * 40}'" in said(MissingInput, f"acme/tiny@{'0' * 40}", opener)


@pytest.mark.parametrize("opener", [download, open_remote])
def test_the_hub_is_gone(hub: HubServer, opener: Any) -> None:
    hub.stop()
    text = said(RuntimeProblem, "acme/tiny", opener)
    assert "no connection to the Hub" in text and hub.url in text and "HF_ENDPOINT" in text


def test_the_hub_does_not_answer(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.silent.set()
    assert "no connection to the Hub" in said(RuntimeProblem, "acme/tiny")


@pytest.mark.parametrize(("status", "told"), [(429, "fewer requests"), (500, "answered 500"), (503, "run it again")])
def test_the_hub_is_out_of_order(hub: HubServer, status: int, told: str) -> None:
    hub.down = status
    assert told in said(RuntimeProblem, "acme/tiny")


def test_something_that_is_no_hub(hub: HubServer) -> None:
    hub.login_page = True
    assert "does not answer as the Hub does" in said(RuntimeProblem, "acme/tiny")


def test_a_name_that_cannot_be_one(hub: HubServer) -> None:
    assert "neither a file or folder here nor a Hub id" in said(UsageError, "acme/tiny.git")
    assert hub.requests == []


def test_weights_that_cannot_be_chosen(hub: HubServer, tmp_path: Path) -> None:
    hub.add("acme/quants", write(tmp_path / "source", {"a.Q4.gguf": "x", "b.Q8.gguf": "x"}))
    for opener in (download, open_remote):
        assert "2 GGUF files" in said(MissingInput, "acme/quants", opener)
    hub.add("acme/none", write(tmp_path / "none", {"config.json": "{}", "onnx/model.onnx": "x"}))
    assert "holds no weights known here" in said(MissingInput, "acme/none", open_downloaded)
    index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    hub.add("acme/gap", write(tmp_path / "gap", {"model.safetensors.index.json": index}))
    assert "names the shard 'model-00001-of-00001.safetensors'" in said(MissingInput, "acme/gap")


@pytest.mark.parametrize(
    ("raised", "error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull, "no room left"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), DiskFull, "set HF_HOME"),
        (PermissionError(errno.EACCES, "Permission denied", "/cache/x"), OutputError, "/cache/x: Permission denied"),
        (
            OSError("Consistency check failed: file should be of size 9\nbut"),
            RuntimeProblem,
            "Consistency check failed",
        ),
    ],
)
def test_a_download_that_cannot_be_kept(
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    error: type[WtoolError],
    told: str,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    hub.add("acme/tiny", single(tmp_path / "source"))
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert told in said(error, "acme/tiny")


def test_a_bug_is_not_dressed_up(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(KeyError, match="a bug"):
        download("acme/tiny")


# --- through the environment alone, as a user has it


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from wtool.checkpoint.resolve import open_checkpoint as open\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_endpoint_cache_token_and_offline_come_from_the_environment(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("acme/secret", sharded(tmp_path / "source"), token="hf_mine")
    code = "print(open('acme/secret').revision, open('acme/secret', headers_only=True).nbytes)"
    nbytes = open_local(tmp_path / "source", "").nbytes

    done = run(code, HF_TOKEN="hf_mine")
    assert (done.stdout, done.returncode) == (f"{commit} {nbytes}\n", 0), done.stderr
    assert (tmp_path / "hf/hub/models--acme--secret/snapshots" / commit / "config.json").is_file()

    hub.stop()
    done = run(code, HF_HUB_OFFLINE="1")
    assert (done.stdout, done.returncode) == (f"{commit} {nbytes}\n", 0), done.stderr
    done = run(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty"))
    assert "acme/secret: not complete in the local cache" in done.stderr and done.returncode


def test_nothing_of_the_hub_is_imported_for_a_local_folder(tmp_path: Path) -> None:
    source = single(tmp_path / "source")
    done = run(f"import sys; open({str(source)!r}); print('huggingface_hub' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
