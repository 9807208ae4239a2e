"""Which way to compute attention is picked from a profile: on made ones, without a GPU."""

import json
import random
from dataclasses import replace

import pytest
import torch

from toptheta.kernels import profile as profiles
from toptheta.kernels.dense import DENSE_WAYS
from toptheta.kernels.profile import HYSTERESIS, SPARSE_WAYS, Entry, Kind, Profile, Shape, pick
from toptheta.util.errors import UsageError

KIND = Kind("decode", 4, 128, "bfloat16")
WAYS = (*DENSE_WAYS, *SPARSE_WAYS)
SHARES = (0.003, 0.02, 0.1, 0.3, 1.0)
KEY = {"gpu": "NVIDIA H100, 9.0, 132", "torch": "2.13.0", "triton": "3.7.1", "sources": "0123"}


def made(seed: int, lengths=(1024, 4096, 32768), pairs=(8, 64), noise: float = 0.5) -> Profile:
    """Times that grow with the length and the kept share, with noise that makes some of them fall."""
    draw = random.Random(seed)
    entries = []
    for batch_heads in pairs:
        for length in lengths:
            size = batch_heads * length / 1e6
            for way in DENSE_WAYS:
                ms = 0.01 + size * draw.uniform(0.5, 1.5)
                entries.append(Entry(KIND, way, batch_heads, length, 1.0, ms))
            for way in SPARSE_WAYS:
                for share in SHARES:
                    ms = 0.01 + size * (0.3 + share) * draw.uniform(1 - noise, 1 + noise)
                    entries.append(Entry(KIND, way, batch_heads, length, share, ms))
    return Profile(KEY, entries=entries)


@pytest.mark.parametrize("seed", range(20))
def test_picks_the_fastest_entry(seed):
    """Where something was measured, what is picked is the fastest there; a way that is slower at a smaller
    share than at this one counts as slow as there."""
    profile = made(seed)
    for batch_heads in (8, 64):
        for length in (1024, 4096, 32768):
            here = [one for one in profile.entries if (one.batch_heads, one.kv_len) == (batch_heads, length)]
            for share in SHARES:
                times = {
                    way: max(e.ms for e in here if e.way == way and e.kept <= share) for way in SPARSE_WAYS
                }
                times |= {one.way: one.ms for one in here if one.way in DENSE_WAYS}
                way = pick(profile, Shape(KIND, batch_heads, length), share, WAYS)
                assert way is not None and times[way] == min(times.values())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("now", [None, *WAYS])
