import json
import math

import distillation_definitions as definition
import pytest
import torch
from safetensors.torch import load_file

from distill import signal_cache
from distill.kinds import Divergence
from distill.losses import divergence_with_gradient, sampled_with_gradient, top_k_with_gradient
from distill.signal_cache import Cache, CacheWriter, Kind, fingerprint, is_cache
from distill.signal_codec import bytes_per_token, decode, encode
from distill.signals import Sampled, TopK, join, sample, top_k
from wtool.errors import MalformedFile, MissingInput, OutputExists, UnfinishedWork, UsageError
from wtool.writer import is_complete, work_folder

ABOUT = {"teacher": "a/teacher", "temperature": 2.0}
LENGTHS = (5, 3, 8, 1, 4, 6)


def logits(tokens, vocabulary, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(tokens, vocabulary, generator=generator)


def some_windows(vocabulary, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocabulary, (length,), generator=generator) for length in lengths]


def said_of(number, windows, kind):
    told = logits(len(windows[number]), kind.vocabulary, seed=number)
    if kind.mode == "top-k":
        return top_k(told, kind.k, temperature=kind.temperature)
    generator = torch.Generator().manual_seed(number)
    return sample(told, kind.k, temperature=kind.temperature, generator=generator)


def writer_of(out, windows, kind, **options):
    return CacheWriter(out, ABOUT, windows=windows, **vars(kind), **options)


def write(out, windows, kind, until=None):
    with writer_of(out, windows, kind) as writer:
        for number in range(writer.done, len(windows) if until is None else until):
            writer.put(number, said_of(number, windows, kind))
        if until is None:
            writer.commit()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def parts(said):
    second = (said.log_probs, said.tail) if isinstance(said, TopK) else (said.log_weights, said.entropy)
    return said.ids, *second


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(signal_cache, "SHARD_TOKENS", 7)


@pytest.mark.parametrize("mode", ["top-k", "sample"])
@pytest.mark.parametrize(("vocabulary", "k"), [(1, 1), (2, 1), (300, 32), (65536, 3), (65537, 5), (151936, 36)])
def test_codec(vocabulary, k, mode):
    told = logits(9, vocabulary)
    said = top_k(told, k) if mode == "top-k" else sample(told, k, generator=torch.Generator().manual_seed(0))
    said.ids[0, 0] = vocabulary - 1  # the largest there can be
    columns = encode(said, vocabulary)
    found = decode(columns, mode, vocabulary)
    assert torch.equal(found.ids, said.ids)
    assert sum(column[0].numel() * column.itemsize for column in columns.values()) == bytes_per_token(k, vocabulary)
    logs, rest = parts(said)[1:]
    kept, left = parts(found)[1:]
    deep = logs[:, :1] - logs > 12
    # a third of a power of 255 steps: the step at a fall d is 3 d (16 / d)^(1/3) / 255, and half of it is the error
    assert (((kept - logs).abs() < 0.1) | deep).all()
    assert ((kept.exp() - logs.exp()).abs() < 0.005).all()
    total = kept.exp().sum(-1) + (left.exp() if mode == "top-k" else 0)
    torch.testing.assert_close(total, torch.ones(9))
    torch.testing.assert_close(left, rest, rtol=2e-3, atol=5e-3)


def test_codec_of_one_that_is_sure():
    told = torch.zeros(2, 50)
    told[0, 3], told[1, 4] = 1e4, 30.0
    found = decode(encode(top_k(told, 4), 50), "top-k", 50)
    assert found.ids[:, 0].tolist() == [3, 4] and isinstance(found, TopK)
    assert found.log_probs.isfinite().all()
    assert found.log_probs[:, 0].exp().tolist() == pytest.approx([1, 1], abs=1e-6)
    student = logits(2, 50)
    _, exact = divergence_with_gradient(student, told, Divergence())
    _, gradient = top_k_with_gradient(student, found.ids, found.log_probs, found.tail, Divergence())
    torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["top-k", "sample"])