def test_is_monotone_in_the_kept_share(seed, now):
    """What is dense at one share is dense at every larger one, at any length, between and beyond what was
    measured."""
    profile = made(seed)
    for length in (100, 1024, 3000, 20000, 200000):
        for visible, batch_heads in ((None, 8), (length // 3, 23), (None, 500)):
            shape = Shape(KIND, batch_heads, length, visible)
            found = [pick(profile, shape, i / 40, WAYS, now) in DENSE_WAYS for i in range(41)]
            assert found == sorted(found)


def test_hysteresis():
    """A way in use stays unless another is faster by more than 5 %; what is picked is never slower than the
    fastest by more."""
    draw, stayed, left = random.Random(0), 0, 0
    for seed in range(20):
        profile = made(seed)
        for _ in range(50):
            shape = Shape(KIND, draw.choice([8, 20, 64]), draw.randint(500, 50000))
            kept, now = draw.random(), draw.choice(WAYS)
            times = {way: profile.ms(way, shape, kept) for way in WAYS}
            way, best = pick(profile, shape, kept, WAYS, now), min(times.values())
            assert times[way] <= best / (1 - HYSTERESIS)
            assert (way == now) == (best >= (1 - HYSTERESIS) * times[now])
            stayed, left = stayed + (way == now and times[now] > best), left + (way != now)
    assert stayed > 5 and left > 100


def test_between_and_beyond():
    """Linear between lengths and shares, in proportion beyond the longest, constant below the shortest."""
    entries = [
        Entry(KIND, "scores", 8, length, kept, ms)
        for length, kept, ms in [(1000, 0.1, 1.0), (1000, 0.3, 3.0), (3000, 0.1, 2.0), (3000, 0.3, 1.0)]
    ]
    profile = Profile(KEY, entries=entries)

    def ms(length: int, kept: float, visible: int | None = None) -> float | None:
        return profile.ms("scores", Shape(KIND, 8, length, visible), kept)

    assert ms(1000, 0.2) == pytest.approx(2.0) and ms(2000, 0.1) == pytest.approx(1.5)
    assert ms(3000, 0.3) == 2.0  # not the 1.0 that was measured: keeping more is not faster
    assert ms(6000, 0.1) == pytest.approx(4.0) and ms(10, 0.05) == 1.0 and ms(1000, 0.9) == 3.0
    assert ms(9000, 0.1, visible=2000) == pytest.approx(1.5)
    assert profile.ms("sdpa", Shape(KIND, 8, 1000), 0.1) is None


def test_visible_keys_matter_to_our_kernels_alone():
    shape = Shape(KIND, 8, 4096, visible=100)
    assert [shape.keys_of(way) for way in ("sdpa", "flash", "kernel", "two-tier")] == [4096, 4096, 100, 100]


def test_knows_nothing_of_other_calls():
    profile = made(0)
    shape = Shape(KIND, 8, 4096)
    assert pick(profile, shape, 0.1, WAYS) is not None
    for change in (
        {"phase": "prefill"},
        {"group": 3},
        {"dtype": "float16"},
        {"masked": True},
        {"graphed": True},
    ):
        assert pick(profile, replace(shape, kind=replace(KIND, **change)), 0.1, WAYS) is None
    assert pick(profile, shape, 0.1, SPARSE_WAYS) is None and pick(profile, shape, 0.1, DENSE_WAYS) is None
    assert pick(Profile(KEY), shape, 0.1, WAYS) is None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOPTHETA_CACHE", str(tmp_path))
    profiles.profile_of.cache_clear()
    yield tmp_path
    profiles.profile_of.cache_clear()


def test_stale_profiles_are_ignored(cache):
    """A profile is found for its own GPU, versions and sources alone, even under another's name."""
    profile = replace(made(3), tiles={"decode": {"tile": [128, 4], "num_stages": 3}})
    file = profiles.save(profile)
    assert profiles.load(KEY) == profile and file.parent.parent == cache
    for name in KEY:
        other = KEY | {name: "another"}
        assert profiles.load(other) is None
        profiles.path_of(other).write_text(file.read_text())
        assert profiles.load(other) is None


def test_the_key_of_a_device(cache):
    key = profiles.key_of(torch.device("cpu"))
    assert key["torch"] == torch.__version__ and len(key["sources"]) == 16
    device = torch.device("cpu")
    assert profiles.profile_of(device) is None
    profiles.save(Profile(key))
    assert profiles.profile_of(device) == Profile(key)


def test_the_key_knows_the_sources(tmp_path, monkeypatch):
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(profiles, "SOURCES", tmp_path)
    found = set()
    for text in ("a", "b"):
        (tmp_path / "triton" / "decode.py").write_text(text)
        found.add(profiles._digest.__wrapped__())
    assert len(found) == 2


@pytest.mark.parametrize("text", ['{"key": 1}', "{", '{"key": {}, "entries": [{"way": "sdpa"}]}'])
def test_damaged_profiles_are_named(cache, text):
    path = profiles.path_of(KEY)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UsageError, match="is damaged .* remove it, or run python -m toptheta.kernels.tune"):
        profiles.load(KEY)
    entry = json.loads(json.dumps(profiles.asdict(made(0))))
    path.write_text(json.dumps(entry))
    assert profiles.load(KEY) == made(0)