@pytest.mark.parametrize("vocabulary", [300, 70000])
def test_round_trip(tmp_path, small_shards, vocabulary, mode):
    windows, kind = some_windows(vocabulary), Kind(mode, 5, vocabulary, 2.0)
    write(tmp_path / "out", windows, kind)
    cache = Cache(tmp_path / "out")
    assert cache.kind == kind and cache.about["teacher"] == "a/teacher"
    assert cache.about["signals"]["shift"] == "entry t tells of the token after position t"
    assert all(torch.equal(*pair) for pair in zip(cache.windows, windows, strict=True))
    expected = [decode(encode(said_of(n, windows, kind), vocabulary), mode, vocabulary) for n in range(6)]
    for numbers in ([0], [2, 0], [5, 5, 1], range(6)):
        found = cache.targets(numbers)
        joined = join([expected[number] for number in numbers])
        assert type(found) is type(joined) and found.vocabulary == vocabulary
        assert all(torch.equal(*pair) for pair in zip(parts(found), parts(joined), strict=True))
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [*(f"signals-{i:05}.safetensors" for i in range(3)), "wtool.json"]


def test_positions(tmp_path, small_shards):
    windows, kind = some_windows(40), Kind("top-k", 4, 40)
    write(tmp_path / "out", windows, kind)
    cache = Cache(tmp_path / "out")
    whole = cache.targets([2, 3, 0])  # 8, 1 and 5 tokens
    padded = torch.zeros(3, 9, dtype=torch.bool)
    padded[0, [1, 7]], padded[1, 0], padded[2, 3:] = True, True, True
    flat = torch.zeros(14, dtype=torch.bool)
    flat[[1, 7, 8, 12, 13]] = True
    for positions in (padded, flat):
        found = cache.targets([2, 3, 0], positions)
        assert all(torch.equal(a, b[flat]) for a, b in zip(parts(found), parts(whole), strict=True))
    assert cache.targets([0], torch.zeros(1, 5, dtype=torch.bool)).ids.shape == (0, 4)


@pytest.mark.parametrize("until", range(7))
def test_cut_anywhere_and_continued_it_is_the_same(tmp_path, small_shards, until):
    windows, kind = some_windows(90), Kind("sample", 3, 90)
    write(tmp_path / "straight", windows, kind)
    write(tmp_path / "out", windows, kind, until)
    assert not (tmp_path / "out").exists()
    (work_folder(tmp_path / "out") / "half").write_bytes(b"cut short")  # while a file was written
    with writer_of(tmp_path / "out", windows, kind) as writer:
        assert writer.done == max(whole for whole in (0, 2, 3, 6) if whole <= until)
    write(tmp_path / "out", windows, kind)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert not work_folder(tmp_path / "out").exists()


def test_other_work_is_not_mixed_in(tmp_path, small_shards):
    windows, kind, out = some_windows(90), Kind("top-k", 3, 90), tmp_path / "out"
    write(out, windows, kind, until=3)
    changed = [*windows[:-1], windows[-1] + 1]
    for others in ((changed, kind), (windows, Kind("top-k", 4, 90)), (windows, Kind("sample", 3, 90))):
        with pytest.raises(UnfinishedWork, match="unfinished work of another teacher or text; --force discards it"):
            writer_of(out, *others)
    with writer_of(out, changed, kind, force=True) as writer:
        assert writer.done == 0
    with writer_of(out, changed, kind), pytest.raises(UnfinishedWork, match="another wtool is writing it now"):
        writer_of(out, changed, kind)


def test_what_is_there_is_kept_unless_forced(tmp_path):
    windows, kind, out = some_windows(90), Kind("top-k", 3, 90), tmp_path / "out"
    write(out, windows, kind)
    assert is_complete(out, fingerprint(ABOUT, windows, kind))
    assert not is_complete(out, fingerprint(ABOUT, windows, Kind("top-k", 3, 90, temperature=2.0)))
    with pytest.raises(OutputExists, match="there already; --force replaces it"):
        writer_of(out, windows, kind)
    with writer_of(out, windows[:2], kind, force=True) as writer:
        for number in range(2):
            writer.put(number, said_of(number, windows, kind))
        assert len(Cache(out).windows) == 6
        writer.commit()
    assert len(Cache(out).windows) == 2


def test_the_files_hold_what_the_manifest_says(tmp_path):
    windows, kind = some_windows(70000), Kind("top-k", 7, 70000)
    write(tmp_path / "out", windows, kind)
    columns = load_file(tmp_path / "out" / "signals-00000.safetensors")
    told = json.loads((tmp_path / "out" / "wtool.json").read_bytes())["signals"]
    assert told["tokens"] == sum(LENGTHS) == len(columns["tokens"]) and told["windows"] == 6
    size = sum(
        column.numel() * column.itemsize for name, column in columns.items() if name not in ("tokens", "lengths")
    )
    assert size == told["bytes_per_token"] * told["tokens"]


@pytest.mark.parametrize("k", [0, 91])
def test_as_many_tokens_as_there_are(tmp_path, k):
    with pytest.raises(UsageError, match=f"k {k}: 1 to 90 tokens, the teacher's vocabulary, can be kept"):
        CacheWriter(tmp_path / "out", {}, windows=some_windows(90), k=k, vocabulary=90)


def test_folders_that_are_no_cache(tmp_path, small_shards):
    with pytest.raises(MissingInput, match="no teacher's signal here .*`wtool teacher-cache` makes it"):
        Cache(tmp_path)
    (tmp_path / "wtool.json").write_text('{"statistics": []}')
    with pytest.raises(MalformedFile, match="not of a teacher's signal"):
        Cache(tmp_path)
    assert not is_cache(tmp_path)
    windows = some_windows(90)
    write(tmp_path / "out", windows, Kind("top-k", 3, 90))
    assert is_cache(tmp_path / "out")
    (tmp_path / "out" / "signals-00001.safetensors").unlink()
    with pytest.raises(MissingInput, match="signals-00001.safetensors: missing; wtool.json tells of 3 files"):
        Cache(tmp_path / "out")


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).item()


def through_the_cache(said, vocabulary):
    mode = "sample" if isinstance(said, Sampled) else "top-k"
    return decode(encode(said, vocabulary), mode, vocabulary)


def test_in_fewer_bytes_than_others_the_gradient_is_nearer_the_full_one():
    # DistillKit keeps 128 tokens in 328 bytes and 50 in 121 at 128,256 tokens, without the mass of the others; here its
    # probabilities are exact, as they are ("truncated") or made to add up to 1 (its default)
    student, teacher = definition.pruned_student(tokens=48, vocabulary=16384)
    _, full = divergence_with_gradient(student, teacher, Divergence())
    for theirs, ours, budget in ((128, 96, 328), (50, 37, 121)):
        assert bytes_per_token(ours, 128256) < budget
        found = through_the_cache(top_k(teacher, ours), 128256)
        assert isinstance(found, TopK)
        _, with_tail = top_k_with_gradient(student, found.ids, found.log_probs, found.tail, Divergence())
        peer = top_k(teacher, theirs)
        _, truncated = top_k_with_gradient(student, peer.ids, peer.log_probs, None, Divergence())
        _, renormalised = top_k_with_gradient(student, peer.ids, peer.log_probs.log_softmax(-1), None, Divergence())
        assert cosine(with_tail, full) > max(cosine(truncated, full), cosine(renormalised, full))
        assert cosine(with_tail, full) > 0.999


def test_what_is_lost_on_disk_is_less_than_what_was_left_out():
    student, teacher = definition.pruned_student(tokens=48, vocabulary=16384, distance=0.2)
    _, full = divergence_with_gradient(student, teacher, Divergence())
    told = top_k(teacher, 32)
    found = through_the_cache(told, 16384)
    assert isinstance(found, TopK)
    exact, kept = (
        1 - cosine(top_k_with_gradient(student, each.ids, each.log_probs, each.tail, Divergence())[1], full)
        for each in (told, found)
    )
    assert kept < 1.3 * exact < 0.01


def test_a_sample_stays_right_in_the_mean():
    student, teacher = logits(1, 12, seed=1) / 2, logits(1, 12) / 2
    value, gradient = divergence_with_gradient(student, teacher, Divergence())
    drawn = sample(teacher.expand(20000, -1), 4, generator=torch.Generator().manual_seed(0))
    found = through_the_cache(drawn, 12)
    assert isinstance(found, Sampled)
    values, slopes = sampled_with_gradient(
        student.expand(20000, -1), found.ids, found.log_weights, found.entropy, Divergence()
    )
    assert values.mean().item() == pytest.approx(value.item(), rel=0.02)
    error = slopes.std(0) / math.sqrt(len(slopes))
    assert ((slopes.mean(0) - gradient[0]).abs() < 4 * error + 2e-3).all()
